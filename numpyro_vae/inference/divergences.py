"""How far the guide of each datum is from its prior, by latent dimension."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import biject_to, kl_divergence
from numpyro.distributions.util import sum_rightmost

from numpyro_vae.guides.abstract import AbstractEncoding
from numpyro_vae.model.sites import Site
from numpyro_vae.model.stacked import Stacked, peeled
from numpyro_vae.model.trace import is_real, mask_of
from numpyro_vae.scales.log_scale_normal import LogScaleNormal


class Divergences(NamedTuple):
    """How far guides are from their priors.

    Attributes:
        by_site: of each local site ``(batch, *datum_shape)``, or ``(batch,)`` as a whole. NaN where
            the model masks a single value, which is then no latent of the datum.
        correlation: what these leave out of the divergence of all sites together, as the guide
            draws latents jointly; None if it draws each by itself, or all count as one.
    """

    by_site: dict[str, Float[Array, "batch ..."]]
    correlation: Float[Array, "batch"] | None


def row_divergences(
    encoding: AbstractEncoding, packed: Float[Array, "batch size"], trace: dict[str, Any]
) -> Divergences:
    """Estimate the divergence of each datum's guide from its prior, by latent dimension.

    Guide and prior are taken as they are given the other latents of the draw. Where the guide's
    marginals are Normals and the prior is a product of a form whose divergence is known, that
    divergence is used; elsewhere the estimate is ``log q - log p`` of the draw, by dimension if the
    prior is a product, else for the site as a whole, or for all sites that a family without known
    marginals serves together.

    Args:
        encoding: what the guide says of the batch.
        packed: a draw from it.
        trace: of the model with this draw.
    """
    if not encoding.has_marginals(packed):
        log_q = encoding.log_prob(packed)
        log_p = sum(
            _log_prior(site, draw, trace, encoding) for site, draw in encoding.unpack(packed)
        )
        return Divergences({"_".join(x.name for x in encoding.sites): log_q - log_p}, None)
    loc = encoding.marginal(lambda fn: fn.mean, packed)
    log_scale = encoding.marginal(_log_scale, packed)
    parts = zip(*map(encoding.unpack, (loc, log_scale, packed)), strict=True)
    found, apart = {}, jnp.zeros(len(packed))
    for (site, loc), (_, log_scale), (_, draw) in parts:
        q = LogScaleNormal(loc, log_scale)
        found[site.name], log_q = _of_site(site, q, draw, packed, trace, encoding)
        apart += log_q
    correlation = None if encoding.is_factorized else encoding.log_prob(packed) - apart
    return Divergences(found, correlation)


def _log_scale(fn: Any) -> Array:
    return fn.log_scale if isinstance(fn, LogScaleNormal) else jnp.log(fn.variance) / 2


def _of_site(
    site: Site,
    q: LogScaleNormal,
    draw: Array,
    packed: Array,
    trace: dict[str, Any],
    encoding: AbstractEncoding,
) -> tuple[Float[Array, "batch ..."], Float[Array, "batch"]]:
    """Return the divergence of a site, and the log density of the guide that it is made of."""
    prior, axis = trace[site.name]["fn"], site.axis(encoding.run.plate)
    found = _by_dimension(q, draw, prior)
    if found is None:
        log_q = encoding.log_prob_of(site.name, packed)
        return log_q - _log_prior(site, draw, trace, encoding), log_q
    log_q, mask = q.log_prob(draw), mask_of(prior)
    if mask is not None:
        log_q = jnp.where(_spread(mask, log_q), log_q, 0.0)
    rows = jnp.moveaxis(log_q, axis, 0)
    return jnp.moveaxis(found, axis, 0), rows.reshape(rows.shape[0], -1).sum(-1)


def _log_prior(
    site: Site, draw: Array, trace: dict[str, Any], encoding: AbstractEncoding
) -> Float[Array, "batch"]:
    """Return the log prior density of each datum's unconstrained values."""
    prior = trace[site.name]["fn"]
    transform, mask = biject_to(peeled(prior.support)[0]), mask_of(prior)
    value = transform(draw)
    log_det = transform.log_abs_det_jacobian(draw, value)
    if mask is not None:
        log_det = jnp.where(_spread(mask, log_det), log_det, 0.0)
    log_p = prior.log_prob(value)
    log_p = log_p + sum_rightmost(log_det, log_det.ndim - log_p.ndim)
    rows = jnp.moveaxis(log_p, site.axis(encoding.run.plate), 0)
    return rows.reshape(rows.shape[0], -1).sum(-1)


def _spread(mask: Array, like: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _by_dimension(q: LogScaleNormal, draw: Array, prior: Any) -> Array | None:
    """Return the divergence of each value, NaN of a masked one; None if the prior is no product."""
    mask = mask_of(prior)
    if isinstance(prior, Stacked):
        found = prior.over_sets(_of_set, (q.loc, q.log_scale, draw))
    else:
        found = _of_values(q, draw, prior)
    if found is None or mask is None:
        return found
    return jnp.where(_spread(mask, found), found, jnp.nan)


def _of_set(prior: Any, given: tuple[Array, Array, Array]) -> Array | None:
    """Return what `_by_dimension` does of one data set, from loc, log-scale and draw."""
    loc, log_scale, draw = given
    return _by_dimension(LogScaleNormal(loc, log_scale), draw, prior)


def _of_values(q: LogScaleNormal, draw: Array, prior: Any) -> Array | None:
    """Return the divergence of each value, in closed form or of the draw; None of no product."""
    support = peeled(prior.support)[0]
    while isinstance(prior, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        prior = prior.base_dist
    if prior.event_dim or support.event_dim:
        return None
    if is_real(support):
        with suppress(NotImplementedError):
            return jnp.broadcast_to(kl_divergence(q, prior), q.batch_shape)
    transform = biject_to(support)
    value = transform(draw)
    log_p = prior.log_prob(value) + transform.log_abs_det_jacobian(draw, value)
    return q.log_prob(draw) - log_p
