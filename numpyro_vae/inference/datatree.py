"""Results as ArviZ reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.inference import quantities
from numpyro_vae.inference.derived import derive_whole, derived_sites
from numpyro_vae.inference.fingerprint import NAME, of_all
from numpyro_vae.inference.global_weights import draw_whole
from numpyro_vae.inference.marginal import redraw
from numpyro_vae.inference.predictable import names_of, undrawn_sites, warn_of_undrawn
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Quantity, Runner, choose_names
from numpyro_vae.model.sites import ModelSites

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

SAMPLED = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats")
OF_OBSERVATIONS = ("log_likelihood", "sample_stats", "observed_data")
DRAWS = ("chain", "draw")
GROUPS = (*SAMPLED, "observed_data", "constant_data")

Groups = dict[str, dict[str, np.ndarray]]


def choose_groups(groups: Iterable[str] | None) -> tuple[str, ...]:
    """Return the groups wanted, by default all.

    Raises:
        ValueError: if one does not exist.
    """
    chosen = GROUPS if groups is None else (groups,) if isinstance(groups, str) else tuple(groups)
    unknown = sorted(set(chosen) - set(GROUPS))
    if unknown:
        raise ValueError(f"There are no groups {unknown} here, choose from {list(GROUPS)}.")
    return tuple(group for group in GROUPS if group in chosen)


def make_datatree(
    runner: Runner,
    rng_key: Array,
    data: Any,
    num_samples: int,
    num_particles: int,
    marginal: bool,
    groups: Iterable[str] | None,
    var_names: Iterable[str] | None,
    coords: Mapping[str, Any] | None,
    globals_: dict[str, Any] | None = None,
) -> DataTree:
    """Return everything ArviZ reads of some rows; see `Posterior.to_datatree`.

    Args:
        runner: the trained guide.
        rng_key: the random key.
        data: the data.
        num_samples: draws of each row.
        num_particles: local draws for each log-likelihood, and those that one is resampled from.
        marginal: whether predictions are of local latents from their prior.
        groups: those wanted.
        var_names: the latent sites that are wanted.
        coords: coordinates by dimension.
        globals_: as many draws of the global sites, given which the rows' latents are resampled by
            importance; by default both are drawn from the guide.
    """
    rows = runner.read(data, of_prior=True)
    sites, of_globals = runner.guide.sites, runner.guide.global_names
    check_names(sites)
    known = (*runner.local_names, *of_globals, *sites.deterministic)
    names = choose_names(var_names, known)
    options = {"marginal": marginal, "groups": choose_groups(groups), "given": globals_}
    found, dims = gather(runner, rows, rng_key, num_samples, num_particles, **options)
    if "posterior" in found:
        latent = found["posterior"]
        found["posterior"] = {name: latent[name] for name in names if name in latent}
    return build_datatree(found, dims, rows, sites, coords or {})


def gather(
    runner: Runner,
    rows: Rows,
    rng_key: Array,
    num_samples: int,
    num_particles: int,
    *,
    marginal: bool,
    groups: tuple[str, ...],
    given: dict[str, Any] | None = None,
) -> tuple[Groups, dict[str, list[str]]]:
    """Return by ArviZ group all variables of some rows, and their dimensions; see `make_datatree`.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        num_samples: draws of each row.
        num_particles: local draws for each log-likelihood.
        marginal: whether predictions are of local latents from their prior.
        groups: those wanted.
        given: draws of the global sites for which the rows' latents are resampled, if any.
    """
    guide, derived = runner.guide, derived_sites(runner, rows)
    if rows.is_unobserved:
        groups = tuple(name for name in groups if name not in OF_OBSERVATIONS)
    densities, is_whole = {}, not (guide.has_density or guide.local_sites)
    draw = quantities.draws if given is None else partial(redraw, particles=num_particles)
    if given is not None:
        globals_ = jax.device_put(given)
    elif is_whole and "sample_stats" in groups:
        globals_, densities = draw_whole(runner, rows, rng_key, num_samples)
    else:
        globals_ = runner.draw_globals(rng_key, rows, num_samples)
    run = partial(runner.per_draw, num_samples=num_samples)
    observed = runner.per_batch(quantities.observed, rows)
    by_row = tuple(derived.by_row.items()) if "posterior" in groups else ()
    found: Groups = {"observed_data": observed}
    args = (draw, (rng_key, globals_), groups, by_row)
    found |= _draws(runner, rows, run, *args, marginal=marginal)
    whole = {name: np.asarray(value) for name, value in globals_.items()}
    if "posterior" in groups:
        local = _local(runner, found["posterior"])
        whole |= derive_whole(runner, rows, rng_key, derived, globals_, local, num_samples)
    found["posterior"] = found.get("posterior", {}) | whole
    found["constant_data"] = constant_data(guide.model, rows.data, observed)
    if (guide.has_density or not guide.local_sites) and "log_likelihood" in groups:
        alone = len(observed) == 1 and not guide.segments
        name = next(iter(observed)) if alone else "joint"
        quantity = partial(run, quantities.evidence, particles=num_particles)
        if not guide.local_sites:
            quantity = partial(run, quantities.likelihood)
        found["log_likelihood"] = {name: quantity(rows, rng_key, globals_)["log_evidence"]}
    if densities:
        found["sample_stats"] = densities
    rowwise = {name for group in found.values() for name in group} - {*whole, *densities}
    per_draw: dict[str, list[str]] = {name: [] for name in densities}
    dims = rows_first(site_dims(guide.sites), rowwise, (guide.plate.name, *guide.segments))
    return {
        group: found[group] for group in groups if group in found
    }, dims | derived.dims | per_draw


def _draws(
    runner: Runner,
    rows: Rows,
    run: Callable[..., Any],
    draw: Quantity,
    given: tuple[Array, dict[str, Array]],
    groups: tuple[str, ...],
    by_row: quantities.Axes,
    *,
    marginal: bool,
) -> Groups:
    """Return the groups that are drawn of each row; of the prior where nothing is observed."""
    drawn = tuple(name for name in groups if not (marginal and name == "posterior_predictive"))
    found: Groups = {}
    if set(drawn) & {"posterior", "posterior_predictive", "sample_stats"}:
        draw = partial(run, draw, groups=drawn)
        if rows.is_unobserved:
            draw = partial(run, quantities.imagine, **names_of(runner))
        found |= draw(rows, *given, derived=by_row, observed=True)
    if marginal and "posterior_predictive" in groups:
        predicted = run(quantities.replicate, rows, *given, observed=True)
        found["posterior_predictive"] = predicted
    if "posterior_predictive" in groups:
        warn_of_undrawn(undrawn_sites(runner, rows, found["posterior_predictive"]))
    return found


def _local(runner: Runner, draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return draws of the local sites with the plate's axis where the model has it."""
    sites, plate = runner.guide.sites.sites, runner.guide.plate
    names = (name for name in runner.local_names if name in draws)
    return {name: np.moveaxis(draws[name], 1, 1 + sites[name].axis(plate)) for name in names}


def site_dims(sites: ModelSites) -> dict[str, list[str]]:
    """Return by site the names of its plates as dimensions, outermost first.

    Dimensions of the event get ArviZ's own names, ``<site>_dim_0`` and so on.
    """
    found = {}
    for site in sites.sites.values():
        by_dim = {sites.plates[name].dim: name for name in site.plates}
        batch = range(-len(site.batch_shape), 0)
        found[site.name] = [by_dim.get(dim, f"{site.name}_batch_{-dim}") for dim in batch]
    return found


def require_known_dims(
    coords: Mapping[str, Any], sites: ModelSites, found: Iterable[Hashable]
) -> None:
    """Raise ValueError for coordinates of a dimension that neither the model nor a result has.

    Args:
        coords: by dimension.
        sites: of the model, whose dimensions need not all be in each result.
        found: the dimensions of the result.
    """
    known = {"chain", "draw", *sites.plates, *map(str, found)}
    for site in sites.sites.values():
        known |= {f"{site.name}_dim_{axis}" for axis in range(len(site.event_shape))}
    unknown = sorted(set(coords) - known)
    if unknown:
        raise ValueError(
            f"coords has {unknown}, which are no dimensions here. Give coordinates of some of "
            f"{sorted(known)}."
        )


def rows_first(
    dims: Mapping[str, list[str]], names: Iterable[str], plates: Sequence[str]
) -> dict[str, list[str]]:
    """Return dimensions as arrays have them that go row by row.

    Args:
        dims: by variable.
        names: the variables that go row by row; one that is no site has a value for each datum.
        plates: the local plate's name, and those of other plates that hold the data's
            observations.
    """
    found = dict(dims)
    for name in names:
        own = dims.get(name, [])
        rows = next((plate for plate in plates if plate in own), plates[0])
        found[name] = [rows, *(dim for dim in own if dim != rows)]
    return found


def constant_data(
    model: Callable[..., Any], data: ArrayData, observed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the model's batched arguments by name, rows in front, those that it observes apart."""
    bound = arguments_by_name(model, *data.whole())
    bound_axes = arguments_by_name(model, *data.layout.whole(data.layout.axes))
    return {
        name: np.moveaxis(np.asarray(value), bound_axes[name], 0)
        for name, value in bound.items()
        if isinstance(value, jax.Array)
        and isinstance(bound_axes.get(name), int)
        and not any(np.array_equal(value, seen) for seen in observed.values())
    }


def arguments_by_name(
    model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a model's arguments by name, those of ``*args`` as ``args_0``, ``args_1`` and so on.

    Example:
        >>> arguments_by_name(lambda x, *rest, **named: None, (1, 2, 3), {"y": 4})
        {'x': 1, 'rest_0': 2, 'rest_1': 3, 'y': 4}
    """
    signature, found = inspect.signature(model), {}
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name}_{place}": one for place, one in enumerate(value)}
        else:
            found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def tree_name(name: Any) -> str:
    """Return the name that a site or a plate has in a tree, where ``/`` stands between groups.

    Example:
        >>> tree_name("scope/z")
        'scope.z'
    """
    return str(name).replace("/", ".")


def for_tree(dataset: Dataset) -> Dataset:
    """Return a dataset with the names that its variables and dimensions have in a tree."""
    names = {*dataset.variables, *dataset.dims}
    return dataset.rename({name: tree_name(name) for name in names if tree_name(name) != name})


def check_names(sites: ModelSites) -> None:
    """Raise if sites or plates cannot have their names in a tree.

    Raises:
        ValueError: naming the plate or the site.
    """
    plates = dict.fromkeys(sites.plates, "plate")
    kinds = plates | dict.fromkeys((*sites.sites, *sites.deterministic), "site")
    known: dict[str, str] = {}
    for name, kind in kinds.items():
        if name in DRAWS:
            raise ValueError(
                f"The {kind} {name!r} has the name of a dimension of draws in a DataTree. Rename "
                f"the {kind} in the model, to {name + 's'!r} for instance."
            )
        if known.setdefault(tree_name(name), name) != name:
            raise ValueError(
                f"{known[tree_name(name)]!r} and {name!r} are both {tree_name(name)!r} in a "
                "DataTree, where no name has a slash. Rename one of them in the model."
            )


def build_datatree(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, list[str]],
    rows: Rows,
    sites: ModelSites,
    coords: Mapping[str, Any],
) -> DataTree:
    """Return arrays as a DataTree in ArviZ's schema, with the fingerprint of their rows.

    Args:
        groups: by group and variable; in the sampled groups the draws are the leading axis, and
            become the dimensions ``chain`` and ``draw``.
        dims: by variable, the names of its leading dimensions but these.
        rows: the data.
        sites: those of the model.
        coords: coordinates by dimension.

    Slashes in names become points, see `tree_name`.

    Raises:
        ValueError: if a coordinate has another length than its dimension, or there is no such
            dimension.
    """
    import arviz as az
    from xarray import DataTree

    coords, found = {tree_name(name): coord for name, coord in (coords or {}).items()}, {}
    for group, variables in groups.items():
        if not variables:
            continue
        sampled = group in SAMPLED
        values = {name: value[None] if sampled else value for name, value in variables.items()}
        # A log-likelihood has no event, so that its variable has fewer dimensions than its site.
        known = {
            tree_name(name): [*map(tree_name, dims[name])][: np.ndim(variables[name]) - sampled]
            for name in values
        }
        values = {tree_name(name): value for name, value in values.items()}
        tree = az.from_dict({group: values}, dims=known, coords=coords)
        found[group] = tree[group].to_dataset()
    require_known_dims(coords, sites, (dim for group in found.values() for dim in group.dims))
    tree = DataTree.from_dict(found)
    tree.attrs[NAME] = of_all(rows.fingerprint)
    return tree
