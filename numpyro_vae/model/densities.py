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
from numpyro_vae.numpyro_internals import was_observed

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
    the plates that hold the data's observations; the weight of a minibatch does not.

    Args:
        trace: of the model on the batch.
        run: the run of the model that the guide has read.
    """
    return _sum_by_row((site for site in trace.values() if site["type"] == "sample"), run)


def observed_densities(trace: dict[str, Any], run: Run) -> Float[Array, "batch"]:
    """Return each datum's log-likelihood given all latent sites, of what is observed or drawn anew.

    Args:
        trace: of the model on the batch, under ``handlers.uncondition`` or not.
        run: the run of the model that the guide has read.
    """
    sites = (site for site in trace.values() if site["type"] == "sample")
    return _sum_by_row((site for site in sites if was_observed(site)), run)


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
    """Return a site's log-density, summed over all but one of its dimensions."""
    log_prob = jnp.moveaxis(site["fn"].log_prob(site["value"]), dim, 0)
    return log_prob.reshape(log_prob.shape[0], -1).sum(-1)


def predicted_rows(trace: dict[str, Any], run: Run) -> dict[str, Array]:
    """Return what the model, run on a batch without its data, has drawn for them.

    Args:
        trace: of the model under `redraw`; what it could not draw is left out.
        run: the run of the model that the guide has read.

    Returns:
        Observed and deterministic sites by name: the plate's axis in front, or that of the plate
        which holds the data's observations.
    """
    plates = (run.plate.name, *run.groups)
    found = {}
    for name, site in trace.items():
        observed = site["type"] == "sample" and was_observed(site)
        dims = {frame.name: frame.dim for frame in site.get("cond_indep_stack", ())}
        plate = next((plate for plate in plates if plate in dims), None)
        if observed and (site["is_observed"] or not jnp.size(site["value"])):
            continue  # what cannot be drawn, or a numpyro.factor
        if plate and (observed or site["type"] == "deterministic"):
            event_dim = site["fn"].event_dim if observed else _event_dim(site)
            found[name] = jnp.moveaxis(site["value"], dims[plate] - event_dim, 0)
    return found


def _event_dim(site: dict) -> int:
    """Guess a deterministic site's event dimensions: all that its plates do not account for."""
    batch_dim = max(-frame.dim for frame in site["cond_indep_stack"])
    return max(jnp.ndim(site["value"]) - batch_dim, 0)
