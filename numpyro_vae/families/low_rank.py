"""The multivariate Normal whose correlations have a low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Bool, Float

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

__all__ = ["LowRankNormal"]

# The largest norm of the factor in units of the scales. NumPyro takes the Cholesky factor of
# I + V^T V: up to a norm of 1e3 its eigenvalues, 1 to 1e6, are told apart in float32.
MAX_NORM = 1e3

Triple = tuple[
    Float[Array, "*batch size"], Float[Array, "*batch size"], Float[Array, "*batch entries"]
]


class Correlated(dist.LowRankMultivariateNormal):
    """NumPyro's distribution, whose products of matrices a GPU does not shorten."""

    def __init__(self, *args: Any, **kwargs: Any):
        with full_precision():
            super().__init__(*args, **kwargs)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw as NumPyro does."""
        with full_precision():
            return super().sample(key, sample_shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """Return NumPyro's log-density."""
        del intermediates
        with full_precision():
            return jnp.asarray(super().log_prob(value))


class LowRankHead(AbstractHead):
    """Linear maps to ``loc``, ``raw_scale`` and the factor, row by row."""

    def __init__(
        self,
        num_features: int,
        size: int,
        rank: int,
        parameterization: AbstractParameterization,
        *,
        rngs: nnx.Rngs,
    ):
        self.parameterization = parameterization
        self.rank = rank
        self.loc = nnx.Linear(num_features, size, rngs=rngs)
        self.raw_scale = constant_linear(num_features, size, parameterization.init_raw, rngs=rngs)
        # At a factor of 0 the density's gradient is 0; from here it starts nearly diagonal.
        self.factor = nnx.Linear(
            num_features,
            size * rank,
            kernel_init=initializers.zeros,
            bias_init=initializers.normal(0.1),
            rngs=rngs,
        )

    def __call__(self, features: Float[Array, "*batch k"]) -> Triple:
        """Return ``(loc, raw_scale, factor)``."""
        return self.loc(features), self.raw_scale(features), self.factor(features)

    def distribution(self, raw: Triple) -> dist.TransformedDistribution:
        """Return the Normal with covariance ``I + V @ V.T``, scaled and shifted."""
        return self._correlated(raw, self._bounded(raw[2]))

    def part(self, raw: Triple, mask: Bool[Array, "*batch size"]) -> PartOfNormal:
        """Return the Normal with the density of the values where a mask is True."""
        apart = self._correlated(raw, jnp.where(mask[..., None], self._bounded(raw[2]), 0.0))
        log_scale = self.parameterization.log_scale(raw[1])
        return PartOfNormal(self.distribution(raw), apart, raw[0], log_scale, mask)

    def _correlated(self, raw: Triple, factor: Array) -> dist.TransformedDistribution:
        loc, raw_scale, _ = raw
        # NumPyro's class divides by the diagonal of the covariance, so that diagonal is 1 here.
        correlated = Correlated(jnp.zeros_like(loc), factor, jnp.ones_like(loc))
        rescale = LogScaleAffine(loc, self.parameterization.log_scale(raw_scale))
        return dist.TransformedDistribution(correlated, rescale)

    def marginals(self, raw: Triple) -> LogScaleNormal:
        """Return the Normals with the standard deviations ``scale * sqrt(1 + norm(V row)**2)``."""
        loc, raw_scale, factor = raw
        log_norm = 0.5 * jnp.log1p(jnp.square(self._bounded(factor)).sum(-1))
        return LogScaleNormal(loc, self.parameterization.log_scale(raw_scale) + log_norm)

    def as_normal(self, raw: Triple) -> Normal:
        """Return ``loc``, and the Cholesky factor of the covariance."""
        loc, raw_scale, factor = raw
        scale = saturating_exp(self.parameterization.log_scale(raw_scale))
        with full_precision():
            factor = self._bounded(factor)
            cov = jnp.eye(loc.shape[-1], dtype=factor.dtype) + factor @ factor.mT
            return loc, scale[..., None] * jnp.linalg.cholesky(cov)

    def _bounded(self, factor: Float[Array, "*batch entries"]) -> Float[Array, "*batch size rank"]:
        """``V``: the factor as a matrix, its norm below `MAX_NORM` and far below it unchanged."""
        norm = jnp.square(factor / MAX_NORM).sum(-1, keepdims=True)
        bounded = factor / jnp.sqrt(1 + norm)
        return bounded.reshape(*factor.shape[:-1], -1, self.rank)


@dataclass(frozen=True)
class LowRankNormal(AbstractFamily):
    r"""A multivariate Normal with a diagonal plus low-rank covariance, for many latents.

    .. math::
        z = \text{loc} + \text{diag}(\text{scale}) (V \varepsilon_1 + \varepsilon_2), \qquad
        \text{cov} = W W^T + \text{diag}(\text{scale}^2), \quad W = \text{diag}(\text{scale}) V,

    with :math:`V` of shape ``(size, rank)`` and norm below 1000: Ong, Nott and Smith, "Gaussian
    variational approximation with a factor covariance structure", 2018 (arXiv 1701.03208). It has
    ``size * (rank + 2)`` outputs for each datum, and its density costs ``size * rank**2``.

    Args:
        rank: the number of columns of :math:`V`, from 1 to the number of latents of a datum; None
            for the rounded root of that number, as in NumPyro's low-rank guide.
        parameterization: what the raw scale means; its ``init_scale`` is about where every standard
            deviation starts, 1% or so below it for each rank.

    Raises:
        ValueError: if the rank is below 1, or, when the head is built, above the number of latents.

    Example:
        >>> head = LowRankNormal(rank=2).head(8, 5, rngs=nnx.Rngs(0))
        >>> head.distribution(head(jnp.zeros((4, 8)))).event_shape
        (5,)
    """

    rank: int | None = None
    parameterization: AbstractParameterization = LogScale()

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"LowRankNormal: found rank={self.rank}, expected at least 1. Give the number of "
                "directions in which latents vary together, or use DiagonalNormal()."
            )

    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> LowRankHead:
        """Return the linear maps from features to ``(loc, raw_scale, factor)``."""
        rank = round(math.sqrt(size)) if self.rank is None else self.rank
        if rank > size:
            raise ValueError(
                f"LowRankNormal: found rank={rank} for {size} latent value(s) of a datum, "
                f"expected at most {size}. Lower the rank, or use FullRankNormal()."
            )
        return LowRankHead(num_features, size, rank, for_heads(self.parameterization), rngs=rngs)
