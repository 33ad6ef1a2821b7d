"""Log-densities, and predictions, of each datum of a batch, for one draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_vae.data.ragged import Segments
from numpyro_vae.model.enumeration import Enumeration
from numpyro_vae.model.run import Run
from numpyro_vae.model.trace import is_enumerated, is_point
from numpyro_vae.numpyro_internals import declared_scale, is_switched_off, was_observed

Model = Callable[..., Any]


def trace_rows(
    model: Model,
    values: dict[str, Any],
    rows: Messenger,
    rng_key: Array,
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the trace of a model on rows of data, with values for its sites and parameters.

    Args:
        model: a NumPyro model.
        values: of its latent sites, parameters and mutable state.
        rows: the handler that says which rows the plate holds.
        rng_key: for what is not given.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """
    model = handlers.substitute(model, data=values)
    with handlers.block(), rows, handlers.seed(rng_seed=rng_key):
        return handlers.trace(model).get_trace(*args, **kwargs)


def without_drawn(trace: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trace without the latents that have just been drawn from the model.

    A guide does not know those that the model has in this call alone, such as a forecast. Drawn
    from the model, they have its density as their proposal too, and in a weight the two cancel.

    Args:
        trace: of the model.
        given: values of the other latents, by name.
    """
    return {
        name: site
        for name, site in trace.items()
        if name in given or site.get("is_observed", True) or is_point(site["fn"])
    }


class Densities(NamedTuple):
    """The log-densities of each datum, apart where they depend on what is summed over.

    Attributes:
        rest: of the sites that do not, as the model scales them, ``(batch,)``.
        by_level: of those that do, by level of the enumeration ``(batch, *elements)``.
        factor: by which the model scales all of those, and which their sum is to be multiplied
            with, as `numpyro.infer.TraceEnum_ELBO` does; None if they are scaled apart.
    """

    rest: Float[Array, "batch"]
    by_level: list[Float[Array, "batch ..."]]
    factor: float | None


def level_densities(
    trace: dict[str, Any], run: Run, enumeration: Enumeration, *, observed: bool = True
) -> Densities:
    """Return each datum's log joint density given the global sites, or its prior's part.

    All sites of the plate count, and so do the observed sites of the plates that hold the data's
    observations; the weight of a minibatch does not.

    Args:
        trace: of the model on the batch.
        run: the run of the model that the guide has read.
        enumeration: of the sites that are summed over.
        observed: whether what is observed counts.
    """
    rest = {name: site for name, site in trace.items() if site["type"] == "sample"}
    if not observed:
        rest = {name: site for name, site in rest.items() if not _is_data(site, run)}
    summed = {name: rest.pop(name) for name in enumeration.places if name in rest}
    factor = _common_scale(summed.values())
    if factor is not None:
        summed = {name: {**site, "plate_to_scale": {}} for name, site in summed.items()}
    by_level = []
    for place, level in enumerate(enumeration.levels):
        mine = [site for name, site in summed.items() if enumeration.places[name] == place]
        dims = (run.plate.dim, *(plate.dim for plate in level.plates))
        inner = [_by_entry(site, dims) for site in mine] if place else [_sum_by_row(mine, run)]
        by_level.append(jnp.asarray(sum(inner)))
    return Densities(_sum_by_row(rest.values(), run), by_level, factor)


def _common_scale(sites: Iterable[dict]) -> float | None:
    """Return the factor by which the model scales all of some sites; None if it is no number."""
    scales = [declared_scale(site) for site in sites]
    if any(isinstance(scale, jax.Array) or np.ndim(scale) for scale in scales):
        return None
    found = {1.0 if scale is None else float(scale) for scale in scales}
    return next(iter(found), 1.0) if len(found) < 2 else None


def observed_densities(trace: dict[str, Any], run: Run) -> Float[Array, "batch"]:
    """Return each datum's log-likelihood given all latent sites, of what is observed or drawn anew.

    Args:
        trace: of the model on the batch, with the data or without.
        run: the run of the model that the guide has read.
    """
    sites = (site for site in trace.values() if site["type"] == "sample")
    return _sum_by_row((site for site in sites if _is_data(site, run)), run)


def _is_data(site: dict, run: Run) -> bool:
    return was_observed(site) and not run.sites.is_computed(site["name"])


def _sum_by_row(sites: Iterable[dict], run: Run) -> Float[Array, "batch"]:
    """Add up the log-densities of sites for each datum."""
    total = jnp.zeros(run.plate.length)
    for site in sites:
        name, dim = _rows_of(site, run)
        if name == run.plate.name:
            total += _by_row(site, dim)
        elif name is not None:
            elements = _by_row(site, dim)
            total += Segments(elements, run.groups[name], run.plate.length).sum(elements)
    return total


def density_outside(trace: dict[str, Any], run: Run) -> Float[Array, ""]:
    """Return the log-density of all sites that belong to no datum, the global latents among them.

    With `row_densities` of all data it adds up to the model's log joint density.

    Args:
        trace: of the model on all data, with values for all latent sites.
        run: the run of the model that the guide has read.
    """
    sites = (site for site in trace.values() if site["type"] == "sample")
    outside = [_scaled(site).sum() for site in sites if _rows_of(site, run)[0] is None]
    return sum(outside, jnp.zeros(()))


def _rows_of(site: dict, run: Run) -> tuple[str | None, int]:
    """Return the plate with the data that a site belongs to and its dim; None if it has none."""
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    plates = (run.plate.name, *(run.groups if was_observed(site) else ()))
    return next(((name, dims[name]) for name in plates if name in dims), (None, 0))


def log_prob_of(site: dict) -> Array:
    """Return the log-density of a site's value, with what its distribution keeps of the draw."""
    return jnp.asarray(site["fn"].log_prob(site["value"], *filter(None, [site["intermediates"]])))


def _scaled(site: dict) -> Array:
    """Return a site's log-density as the model scales it."""
    fn = _unmasked(site["fn"]) if is_enumerated(site) else site["fn"]
    log_prob, scale = fn.log_prob(site["value"]), declared_scale(site)
    return jnp.asarray(log_prob if scale is None else scale * log_prob)


def _unmasked(fn: Any) -> Any:
    """Return a distribution without its mask, which does not keep a value from being summed over.

    So does `numpyro.infer.TraceEnum_ELBO`; all values would have probability 1. So they have where
    the site is switched off as a whole, and scored elsewhere.
    """
    if is_switched_off(fn):
        return fn
    batch_shape = fn.batch_shape
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn.expand(batch_shape)


def _by_row(site: dict, dim: int) -> Float[Array, "rows"]:
    """Return a site's log-density, summed over all but one dimension."""
    return _by_entry(site, (dim,))


def _by_entry(site: dict, dims: tuple[int, ...]) -> Float[Array, "..."]:
    """Return a site's log-density, summed over all but some dimensions."""
    log_prob = jnp.moveaxis(_scaled(site), dims, range(len(dims)))
    return log_prob.reshape(*log_prob.shape[: len(dims)], -1).sum(-1)


def predicted_rows(trace: dict[str, Any], run: Run) -> dict[str, Array]:
    """Return what the model, run on a batch without its data, has drawn for them.

    Args:
        trace: of the model under `redraw`; what it could not draw is left out.
        run: the run of the model that the guide has read.

    Returns:
        Observed sites by name: the plate's axis in front, or that of the plate which holds the
        data's observations.
    """
    plates = (run.plate.name, *run.groups)
    found = {}
    for name, site in trace.items():
        if site["type"] != "sample" or not was_observed(site) or run.sites.is_computed(name):
            continue
        dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
        plate = next((plate for plate in plates if plate in dims), None)
        if site["is_observed"] or not jnp.size(site["value"]):
            continue  # what cannot be drawn, or a numpyro.factor
        if plate:
            found[name] = drawn_rows(site, dims[plate])
    return found


def drawn_rows(site: dict[str, Any], dim: int) -> Array:
    """Return what was drawn of a site, with the plate of a dimension in front."""
    fn, value = site["fn"], site["value"]
    # Of an interval, which is an event of two values, a point is drawn.
    event_dim = min(fn.event_dim, jnp.ndim(value) - len(fn.batch_shape))
    return jnp.moveaxis(value, dim - event_dim, 0)
