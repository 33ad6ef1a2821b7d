"""What a DataTree has of rows: decided once for all rows, computed of any of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.inference import quantities
from numpyro_vae.inference.derived import derive_whole, derived_sites
from numpyro_vae.inference.faults import Faults
from numpyro_vae.inference.global_weights import draw_whole
from numpyro_vae.inference.marginal import redraw
from numpyro_vae.inference.predictable import names_of, undrawn_sites, warn_of_undrawn
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.deterministic import Derived
from numpyro_vae.model.simulate import equal_to
from numpyro_vae.model.sites import ModelSites

OF_OBSERVATIONS = ("log_likelihood", "sample_stats", "observed_data")

Variables = dict[str, np.ndarray]
Groups = dict[str, Variables]


@dataclass(frozen=True)
class Gathering:
    """What is wanted of some rows, by group and variable, and how it is computed.

    Attributes:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        num_samples: draws of each row.
        num_particles: local draws for each log-likelihood.
        marginal: whether predictions are of local latents from their prior.
        groups: those wanted.
        names: the latent and deterministic sites that are wanted.
        draw: the quantity that draws the groups of each row.
        globals_: draws of the global sites.
        densities: the log-densities of each of them, where they are all that is drawn.
        derived: how the deterministic sites are computed that are wanted.
        faults: what is wrong with rows that were computed.
    """

    runner: Runner
    rows: Rows
    rng_key: Array
    num_samples: int
    num_particles: int
    marginal: bool
    groups: tuple[str, ...]
    names: frozenset[str]
    draw: Callable[..., Any]
    globals_: dict[str, Any]
    densities: Variables
    derived: Derived
    faults: Faults

    @classmethod
    def plan(
        cls,
        runner: Runner,
        rows: Rows,
        rng_key: Array,
        num_samples: int,
        *,
        num_particles: int,
        marginal: bool,
        groups: tuple[str, ...],
        names: Sequence[str],
        given: dict[str, Any] | None = None,
    ) -> Gathering:
        """Decide on what is computed.

        The arguments are attributes of `Gathering`, and ``given`` draws of the global sites for
        which the rows' latents are resampled, if any.
        """
        if rows.is_unobserved:
            groups = tuple(name for name in groups if name not in OF_OBSERVATIONS)
        draw = quantities.draws if given is None else partial(redraw, particles=num_particles)
        globals_, densities = _globals(runner, rows, rng_key, num_samples, groups, given)
        derived = derived_sites(runner, rows)
        wanted = set(names) if "posterior" in groups else set()
        derived = replace(
            derived,
            by_row={name: axis for name, axis in derived.by_row.items() if name in wanted},
            of_all=tuple(name for name in derived.of_all if name in wanted),
            of_globals=tuple(name for name in derived.of_globals if name in wanted),
        )
        sizes = (num_samples, num_particles, marginal, groups, frozenset(names))
        return cls(runner, rows, rng_key, *sizes, draw, globals_, densities, derived, Faults(rows))

    @cached_property
    def observes(self) -> dict[str, str]:
        """By argument of the model that is an observed site as it stands, the site."""
        return observed_arguments(self.runner, self.rows)

    # -- of rows ----------------------------------------------------------------------------------

    def of_rows(self, rows: Rows) -> Groups:
        """Return by group the variables with a value for each of the rows; no globals."""
        guide, runner = self.runner.guide, self.runner
        observed = runner.per_batch(quantities.observed, rows)
        found = {"observed_data": observed, **self._draws(rows)}
        if "constant_data" in self.groups:
            found["constant_data"] = self._constant_data(rows)
        if (guide.has_density or not guide.local_sites) and "log_likelihood" in self.groups:
            alone = len(observed) == 1 and not guide.segments
            name = next(iter(observed)) if alone else "joint"
            found["log_likelihood"] = {name: self._log_likelihood(rows)}
        return {group: found[group] for group in self.groups if group in found}

    def _run(self, quantity: Callable[..., Any], rows: Rows, **options: Any) -> Any:
        key, number = self.rng_key, self.num_samples
        run = self.runner.watched(self.faults).per_draw
        return run(quantity, rows, key, self.globals_, num_samples=number, **options)

    def _draws(self, rows: Rows) -> Groups:
        """Return the groups that are drawn of rows; of the prior where nothing is observed."""
        predicted, groups = "posterior_predictive", self.groups
        drawn = tuple(name for name in groups if not (self.marginal and name == predicted))
        found: Groups = {}
        if set(drawn) & {"posterior", predicted, "sample_stats"}:
            draw, options = self.draw, {"groups": drawn}
            if rows.is_unobserved:
                draw, options = quantities.imagine, names_of(self.runner)
            by_row = tuple(self.derived.by_row.items())
            found |= self._run(draw, rows, **options, derived=by_row, observed=True)
            self.faults.look_at(rows, found)
        if self.marginal and predicted in groups:
            found[predicted] = self._run(quantities.replicate, rows, observed=True)
        return found

    def _log_likelihood(self, rows: Rows) -> np.ndarray:
        quantity, options = quantities.likelihood, {}
        if self.runner.guide.local_sites:
            quantity, options = quantities.evidence, {"particles": self.num_particles}
        found = self._run(quantity, rows, **options)["log_evidence"]
        self.faults.look_at_densities(rows, found)
        return found

    def _constant_data(self, rows: Rows) -> Variables:
        """Return the model's batched arguments by name, rows in front, but those it observes."""
        is_all = rows.stored is None and rows.num_chosen == rows.num_rows
        data = rows.by_row or (rows.data if is_all else rows.cut(rows.chosen).data)
        found = batched_arguments(self.runner.guide.model, data)
        return {name: value for name, value in found.items() if name not in self.observes}

    def warn_of_undrawn(self, found: Groups) -> None:
        """Warn of observed sites that are left out of the predictions, as they cannot be drawn."""
        if "posterior_predictive" in self.groups:
            predicted = found["posterior_predictive"]
            warn_of_undrawn(undrawn_sites(self.runner, self.rows, predicted))

    # -- of all rows ------------------------------------------------------------------------------

    def of_all(self, posterior: Mapping[str, np.ndarray]) -> Variables:
        """Return the variables of the posterior without a value for each row.

        Args:
            posterior: draws of the local sites of all rows, for deterministic sites of all of them.
        """
        found = {name: np.asarray(value) for name, value in self.globals_.items()}
        if "posterior" in self.groups:
            key, number = self.rng_key, self.num_samples
            args = (self.derived, self.globals_, self._local(posterior), number)
            found |= derive_whole(self.runner, self.rows, key, *args)
        return found

    def _local(self, draws: Mapping[str, np.ndarray]) -> Variables:
        """Return draws of the local sites with the plate's axis where the model has it."""
        sites, plate = self.runner.guide.sites.sites, self.runner.guide.plate
        names = (name for name in self.runner.local_names if name in draws)
        return {name: np.moveaxis(draws[name], 1, 1 + sites[name].axis(plate)) for name in names}

    def dims(self, found: Groups) -> dict[str, list[str]]:
        """Return by variable its dimensions, of those which go row by row the rows in front."""
        guide = self.runner.guide
        rowwise = {name for variables in found.values() for name in variables}
        plates = (guide.plate.name, *guide.segments)
        dims = rows_first(site_dims(guide.sites), rowwise, plates) | self.derived.dims
        return dims | {name: [] for name in self.densities}

    def complete(self, found: Groups, *, with_all: bool = True) -> Groups:
        """Return the groups that are wanted.

        Args:
            found: by group what has a value for each row.
            with_all: whether what has none goes with it.
        """
        found = dict(found)
        if "posterior" in self.groups:
            posterior = found.get("posterior", {})
            posterior = posterior | (self.of_all(posterior) if with_all else {})
            found["posterior"] = {name: x for name, x in posterior.items() if name in self.names}
        if self.densities and with_all:
            found["sample_stats"] = self.densities
        return {group: found[group] for group in self.groups if group in found}


def _globals(
    runner: Runner,
    rows: Rows,
    rng_key: Array,
    num_samples: int,
    groups: tuple[str, ...],
    given: dict[str, Any] | None,
) -> tuple[dict[str, Any], Variables]:
    """Return draws of the global sites, and their log-densities where they are all there is."""
    guide = runner.guide
    if given is not None:
        return jax.device_put(given), {}
    if "sample_stats" in groups and not (guide.has_density or guide.local_sites):
        return draw_whole(runner, rows, rng_key, num_samples)
    return runner.draw_globals(rng_key, rows, num_samples), {}


def observed_arguments(runner: Runner, rows: Rows) -> dict[str, str]:
    """Return the batched arguments of a model that are an observed site as they stand, and which.

    Of rows that are not in memory some are compared, spread over all.
    """
    if rows.stored is not None:
        spread = np.linspace(0, rows.num_rows - 1, 256).round().astype(int)
        rows = rows.cut(np.unique(spread))
    given = batched_arguments(runner.guide.model, rows.by_row or rows.data)
    names, arrays = list(given), list(given.values())
    return {
        names[number]: site
        for site, seen in runner.per_batch(quantities.observed, rows).items()
        for number in equal_to(seen, arrays, equal_nan=True)
    }


def batched_arguments(model: Callable[..., Any], data: Any) -> Variables:
    """Return the arrays with rows among the model's arguments by name, rows in front.

    One within an argument, such as a dict, is named by its place in it too: ``sizes.group``.
    """
    pairs = zip(data.arrays, data.layout.axes, strict=True)
    with_rows = [None if axis is None else np.moveaxis(np.asarray(x), axis, 0) for x, axis in pairs]
    found = {}
    for name, argument in arguments_by_name(model, *data.layout.whole(with_rows)).items():
        for path, value in jax.tree.leaves_with_path(argument):
            if isinstance(value, np.ndarray):
                place = jax.tree_util.keystr(path, simple=True, separator=".")
                found[f"{name}.{place}" if path else name] = value
    return found


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
