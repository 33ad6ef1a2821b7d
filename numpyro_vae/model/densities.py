"""Log-densities, and predictions, of each datum of a batch, for one draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_vae.data.ragged import Segments
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


def row_densities(trace: dict[str, Any], run: Run) -> Float[Array, "batch"]:
    """Return each datum's log joint density given the global sites.

    All sites of the plate count, summed over all but the plate, and so do the observed sites of
    the plates that hold the data's observations. What the model scales is scaled; the weight of a
    minibatch does not count.

    Args:
        trace: of the model on the batch.
        run: the run of the model that the guide has read.
    """
    return _sum_by_row((site for site in trace.values() if site["type"] == "sample"), run)


def observed_densities(trace: dict[str, Any], run: Run) -> Float[Array, "batch"]:
    """Return each datum's log-likelihood given all latent sites, of what is observed or drawn anew.

    Args:
        trace: of the model on the batch, with the data or without.
        run: the run of the model that the guide has read.
    """
    sites = (site for site in trace.values() if site["type"] == "sample" and was_observed(site))
    return _sum_by_row((site for site in sites if not run.sites.is_computed(site["name"])), run)


def _sum_by_row(sites: Iterable[dict], run: Run) -> Float[Array, "batch"]:
    """Add up the log-densities of sites for each datum."""
    total = jnp.zeros(run.plate.length)
    for site in sites:
        dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
        if run.plate.name in dims:
            total += _by_row(site, dims[run.plate.name])
            continue
        name = next((name for name in run.groups if name in dims), None)
        if was_observed(site) and name is not None:
            elements = _by_row(site, dims[name])
            total += Segments(elements, run.groups[name], run.plate.length).sum(elements)
    return total


def _by_row(site: dict, dim: int) -> Float[Array, "rows"]:
    """Return a site's log-density as the model scales it, summed over all but one dimension."""
    log_prob, scale = site["fn"].log_prob(site["value"]), declared_scale(site)
    if scale is not None:
        log_prob = scale * log_prob
    log_prob = jnp.moveaxis(log_prob, dim, 0)
    return log_prob.reshape(log_prob.shape[0], -1).sum(-1)


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
            found[name] = jnp.moveaxis(site["value"], dims[plate] - site["fn"].event_dim, 0)
    return found
