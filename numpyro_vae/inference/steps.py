"""A natural-gradient step of Normals, one of each row, towards the largest ELBOs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float

from numpyro_vae.families.base import Normal
from numpyro_vae.families.multivariate_normal import lower_root
from numpyro_vae.guides.even_points import even_points

POINTS = 32  # at which the density is looked at, or two for each latent if those are more
FURTHEST = 2.0  # that a step moves, in standard deviations along each latent, root mean square
WIDEST = 4.0  # times that a step multiplies or divides a variance by, at most
WIDENED = 0.01  # nats that a Normal which does not fit is widened by, at most

Mask = Bool[Array, "batch size"] | None  # which latents the model counts; None if all


class Measured(NamedTuple):
    """A Normal of each row, and what the density is like there; in its own standard deviations.

    Attributes:
        normal: its mean, and the Cholesky factor of its covariance.
        elbo: of the row, but for a constant.
        slope: the mean of the gradients of the log density.
        bend: minus the mean of its second derivatives, which is 1 where the Normal is right.
        misfit: the variance of the log weights of the points, about twice the nats that the Normal
            loses; 0 where it is right.
    """

    normal: Normal
    elbo: Float[Array, "batch"]
    slope: Float[Array, "batch size"]
    bend: Float[Array, "batch size size"]
    misfit: Float[Array, "batch"]


def even_noise(size: int, dtype: jnp.dtype) -> Float[Array, "points size"]:
    """Return points with the mean, and the covariance, of standard Normal noise."""
    half = max(POINTS // 2, size)
    noise = ndtri(even_points(jax.random.key(0), half, size))
    left, _, right = jnp.linalg.svd(noise, full_matrices=False)
    noise = jnp.sqrt(half) * left @ right
    return jnp.concatenate([noise, -noise]).astype(dtype)


def unseen(normal: Normal) -> Measured:
    """Return Normals of which nothing is known, so that any measure of them is better."""
    loc, tril = normal
    zeros, eye = jnp.zeros_like(loc[:, 0]), jnp.eye(loc.shape[-1], dtype=loc.dtype)
    bend = jnp.broadcast_to(eye, tril.shape)
    return Measured(normal, zeros - jnp.inf, jnp.zeros_like(loc), bend, zeros)


def measure(
    by_points: Callable[[Callable[..., Array], Array], tuple[Array, Array]],
    points: Float[Array, "points size"],
    mask: Mask,
    normal: Normal,
) -> Measured:
    """Return what the density is like under a Normal of each row.

    Args:
        by_points: returns of a function, from a point of the noise to one of each row, the log
            densities of the rows there, and their gradients, with the points of the noise in front.
        points: of the noise.
        mask: which latents count.
        normal: where to look.
    """
    loc, tril = normal
    by_row, gradients = by_points(lambda point: loc + tril @ point, points)
    slopes = jnp.einsum("bji,pbj->pbi", tril, gradients)
    log_det = jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)).sum(-1)
    bend = -jnp.einsum("pbi,pj->bij", slopes, points) / len(points)
    bend, counts = (bend + bend.mT) / 2, jnp.ones_like(loc)
    if mask is not None:
        pairs, counts = mask[:, :, None] & mask[:, None, :], mask.astype(loc.dtype)
        bend = jnp.where(pairs, bend, jnp.eye(loc.shape[-1], dtype=loc.dtype))
    misfit = jnp.var(by_row + jnp.square(points) @ counts.T / 2, axis=0)
    return Measured(normal, by_row.mean(0) + log_det, slopes.mean(0), bend, misfit)


def move(at: Measured, rate: Float[Array, "batch"]) -> Normal:
    """Return the Normal one step further."""
    loc, tril = at.normal
    eye = jnp.eye(loc.shape[-1], dtype=loc.dtype)
    precision, axes = jnp.linalg.eigh(eye + rate[:, None, None] * (at.bend - eye))
    precision = jnp.clip(precision, 1 / WIDEST, WIDEST)
    wider = axes / jnp.sqrt(precision)[:, None, :]  # a root of the covariance
    step = rate[:, None] * jnp.einsum("bij,bkj,bk->bi", wider, wider, at.slope)
    length = jnp.sqrt(jnp.square(step).mean(-1, keepdims=True))
    step = step * jnp.minimum(1.0, FURTHEST / jnp.maximum(length, 1e-30))
    return loc + jnp.einsum("bij,bj->bi", tril, step), lower_root(tril @ wider)


def widened(at: Measured, mask: Mask) -> Normal:
    """Return the Normal with its variances multiplied, whose ELBO falls by about `WIDENED`."""
    loc, tril = at.normal
    lost = jnp.nan_to_num(jnp.minimum(at.misfit, WIDENED))
    factor = jnp.sqrt(1 + 2 * jnp.sqrt(lost / loc.shape[-1]))[:, None, None]
    return loc, tril * (factor if mask is None else jnp.where(mask[:, :, None], factor, 1.0))


def choose(gained: Bool[Array, "batch"], new: Array, old: Array) -> Array:
    """Return what is new in rows that have gained by it."""
    return jnp.where(gained.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def apart(normal: Normal, mask: Mask) -> Normal:
    """Return Normals in which latents that the model masks, and stay, vary by themselves."""
    if mask is None:
        return normal
    loc, tril = normal
    parts = [jnp.where(there[..., None], tril, 0.0) for there in (mask, ~mask)]
    return loc, lower_root(jnp.concatenate(parts, axis=-1))
