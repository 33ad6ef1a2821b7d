"""The multivariate Normal with any covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Bool, Float
from numpyro.distributions.transforms import LowerCholeskyAffine

from numpyro_vae.families.base import (
    AbstractFamily,
    AbstractHead,
    LogScaleAffine,
    Normal,
    PartOfNormal,
    constant_linear,
    full_precision,
)
from numpyro_vae.scales.log_scale_normal import LogScaleNormal
from numpyro_vae.scales.parameterization import (
    AbstractParameterization,
    LogScale,
    for_heads,
    saturating_exp,
)

__all__ = ["FullRankNormal"]

# A step of Adam moves a correlation by the learning rate times the sum of the features, and all of
# them at once: with many features and latents it throws the factor so far that its inverse is lost
# in rounding. Beyond this product of both numbers it moves as far as there.
EXTENT = 2048


def gain(num_features: int, size: int) -> float:
    """Return what the features are multiplied by before they become correlations."""
    return min(1.0, EXTENT / (num_features * size))


Vector = Float[Array, "*batch size"]
Triple = tuple[Vector, Vector, Float[Array, "*batch lower"]]


class Correlate(LowerCholeskyAffine):
    """NumPyro's transform, whose product a GPU does not shorten; its inverse is never shortened."""

    def __call__(self, x: Any) -> Float[Array, "*shape size"]:
        """Return ``loc + scale_tril @ x``."""
        with full_precision():
            return jnp.asarray(super().__call__(x))


def lower_root(root: Float[Array, "*batch n m"]) -> Float[Array, "*batch n n"]:
    """Return the Cholesky factor of ``root @ root.T``, without squaring what is correlated."""
    upper = jnp.linalg.qr(root.mT, mode="r")
    signs = jnp.where(jnp.diagonal(upper, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return upper.mT * signs[..., None, :]


class CholeskyForm(AbstractHead):
    """What ``loc``, ``raw_scale`` and a strictly lower triangle, row by row, mean."""

    def __init__(self, size: int, parameterization: AbstractParameterization):
        self.size, self.parameterization = size, parameterization

    def __call__(self, features: Any) -> Triple:
        """Return what is given."""
        return features

    def distribution(self, raw: Triple) -> dist.TransformedDistribution:
        """Return standard Normal noise, correlated by ``unit_tril``, scaled and shifted."""
        return self._correlated(raw, self._unit_tril(raw[2]))

    def part(self, raw: Triple, mask: Bool[Array, "*batch size"]) -> PartOfNormal:
        """Return the Normal with the density of the values where a mask is True."""
        kept = jnp.where(mask[..., None], self._unit_tril(raw[2]), 0.0)
        others = jnp.where(mask[..., None], 0.0, jnp.eye(self.size, dtype=kept.dtype))
        apart = self._correlated(raw, lower_root(jnp.concatenate([kept, others], axis=-1)))
        log_scale = self.parameterization.log_scale(raw[1])
        return PartOfNormal(self.distribution(raw), apart, raw[0], log_scale, mask)

    def _correlated(self, raw: Triple, tril: Array) -> dist.TransformedDistribution:
        loc, raw_scale, _ = raw
        # Not NumPyro's MultivariateNormal: it solves for the noise of its own draws, and its
        # scale_tril cannot hold scales for which exp() over- or underflows.
        zeros = jnp.zeros_like(loc)
        correlate = Correlate(zeros, tril)
        rescale = LogScaleAffine(loc, self.parameterization.log_scale(raw_scale))
        noise = dist.Normal(zeros, 1.0).to_event(1)
        return dist.TransformedDistribution(noise, [correlate, rescale])

    def marginals(self, raw: Triple) -> LogScaleNormal:
        """Return the Normals with the standard deviations ``scale * norm(unit_tril row)``."""
        loc, raw_scale, lower = raw
        # A row of `unit_tril` holds a 1, so neither this logarithm nor its gradient is infinite.
        log_norm = 0.5 * jnp.log(jnp.square(self._unit_tril(lower)).sum(-1))
        return LogScaleNormal(loc, self.parameterization.log_scale(raw_scale) + log_norm)

    def as_normal(self, raw: Triple) -> Normal:
        """Return ``loc`` and ``scale_tril``."""
        loc, raw_scale, lower = raw
        scale = saturating_exp(self.parameterization.log_scale(raw_scale))
        return loc, scale[..., None] * self._unit_tril(lower)

    def raw_of(self, loc: Vector, scale_tril: Float[Array, "*batch size size"]) -> Triple:
        """Return the raw outputs of a Normal, of unbounded log-scales: undoes `as_normal`."""
        scale = jnp.diagonal(scale_tril, axis1=-2, axis2=-1)
        rows, columns = np.tril_indices(self.size, -1)
        return loc, jnp.log(scale), (scale_tril / scale[..., None])[..., rows, columns]

    def _unit_tril(self, lower: Float[Array, "*batch lower"]) -> Float[Array, "*batch size size"]:
        rows, columns = np.tril_indices(self.size, -1)
        eye = jnp.eye(self.size, dtype=lower.dtype)
        unit_tril = jnp.broadcast_to(eye, (*lower.shape[:-1], *eye.shape))
        return unit_tril.at[..., rows, columns].set(lower)


class CholeskyHead(CholeskyForm):
    """Linear maps to ``loc``, ``raw_scale`` and the strictly lower triangle, row by row."""

    def __init__(
        self,
        num_features: int,
        size: int,
        parameterization: AbstractParameterization,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(size, parameterization)
        self.loc = nnx.Linear(num_features, size, rngs=rngs)
        self.raw_scale = constant_linear(num_features, size, parameterization.init_raw, rngs=rngs)
        self.lower = constant_linear(num_features, size * (size - 1) // 2, 0.0, rngs=rngs)
        self.gain = gain(num_features, size)

    def __call__(self, features: Any) -> Triple:
        """Return ``(loc, raw_scale, lower)``."""
        return self.loc(features), self.raw_scale(features), self.lower(self.gain * features)


@dataclass(frozen=True)
class FullRankNormal(AbstractFamily):
    r"""A multivariate Normal with any covariance over a datum's unconstrained latents.

    .. math::
        z = \text{loc} + \text{diag}(\text{scale})\, C \varepsilon, \qquad
        \varepsilon \sim \text{Normal}(0, I),

    with :math:`C` lower triangular and 1 on its diagonal: ``scale`` is the standard deviation of a
    latent given those before it, and :math:`C` has no unit. This is the full-rank Gaussian of
    Kucukelbir et al., "Automatic Differentiation Variational Inference", 2017 (JMLR 18, 14), with
    ``scale_tril = diag(scale) C``, one for each datum. It starts diagonal, and it has
    ``size * (size + 3) / 2`` outputs for each datum.

    Args:
        parameterization: what the raw scale means; its ``init_scale`` is where every scale starts.

    Example:
        >>> head = FullRankNormal().head(8, 3, rngs=nnx.Rngs(0))
        >>> head.distribution(head(jnp.zeros((4, 8)))).event_shape
        (3,)
    """

    parameterization: AbstractParameterization = LogScale()

    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> CholeskyHead:
        """Return the linear maps from features to ``(loc, raw_scale, lower)``."""
        return CholeskyHead(num_features, size, for_heads(self.parameterization), rngs=rngs)
