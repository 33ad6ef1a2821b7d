"""One of two distributions for each datum."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float
from numpyro.distributions import constraints

from numpyro_vae.families.base import AbstractHead


class Either(dist.Distribution):
    """The first of two distributions, or the second.

    Args:
        first: over vectors of reals.
        second: another one, of the same shapes.
        is_first: which it is.
    """

    pytree_data_fields = ("first", "second", "is_first")
    support = constraints.real_vector

    def __init__(
        self, first: dist.Distribution, second: dist.Distribution, is_first: Bool[Array, "*batch"]
    ):
        self.first, self.second, self.is_first = first, second, is_first
        super().__init__(first.batch_shape, first.event_shape)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw from the one that it is."""
        first, second = (fn.sample(key, sample_shape) for fn in (self.first, self.second))
        return jnp.where(self.is_first[..., None], first, second)

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """Return the log-density of the one that it is."""
        first, second = (fn.log_prob(value) for fn in (self.first, self.second))
        return jnp.where(self.is_first, first, second)


class RawOfEither(NamedTuple):
    """What both heads are given of each datum, and which counts: above 0.5 the first."""

    first: Any
    second: Any
    share: Float[Array, "*batch"]


class EitherHead(AbstractHead):
    """Two heads that are given their raw outputs, of which each datum has one."""

    def __init__(self, first: AbstractHead, second: AbstractHead):
        self.first, self.second = first, second

    def __call__(self, features: Any) -> RawOfEither:
        """Return what is given."""
        return features

    def distribution(self, raw: RawOfEither) -> Either:
        """Return the distribution of the head that counts."""
        first, second = self.first.distribution(raw.first), self.second.distribution(raw.second)
        return Either(first, second, raw.share > 0.5)

    def marginals(self, raw: RawOfEither) -> None:
        """Return None: they have no closed form."""
