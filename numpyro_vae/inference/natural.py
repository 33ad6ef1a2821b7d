"""Natural-gradient steps, which each row takes from what the network says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp, ndtri
from jaxtyping import Array, Bool, Float

from numpyro_vae.families.base import Normal, full_precision
from numpyro_vae.families.multivariate_normal import lower_root
from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.guides.even_points import even_points
from numpyro_vae.guides.normal_form import joint_normal, of_normal

if TYPE_CHECKING:
    from numpyro_vae.inference.encoded import EncodedBatch

POINTS = 32  # at which the density is looked at, or two for each latent if those are more
FIRST, SHORTER, LONGER = 0.5, 0.3, 2.0  # a row's step; and its factors, after no gain and a gain
MOST = 256  # latents, as a step takes the eigenvalues of a matrix of so many rows
FURTHEST = 1.0  # that a step moves, in standard deviations along each latent, root mean square
WIDENED = 0.01  # nats that a Normal which does not fit is widened by, at most
WIDEST = 4.0  # times that a step multiplies or divides a variance by, at most


class Measured(NamedTuple):
    """A Normal of each row, and what the density is like there; in its own standard deviations.

    Attributes:
        normal: its mean, and the Cholesky factor of its covariance.
        elbo: of the row, but for a constant.
        slope: the mean of the gradients of the log density.
        bend: minus the mean of its second derivatives, which is 1 where the Normal is right.
        misfit: half the variance of the log weights of the points, which is some nats of what the
            Normal loses; 0 where it is right.
    """

    normal: Normal
    elbo: Float[Array, "batch"]
    slope: Float[Array, "batch size"]
    bend: Float[Array, "batch size size"]
    misfit: Float[Array, "batch"]


def sharpen(batch: EncodedBatch, num_steps: int, globals_: Mapping[str, Array]) -> EncodedBatch:
    r"""Let each row's Normal take natural-gradient steps towards the row's largest ELBO.

    A step from :math:`\text{Normal}(\mu, S)` to :math:`\text{Normal}(\mu', S')` is

    .. math::
        S'^{-1} = (1 - \rho)\, S^{-1} - \rho\, \mathbb{E}[\nabla^2 \log p(x, z)], \qquad
        \mu' = \mu + \rho\, S'\, \mathbb{E}[\nabla \log p(x, z)],

    with means over the Normal, for which a fixed set of points stands that has its mean and its
    covariance. Of a posterior that is Normal a step of :math:`\rho = 1` finds it. A row that gains
    nothing by a step stays where it is, and takes a shorter one next.

    What has the largest ELBO has too light tails where the posterior is not Normal: many a k-hat is
    above 0.7 a hundredth of a nat from the evidence. So it is widened a little at the end, by as
    much as costs 0.01 nats, or what it loses anyway if that is less.

    Args:
        batch: what the network says of a batch.
        num_steps: how many steps, each of which takes 32 gradients of the log density or more.
        globals_: draws of the global sites, which take turns at the points.

    Raises:
        ValueError: if the network does not say a Normal of each row.

    Reference:
        Khan and Rue, *The Bayesian Learning Rule*, JMLR 24, 2023; Opper and Archambeau, *The
        Variational Gaussian Approximation Revisited*, Neural Computation 21, 2009. A network, and
        then steps of each row: Kim et al., *Semi-Amortized Variational Autoencoders*, ICML 2018;
        Marino, Yue and Mandt, *Iterative Amortized Inference*, ICML 2018.
    """
    said, start = _normals(batch)
    at = partial(of_normal, said)
    batch = replace(batch, encoding=at(start))
    start = _apart(start, batch.encoding.mask)
    points = _points(start[0].shape[-1], start[0].dtype)
    measure = partial(_measure, batch, points, globals_)

    def step(_: Array, state: tuple[Measured, Array]) -> tuple[Measured, Array]:
        best, rate = state
        moved = measure(_move(best, rate))
        gained = moved.elbo > best.elbo  # not if it is NaN
        kept = jax.tree.map(partial(_choose, gained), moved, best)
        return kept, jnp.where(gained, jnp.minimum(LONGER * rate, 1.0), SHORTER * rate)

    with full_precision():
        first = measure(start), jnp.full(start[0].shape[:1], FIRST, start[0].dtype)
        best, _ = jax.lax.fori_loop(0, num_steps, step, first)
    return replace(batch, encoding=at(_widened(best, batch.encoding.mask)))


def _normals(batch: EncodedBatch) -> tuple[Encoding, Normal]:
    """Return what the network says, and that as a Normal of each row.

    Raises:
        ValueError: if it says none.
    """
    encoding, found = batch.encoding, None
    if isinstance(encoding, Encoding):
        found = joint_normal(encoding)
        if found is not None and found[0].shape[-1] <= MOST:
            return encoding, found
    names = [site.name for site in encoding.sites]
    why = f"{found[0].shape[-1]} values, above {MOST}" if found else "no Normal of all of them"
    raise ValueError(
        f"natural_steps are steps of a Normal of each row, and what {type(batch.guide).__name__} "
        f"says of the sites {names} is {why}. Use AutoAmortizedMultivariateNormal or "
        "AutoAmortizedNormal, without condition_on and dependencies; or leave natural_steps out, "
        "and repair the rows that are flagged."
    )


def _apart(normal: Normal, mask: Bool[Array, "batch size"] | None) -> Normal:
    """Return Normals in which latents that the model masks, and stay, vary by themselves."""
    if mask is None:
        return normal
    loc, tril = normal
    parts = [jnp.where(there[..., None], tril, 0.0) for there in (mask, ~mask)]
    return loc, lower_root(jnp.concatenate(parts, axis=-1))


def _pairs(mask: Bool[Array, "batch size"]) -> Bool[Array, "batch size size"]:
    return mask[:, :, None] & mask[:, None, :]


def _points(size: int, dtype: jnp.dtype) -> Float[Array, "points size"]:
    """Return points with the mean, and the covariance, of standard Normal noise."""
    half = max(POINTS // 2, size)
    noise = ndtri(even_points(jax.random.key(0), half, size))
    left, _, right = jnp.linalg.svd(noise, full_matrices=False)
    noise = jnp.sqrt(half) * left @ right
    return jnp.concatenate([noise, -noise]).astype(dtype)


def _measure(
    batch: EncodedBatch,
    points: Float[Array, "points size"],
    globals_: Mapping[str, Array],
    normal: Normal,
) -> Measured:
    """Return what the density is like at the points of a Normal of each row."""
    loc, tril = normal

    def one(point: Array, number: Array) -> tuple[Array, Array]:
        given = {name: x[number % len(x)] for name, x in globals_.items()}

        def total(packed: Array) -> tuple[Array, Array]:
            by_row = logsumexp(batch.log_joint(packed, given, jax.random.key(0)), axis=0)
            return by_row.sum(), by_row

        gradient, by_row = jax.grad(total, has_aux=True)(loc + tril @ point)
        return by_row, jnp.einsum("bji,bj->bi", tril, gradient)

    by_row, slopes = batch.over_draws(one, points, jnp.arange(len(points)))
    log_det = jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)).sum(-1)
    bend = -jnp.einsum("pbi,pj->bij", slopes, points) / len(points)
    bend = (bend + bend.mT) / 2
    if batch.encoding.mask is not None:
        bend = jnp.where(_pairs(batch.encoding.mask), bend, jnp.eye(loc.shape[-1], dtype=loc.dtype))
    count = jnp.ones_like(loc) if batch.encoding.mask is None else batch.encoding.mask
    misfit = jnp.var(by_row + jnp.square(points) @ count.T / 2, axis=0) / 2
    return Measured(normal, by_row.mean(0) + log_det, slopes.mean(0), bend, misfit)


def _move(at: Measured, rate: Float[Array, "batch"]) -> Normal:
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


def _widened(at: Measured, mask: Bool[Array, "batch size"] | None) -> Normal:
    """Return the Normal with its variances multiplied, whose ELBO falls by about `WIDENED`."""
    loc, tril = at.normal
    lost = jnp.nan_to_num(jnp.minimum(at.misfit, WIDENED))
    factor = jnp.sqrt(1 + 2 * jnp.sqrt(lost / loc.shape[-1]))[:, None, None]
    return loc, tril * (factor if mask is None else jnp.where(mask[:, :, None], factor, 1.0))


def _choose(gained: Bool[Array, "batch"], new: Array, old: Array) -> Array:
    return jnp.where(gained.reshape(-1, *[1] * (new.ndim - 1)), new, old)
