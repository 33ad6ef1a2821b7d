"""Results as ArviZ reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.inference import quantities
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Rowwise
from numpyro_vae.model.sites import ModelSites

if TYPE_CHECKING:
    from xarray import DataTree

SAMPLED = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats")

Groups = dict[str, dict[str, np.ndarray]]


def gather(
    rowwise: Rowwise,
    rows: Rows,
    rng_key: Array,
    num_samples: int,
    num_particles: int,
    *,
    marginal: bool,
) -> tuple[Groups, dict[str, list[str]]]:
    """Return by ArviZ group all variables of some rows, and their dimensions.

    Args:
        rowwise: the trained guide.
        rows: the data.
        rng_key: the random key.
        num_samples: draws of each row.
        num_particles: local draws for each log-likelihood.
        marginal: whether predictions are of local latents from their prior.
    """
    guide = rowwise.guide
    globals_ = rowwise.draw_globals(rng_key, rows, num_samples)
    sizes = {"num_samples": num_samples, "row_axis": 1}
    draw = partial(rowwise.apply, quantities.draws, num_draws=num_samples, **sizes)
    observed = rowwise.apply(quantities.observed, rows)
    plates = (guide.plate.name, *guide.segments)
    of_globals = {name: np.asarray(x) for name, x in globals_.items()}
    if globals_:
        derive = partial(rowwise.run, quantities.derive, rng_key, globals_)
        of_globals |= rows.once(partial(derive, names=guide.sites.derived(plates)))
    groups: Groups = draw(rows, rng_key, globals_)
    if marginal:
        predicted = rowwise.apply(quantities.replicate, rows, rng_key, globals_, **sizes)
        groups["posterior_predictive"] = {name: predicted[name] for name in observed}
    groups["posterior"] = groups["posterior"] | of_globals
    groups["observed_data"] = observed
    groups["constant_data"] = constant_data(guide.model, rows.data, observed)
    if guide.family.has_density:
        alone = len(observed) == 1 and not guide.segments
        found = rowwise.apply(
            quantities.evidence, rows, rng_key, globals_, particles=num_particles, **sizes
        )
        name = next(iter(observed)) if alone else "joint"
        groups["log_likelihood"] = {name: found["log_evidence"]}
    by_row = {name for group in groups.values() for name in group} - set(of_globals)
    return groups, rows_first(site_dims(guide.sites), by_row, plates)


def site_dims(sites: ModelSites) -> dict[str, list[str]]:
    """Return by site the names of its plates as dimensions, outermost first.

    Dimensions of the event get ArviZ's own names, ``<site>_dim_0`` and so on.
    """
    found = {}
    for site in sites.sites.values():
        by_dim = {sites.plates[name].dim: name for name in site.plates}
        batch = range(-len(site.batch_shape), 0)
        found[site.name] = [by_dim.get(dim, f"{site.name}_batch_{-dim}") for dim in batch]
    for name, plates in sites.deterministic.items():
        found[name] = sorted(plates, key=lambda plate: sites.plates[plate].dim)
    return found


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
    signature = inspect.signature(model)
    args, kwargs = data.whole()
    axes, kw_axes = data.layout.whole(data.layout.axes)
    bound = signature.bind_partial(*args, **kwargs).arguments
    bound_axes = signature.bind_partial(*axes, **kw_axes).arguments
    return {
        name: np.moveaxis(np.asarray(value), bound_axes[name], 0)
        for name, value in bound.items()
        if isinstance(value, jax.Array)
        and isinstance(bound_axes.get(name), int)
        and not any(np.array_equal(value, seen) for seen in observed.values())
    }


def build_datatree(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, list[str]],
    coords: Mapping[str, Any] | None = None,
) -> DataTree:
    """Return arrays as a DataTree in ArviZ's schema.

    Args:
        groups: by group and variable; in the sampled groups the draws are the leading axis, and
            become the dimensions ``chain`` and ``draw``.
        dims: by variable, the names of its leading dimensions but these.
        coords: coordinates by dimension.

    Raises:
        ValueError: if a coordinate has another length than its dimension.
    """
    import arviz as az
    from xarray import DataTree

    found = {}
    for group, variables in groups.items():
        if not variables:
            continue
        sampled = group in SAMPLED
        values = {name: value[None] if sampled else value for name, value in variables.items()}
        # A log-likelihood has no event, so that its variable has fewer dimensions than its site.
        known = {name: list(dims[name])[: np.ndim(variables[name]) - sampled] for name in values}
        tree = az.from_dict({group: values}, dims=known, coords=dict(coords or {}))
        found[group] = tree[group].to_dataset()
    return DataTree.from_dict(found)
