"""Log-densities, and predictions, of each datum of a batch, draw by draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import biject_to, kl_divergence
from numpyro.distributions.util import sum_rightmost
from numpyro.primitives import Messenger

from numpyro_vae.distributions import LogScaleNormal
from numpyro_vae.encoding import Encoding
from numpyro_vae.sites import is_real

Model = Callable[..., Any]


def _trace(model: Model, rows: Messenger, rng_key: Array, args: tuple, kwargs: dict) -> dict:
    with handlers.block(), rows, handlers.seed(rng_seed=rng_key):
        return handlers.trace(model).get_trace(*args, **kwargs)


def row_densities(
    model: Model,
    values: dict[str, Any],
    plate: str,
    rows: Messenger,
    rng_key: Array,
    args: tuple,
    kwargs: dict,
) -> Float[Array, "batch"]:
    """Return each datum's log joint density given the global sites.

    All sites of the plate count, summed over all but the plate; the weight that a minibatch gives
    them does not.

    Args:
        model: a NumPyro model.
        values: of its latent sites, parameters and mutable state.
        plate: the local plate.
        rows: the handler that says which rows the plate holds.
        rng_key: for what is not given.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """
    model = handlers.substitute(model, data=values)
    total = jnp.zeros(())
    for site in _trace(model, rows, rng_key, args, kwargs).values():
        dims = {frame.name: frame.dim for frame in site.get("cond_indep_stack", ())}
        if site["type"] == "sample" and plate in dims:
            log_prob = jnp.moveaxis(site["fn"].log_prob(site["value"]), dims[plate], 0)
            total = total + log_prob.reshape(log_prob.shape[0], -1).sum(-1)
    return total


def predict_rows(
    model: Model,
    values: dict[str, Any],
    plate: str,
    rows: Messenger,
    rng_key: Array,
    args: tuple,
    kwargs: dict,
) -> dict[str, Array]:
    """Draw the observed sites anew, and return them with the deterministic sites of the plate.

    The arguments are those of `row_densities`.

    Returns:
        Values by site name, the plate's axis in front.
    """
    model = handlers.substitute(handlers.uncondition(model), data=values)
    found = {}
    for name, site in _trace(model, rows, rng_key, args, kwargs).items():
        observed = site["type"] == "sample" and site["infer"].get("was_observed", False)
        dims = {frame.name: frame.dim for frame in site.get("cond_indep_stack", ())}
        if plate in dims and (observed or site["type"] == "deterministic"):
            event_dim = site["fn"].event_dim if observed else _event_dim(site)
            found[name] = jnp.moveaxis(site["value"], dims[plate] - event_dim, 0)
    return found


def _event_dim(site: dict) -> int:
    """Guess a deterministic site's event dimensions: all that its plates do not account for."""
    batch_dim = max(-frame.dim for frame in site["cond_indep_stack"])
    return max(jnp.ndim(site["value"]) - batch_dim, 0)


def row_divergences(
    model: Model,
    encoding: Encoding,
    packed: Float[Array, "batch size"],
    values: dict[str, Any],
    rows: Messenger,
    rng_key: Array,
    args: tuple,
    kwargs: dict,
) -> dict[str, Float[Array, "batch ..."]]:
    """Estimate the divergence of each datum's guide from its prior, by latent dimension.

    The prior is taken as it is given the other latents of the draw. Where it is a product over
    dimensions of a form whose divergence is known, that divergence is used; elsewhere the
    estimate is ``log q - log p`` of the draw, for the site as a whole.

    Args:
        model: a NumPyro model.
        encoding: what the guide says of the batch.
        packed: a draw from it.
        values: of the model's parameters and latent sites, those of the draw among them.
        rows: the handler that says which rows the plate holds.
        rng_key: for what is not given.
        args: the model's arguments.
        kwargs: its keyword arguments.

    Returns:
        For each local site ``(batch, *datum_shape)``, or ``(batch,)`` for the site as a whole.
    """
    model = handlers.substitute(model, data=values)
    trace = _trace(model, rows, rng_key, args, kwargs)
    plate, normal = encoding.run.plate, encoding.normal
    parts = zip(*map(encoding.unpack, (normal.loc, normal.log_scale, packed)), strict=True)
    found = {}
    for (site, loc), (_, log_scale), (_, draw) in parts:
        fn, q = trace[site.name]["fn"], LogScaleNormal(loc, log_scale)
        by_dimension = _divergence_by_dimension(q, fn)
        if by_dimension is not None:
            found[site.name] = jnp.moveaxis(by_dimension, site.axis(plate), 0)
            continue
        transform = biject_to(fn.support)
        value = transform(draw)
        log_det = transform.log_abs_det_jacobian(draw, value)
        log_p = fn.log_prob(value) + sum_rightmost(log_det, log_det.ndim - len(fn.batch_shape))
        log_q = q.log_prob(draw)
        ratio = sum_rightmost(log_q, log_q.ndim - len(fn.batch_shape)) - log_p
        ratio = jnp.moveaxis(ratio, site.axis(plate), 0)
        found[site.name] = ratio.reshape(ratio.shape[0], -1).sum(-1)
    return found


def _divergence_by_dimension(q: dist.Distribution, prior: dist.Distribution) -> Array | None:
    """Return the elementwise KL divergence, or None if the prior is no product of known form."""
    if not is_real(prior.support):
        return None
    while isinstance(prior, dist.Independent | dist.ExpandedDistribution):
        prior = prior.base_dist
    if prior.event_dim:
        return None
    try:
        return jnp.broadcast_to(kl_divergence(q, prior), q.batch_shape)
    except NotImplementedError:
        return None
