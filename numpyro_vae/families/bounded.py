"""Latents between two bounds, in coordinates in which a uniform one is standard Normal."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_vae.families.base import AbstractHead
from numpyro_vae.scales.log_scale_normal import log_normal_cdf

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
FAR = 0.6  # of the largest logit whose probability is a normal float: from there on a series
ROUNDS = 5  # each divides the error by x squared, above 100


class Bounded(AbstractHead):
    """A head to which some latents are Normal where NumPyro's unconstrained ones are logistic.

    NumPyro maps an interval to the reals by the logit, which makes of a uniform value a logistic
    one, with heavier tails than a Normal's.

    Args:
        head: of all values.
        bounded: which of them lie between two bounds.
    """

    def __init__(self, head: AbstractHead, bounded: Bool[np.ndarray, "size"]):
        self.head, self.bounded = head, tuple(map(bool, bounded))

    def __call__(self, features: Any) -> Any:
        """Return the head's raw outputs."""
        return self.head(features)

    def distribution(self, raw: Any) -> dist.TransformedDistribution:
        """Return the head's distribution, mapped."""
        return dist.TransformedDistribution(self.head.distribution(raw), Logits(self.bounded))

    def marginals(self, raw: Any) -> None:
        """Return None: they have no closed form."""


class Logits(Transform):
    r"""The logit of :math:`\Phi(x)` for some values of a vector, and the others as they are.

    Args:
        chosen: for which.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, chosen: tuple[bool, ...]):
        self.chosen = chosen

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        """Return ``y``."""
        return jnp.where(self._chosen, log_normal_cdf(x) - log_normal_cdf(-x), x)

    def log_abs_det_jacobian(
        self, x: Array, y: Array, intermediates: Any = None
    ) -> Float[Array, "*shape"]:
        """Return the sum of the logarithms of the slopes."""
        return jnp.where(self._chosen, _log_slope(x), 0.0).sum(-1)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Return no leaves."""
        return (), ((), {"chosen": self.chosen})

    def _inverse(self, y: Array) -> Array:
        return jnp.where(self._chosen, _quantile(y), y)

    @property
    def _chosen(self) -> np.ndarray:
        return np.array(self.chosen)


def _log_slope(x: Array) -> Array:
    """Return the logarithm of the derivative of the logit of Phi."""
    log_density = -0.5 * jnp.square(x) - HALF_LOG_TWO_PI
    return log_density - log_normal_cdf(x) - log_normal_cdf(-x)


@jax.custom_jvp
def _quantile(logit: Array) -> Array:
    """Return where Phi has a logit."""
    size = jnp.abs(logit)
    far = -FAR * math.log(jnp.finfo(logit.dtype).tiny)
    near = -ndtri(jax.nn.sigmoid(-jnp.minimum(size, far)))
    return jnp.copysign(jnp.where(size < far, near, _far_quantile(jnp.maximum(size, far))), logit)


def _far_quantile(size: Array) -> Array:
    """Return where Phi has so large a logit, whose probability is near what floats can tell from 1.

    There ``log(1 - Phi(x)) = -x**2 / 2 - log(x) - log(2 pi) / 2 + log(1 - 1 / x**2 + ...)``.
    """
    x = jnp.sqrt(2 * size)
    for _ in range(ROUNDS):
        u = 1 / jnp.square(x)
        series = jnp.log1p(-u * (1 - u * (3 - u * (15 - 105 * u))))
        x = jnp.sqrt(2 * (size - jnp.log(x) - HALF_LOG_TWO_PI + series))
    return x


@_quantile.defjvp
def _quantile_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    x = _quantile(*primals)
    return x, tangents[0] * jnp.exp(-_log_slope(x))
