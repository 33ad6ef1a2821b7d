"""A point for each datum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from numpyro_vae.families.base import AbstractFamily, AbstractHead

__all__ = ["PointEstimate"]


class PointMass(dist.Delta):
    """NumPyro's Delta with the quantile function that it lacks."""

    def icdf(self, q: ArrayLike) -> Array:
        """The point, for any probability ``q``."""
        return jnp.broadcast_to(self.v, jnp.broadcast_shapes(jnp.shape(self.v), jnp.shape(q)))


class LocHead(AbstractHead):
    """A linear map to ``loc``."""

    def __init__(self, num_features: int, size: int, *, rngs: nnx.Rngs):
        self.loc = nnx.Linear(num_features, size, rngs=rngs)

    def __call__(self, features: Float[Array, "*batch k"]) -> Float[Array, "*batch size"]:
        """Return ``loc``."""
        return self.loc(features)

    def distribution(self, raw: Float[Array, "*batch size"]) -> dist.Delta:
        """Return the point of a datum, ``event_shape == (size,)``."""
        return dist.Delta(raw, event_dim=1)

    def marginals(self, raw: Float[Array, "*batch size"]) -> PointMass:
        """Return every latent value by itself, with variance 0."""
        return PointMass(raw)


@dataclass(frozen=True)
class PointEstimate(AbstractFamily):
    r"""One point for each datum, :math:`q(z) = \delta(z - \text{loc})`, with no spread.

    Under an ELBO it finds the mode of the joint density of data and unconstrained latents, which
    is what an amortized maximum a posteriori estimate is. Its ELBO says nothing of the evidence:
    the entropy of a point is counted as 0. It has no scale, so a guide's ``scale=`` does not apply.

    Example:
        >>> head = PointEstimate().head(8, 2, rngs=nnx.Rngs(0))
        >>> head.distribution(head(jnp.zeros((4, 8)))).event_shape
        (2,)
    """

    has_density: ClassVar[bool] = False
    is_factorized: ClassVar[bool] = True

    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> LocHead:
        """Return the linear map from features to ``loc``."""
        return LocHead(num_features, size, rngs=rngs)
