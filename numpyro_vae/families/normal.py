"""The diagonal Normal."""

from __future__ import annotations

from dataclasses import dataclass

import numpyro.distributions as dist
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from numpyro_vae.distributions import LogScaleNormal
from numpyro_vae.families.base import AbstractFamily
from numpyro_vae.parameterization import AbstractParameterization, LogScale

__all__ = ["DiagonalNormal"]


class NormalHead(nnx.Module):
    """Two linear maps of the features: ``loc``, and ``raw_scale`` starting at a constant."""

    def __init__(self, num_features: int, size: int, raw_init: float, *, rngs: nnx.Rngs):
        self.loc = nnx.Linear(num_features, size, rngs=rngs)
        self.raw_scale = nnx.Linear(
            num_features,
            size,
            kernel_init=initializers.zeros,
            bias_init=initializers.constant(raw_init),
            rngs=rngs,
        )

    def __call__(
        self, features: Float[Array, "batch k"]
    ) -> tuple[Float[Array, "batch size"], Float[Array, "batch size"]]:
        return self.loc(features), self.raw_scale(features)


@dataclass(frozen=True)
class DiagonalNormal(AbstractFamily):
    """Independent Normals over a datum's unconstrained latents.

    Args:
        parameterization: what the raw scale means; its ``init_scale`` is where every scale starts.

    Example:
        >>> import jax.numpy as jnp
        >>> DiagonalNormal().distribution((jnp.zeros((4, 2)), jnp.zeros((4, 2)))).event_shape
        (2,)
    """

    parameterization: AbstractParameterization = LogScale()

    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> NormalHead:
        """Return the two linear maps from features to ``(loc, raw_scale)``."""
        return NormalHead(num_features, size, self.parameterization.init_raw, rngs=rngs)

    def normal(
        self, raw: tuple[Float[Array, "*batch size"], Float[Array, "*batch size"]]
    ) -> LogScaleNormal:
        """Return ``Normal(loc, scale(raw_scale))`` of every latent value by itself."""
        loc, raw_scale = raw
        return LogScaleNormal(loc, self.parameterization.log_scale(raw_scale))

    def distribution(
        self, raw: tuple[Float[Array, "*batch size"], Float[Array, "*batch size"]]
    ) -> dist.Distribution:
        """Return the Normals of a datum as one distribution, ``event_shape == (size,)``."""
        return self.normal(raw).to_event(1)
