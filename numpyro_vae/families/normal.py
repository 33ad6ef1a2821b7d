"""The diagonal Normal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Float

from numpyro_vae.families.base import AbstractFamily, AbstractHead, Normal, constant_linear
from numpyro_vae.scales.log_scale_normal import LogScaleNormal
from numpyro_vae.scales.parameterization import (
    AbstractParameterization,
    LogScale,
    for_heads,
    saturating_exp,
)

__all__ = ["DiagonalNormal"]

Pair = tuple[Float[Array, "*batch size"], Float[Array, "*batch size"]]


class AbstractNormalHead(AbstractHead):
    """What a pair ``(loc, raw_scale)`` means, wherever it comes from."""

    parameterization: AbstractParameterization

    def distribution(self, raw: Pair) -> dist.Distribution:
        """Return the Normals of a datum as one distribution, ``event_shape == (size,)``."""
        return self.marginals(raw).to_event(1)

    def marginals(self, raw: Pair) -> LogScaleNormal:
        """Return ``Normal(loc, scale(raw_scale))`` of every latent value by itself."""
        loc, raw_scale = raw
        return LogScaleNormal(loc, self.parameterization.log_scale(raw_scale))

    def as_normal(self, raw: Pair) -> Normal:
        """Return ``loc`` and a diagonal ``scale_tril``."""
        scale = saturating_exp(self.parameterization.log_scale(raw[1]))
        return raw[0], scale[..., None] * jnp.eye(scale.shape[-1], dtype=scale.dtype)


class PairHead(AbstractNormalHead):
    """The encoder's own pair ``(loc, raw_scale)``."""

    def __init__(self, parameterization: AbstractParameterization):
        self.parameterization = parameterization

    def __call__(self, features: Any) -> Pair:
        """Return the pair."""
        return features


class LinearHead(AbstractNormalHead):
    """Two linear maps of the features: ``loc``, and ``raw_scale`` starting at a constant."""

    def __init__(
        self,
        num_features: int,
        size: int,
        parameterization: AbstractParameterization,
        *,
        rngs: nnx.Rngs,
    ):
        self.parameterization = parameterization
        self.loc = nnx.Linear(num_features, size, rngs=rngs)
        self.raw_scale = constant_linear(num_features, size, parameterization.init_raw, rngs=rngs)

    def __call__(self, features: Float[Array, "*batch k"]) -> Pair:
        """Return ``(loc, raw_scale)``."""
        return self.loc(features), self.raw_scale(features)


@dataclass(frozen=True)
class DiagonalNormal(AbstractFamily):
    """Independent Normals over a datum's unconstrained latents.

    Args:
        parameterization: what the raw scale means; its ``init_scale`` is where every scale starts.

    Example:
        >>> import jax.numpy as jnp
        >>> head = DiagonalNormal().head(8, 2, rngs=nnx.Rngs(0))
        >>> head.distribution(head(jnp.zeros((4, 8)))).event_shape
        (2,)
    """

    parameterization: AbstractParameterization = LogScale()
    is_factorized: ClassVar[bool] = True

    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> LinearHead:
        """Return the two linear maps from features to ``(loc, raw_scale)``."""
        return LinearHead(num_features, size, for_heads(self.parameterization), rngs=rngs)

    def pair(self) -> PairHead:
        """Return what makes Normals of the encoder's own ``(loc, raw_scale)``."""
        return PairHead(self.parameterization)
