"""Log-densities, and predictions, of each datum of a batch, for one draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_vae.data.ragged import Segments
from numpyro_vae.model.enumeration import Enumeration
from numpyro_vae.model.run import Run
from numpyro_vae.numpyro_internals import declared_scale, was_observed

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


def level_densities(
    trace: dict[str, Any], run: Run, enumeration: Enumeration, *, observed: bool = True
) -> list[Float[Array, "batch ..."]]:
    """Return each datum's log joint density given the global sites, or its prior's part.

    All sites of the plate count, and so do the observed sites of the plates that hold the data's
    observations. What the model scales is scaled; the weight of a minibatch does not count.

    Args:
        trace: of the model on the batch.
        run: the run of the model that the guide has read.
        enumeration: of the sites that are summed over.
        observed: whether what is observed counts.

    Returns:
        By level of the enumeration ``(batch, *elements)``: the sites that belong to it, summed over
        all but the plate and the elements.
    """
    at: list[list[dict]] = [[] for _ in enumeration.levels]
    for name, site in trace.items():
        if site["type"] == "sample" and (observed or not _is_data(site, run)):
            at[enumeration.places.get(name, 0)].append(site)
    dims = ([plate.dim for plate in level.plates] for level in enumeration.levels)
    inner = [
        sum(_by_entry(site, (run.plate.dim, *kept)) for site in sites)
        for sites, kept in zip(at, dims, strict=True)
        if kept
    ]
    return [_sum_by_row(at[0], run), *map(jnp.asarray, inner)]


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
    log_prob, scale = site["fn"].log_prob(site["value"]), declared_scale(site)
    return jnp.asarray(log_prob if scale is None else scale * log_prob)


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
