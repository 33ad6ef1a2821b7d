"""Points spread evenly over a cube, and draws of a distribution as functions of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

EDGE = 1e-6  # how near to 0 and 1 points may be, lest quantiles be infinite


def even_points(rng_key: Array, number: int, size: int) -> Float[Array, "number size"]:
    r"""Return points that are uniform over the unit cube each, and together cover it evenly.

    A lattice, of which the first coordinate is :math:`k / n` and the others are
    :math:`k \phi^{-j} \bmod 1` with :math:`\phi^{d} = \phi + 1`, is shifted at random, and folded,
    so that smooth functions need not be periodic.

    Reference:
        Cranley and Patterson, SIAM Journal on Numerical Analysis 13, 1976; Hickernell, *Obtaining
        O(N^(-2+e)) Convergence for Lattice Quadrature Rules*, 2002.

    Example:
        >>> points = even_points(jax.random.key(0), 64, 2)
        >>> points.shape, bool(abs(points.mean(0) - 0.5).max() < 0.01)
        ((64, 2), True)
    """
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / max(size, 1))
    steps = np.concatenate([[1 / number], root ** -np.arange(1.0, max(size, 1))])[:size]
    lattice = jnp.asarray(np.outer(np.arange(number), steps) % 1.0, float)
    points = (lattice + jax.random.uniform(rng_key, (size,))) % 1.0
    return jnp.clip(1 - jnp.abs(2 * points - 1), EDGE, 1 - EDGE)


def transported(fn: Any, uniform: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return draws of a distribution as functions of uniform numbers.

    Args:
        fn: a distribution of independent values with known quantiles, or transforms of such.
        uniform: of the shape of draws.

    Raises:
        NotImplementedError: if it is not.

    Example:
        >>> transported(dist.Normal(0.0, 1.0).expand([2]).to_event(1), jnp.array([0.5, 0.5])) + 0.0
        Array([0., 0.], dtype=float32)
    """
    if isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        return transported(fn.base_dist, uniform)
    if not isinstance(fn, dist.TransformedDistribution):
        return fn.icdf(uniform)
    value = transported(fn.base_dist, uniform)
    for transform in fn.transforms:
        value = transform(value)
    return value
