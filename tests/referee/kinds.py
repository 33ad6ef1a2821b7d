"""Distributions that the models of the referee are made of, by the name of a feature.

Each is a function of a predictor, an array of any batch shape with values of about -2 to 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints, transforms

WEIGHTS = np.array([0.9, -0.6, 0.3], np.float32)


def real(m: Array) -> dist.Distribution:
    return dist.Normal(m, 0.8)


def positive(m: Array) -> dist.Distribution:
    return dist.LogNormal(m, 0.5)


def gamma(m: Array) -> dist.Distribution:
    return dist.Gamma(3.0 + m, 1.5)


def unit(m: Array) -> dist.Distribution:
    return dist.Beta(3.0 + m, 2.0)


def interval(m: Array) -> dist.Distribution:
    return dist.TruncatedNormal(m, 1.0, low=-1.0, high=2.0)


def below(m: Array) -> dist.Distribution:
    return dist.TruncatedNormal(m, 1.0, high=1.5)


def circular(m: Array) -> dist.Distribution:
    return dist.VonMises(m, 2.0)


def student(m: Array) -> dist.Distribution:
    return dist.StudentT(5.0, m, 1.0)


def mixture(m: Array) -> dist.Distribution:
    parts = dist.Normal(jnp.stack([m - 1.0, m + 1.0], -1), 0.5)
    return dist.MixtureSameFamily(dist.Categorical(jnp.array([0.4, 0.6])), parts)


def shifted(m: Array) -> dist.Distribution:
    """Of the numbers above one."""
    affine = transforms.AffineTransform(1.0, 2.0, domain=constraints.positive)
    return dist.TransformedDistribution(dist.Gamma(3.0 + m, 2.0), affine)


def simplex(m: Array) -> dist.Distribution:
    return dist.Dirichlet(jnp.stack([3.0 + m, jnp.full_like(m, 2.0), 3.5 - m], -1))


def ordered(m: Array) -> dist.Distribution:
    base = dist.Normal(m[..., None] + WEIGHTS, 1.0).to_event(1)
    return dist.TransformedDistribution(base, transforms.OrderedTransform())


def lower_cholesky(m: Array) -> dist.Distribution:
    base = dist.Normal(m[..., None] + WEIGHTS, 0.7).to_event(1)
    return dist.TransformedDistribution(base, transforms.LowerCholeskyTransform())


def correlation(m: Array) -> dist.Distribution:
    return dist.LKJCholesky(3, 3.0 + m)


def zero_sum(m: Array) -> dist.Distribution:
    return dist.ZeroSumNormal(1.3, (3,))  # its scale is one number, that of no row


def vector_normal(m: Array) -> dist.Distribution:
    covariance = jnp.array([[1.0, 0.5], [0.5, 2.0]])
    return dist.MultivariateNormal(m[..., None] + jnp.array([0.5, -0.5]), covariance)


def improper(m: Array) -> dist.Distribution:
    return dist.ImproperUniform(constraints.positive, m.shape, ())


ENUMERATED = "enumerated"  # a kind of its own: sites that objectives and weights sum over


def enumerated(m: Array) -> dist.Distribution:
    return dist.Categorical(logits=m[..., None] * WEIGHTS[:2])


LATENTS: dict[str, Callable[[Array], dist.Distribution]] = {
    "real": real,
    "positive": positive,
    "gamma": gamma,
    "unit": unit,
    "interval": interval,
    "below": below,
    "circular": circular,
    "student": student,
    "mixture": mixture,
    "shifted": shifted,
    "simplex": simplex,
    "ordered": ordered,
    "lower_cholesky": lower_cholesky,
    "correlation": correlation,
    "zero_sum": zero_sum,
    "vector_normal": vector_normal,
    "improper": improper,
}


def with_event(kind: str, m: Array, event: tuple[int, ...]) -> dist.Distribution:
    """Return a distribution with dimensions in front of its kind's own event."""
    make = enumerated if kind == ENUMERATED else LATENTS[kind]
    if not event:
        return make(m)
    spread = 0.2 * jnp.arange(1.0 * math.prod(event)).reshape(event)
    if kind == "zero_sum":
        return make(m).expand(m.shape + event).to_event(len(event))
    return make(m.reshape(m.shape + (1,) * len(event)) - spread).to_event(len(event))


# -- observed sites: functions of a predictor and of the scale of the noise ----------------------


@dataclass(frozen=True)
class Observed:
    """A likelihood; ``event`` is the shape of its values where it differs from the site's."""

    make: Callable[[Array, Array | float], dist.Distribution]
    event: tuple[int, ...] | None = None
    is_noisy: bool = False  # whether its values are the predictor's if there is no noise
    is_continuous: bool = False


def _vector(m: Array, noise: Array | float) -> dist.Distribution:
    return dist.Normal(m[..., None] * WEIGHTS, 0.7 * noise).to_event(1)


def _matrix(m: Array, noise: Array | float) -> dist.Distribution:
    weights = jnp.outer(jnp.array([1.0, -0.5]), WEIGHTS)
    return dist.Normal(m[..., None, None] * weights, 0.7 * noise).to_event(2)


def _broadcast(m: Array, noise: Array | float) -> dist.Distribution:
    return dist.Normal(m[..., None], 0.7 * noise).to_event(1)


def _categorical(m: Array, noise: Array | float) -> dist.Distribution:
    return dist.Categorical(logits=m[..., None] * WEIGHTS)


def _multinomial(m: Array, noise: Array | float) -> dist.Distribution:
    return dist.Multinomial(5, logits=m[..., None] * WEIGHTS, total_count_max=5)


def _multivariate(m: Array, noise: Array | float) -> dist.Distribution:
    covariance = jnp.array([[1.0, 0.4], [0.4, 0.8]]) * noise**2
    return dist.MultivariateNormal(m[..., None] * WEIGHTS[:2], covariance)


def _ordered_logistic(m: Array, noise: Array | float) -> dist.Distribution:
    return dist.OrderedLogistic(m, jnp.array([-1.0, 0.5]))


OBSERVED: dict[str, Observed] = {
    "normal": Observed(lambda m, noise: dist.Normal(m, 0.7 * noise), None, True, True),
    "vector": Observed(_vector, None, True, True),
    "matrix": Observed(_matrix, None, True, True),
    "multivariate": Observed(_multivariate, None, True, True),
    "event_broadcast": Observed(_broadcast, (3,), False, True),
    "poisson": Observed(lambda m, noise: dist.Poisson(jnp.exp(m))),
    "zero_inflated": Observed(lambda m, noise: dist.ZeroInflatedPoisson(0.3, jnp.exp(m))),
    "negative_binomial": Observed(lambda m, noise: dist.NegativeBinomial2(jnp.exp(m), 2.0)),
    "bernoulli": Observed(lambda m, noise: dist.Bernoulli(logits=m)),
    "binomial": Observed(lambda m, noise: dist.Binomial(5, logits=m)),
    "categorical": Observed(_categorical),
    "ordinal": Observed(_ordered_logistic),
    "multinomial": Observed(_multinomial),
    "observed_simplex": Observed(lambda m, noise: simplex(jnp.tanh(m)), None, False, True),
    "observed_positive": Observed(lambda m, noise: dist.Gamma(jnp.exp(m), 1.0), None, False, True),
}
