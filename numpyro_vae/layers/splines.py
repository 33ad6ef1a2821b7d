"""Monotone rational-quadratic splines, value by value."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NUM_BINS = 8  # of a spline
EDGE = 4.0  # a spline bends what lies between -EDGE and EDGE
LEAST = 1e-3  # of the widths and heights of bins, as shares of their sum, and of slopes
NUM_OUTPUTS = 3 * NUM_BINS - 1  # the numbers that make a spline: widths, heights, inner slopes


class Knots(NamedTuple):
    """What a monotone rational-quadratic spline is made of, ``(*shape, bins)`` each.

    Attributes:
        left: where a bin begins.
        width: how wide it is.
        bottom: the value where it begins.
        height: how much the value increases in it.
        first: the slope where it begins.
        last: the slope where it ends.
    """

    left: Array
    width: Array
    bottom: Array
    height: Array
    first: Array
    last: Array

    @classmethod
    def of(cls, raw: Float[Array, "*shape outputs"]) -> Knots:
        """Return a spline from unbounded numbers; it is the identity if they are 0."""
        widths, heights, slopes = jnp.split(raw, [NUM_BINS, 2 * NUM_BINS], -1)
        slopes = LEAST + (1 - LEAST) * jax.nn.softplus(slopes + math.log(math.e - 1))
        ends = [(0, 0)] * (slopes.ndim - 1)
        first = jnp.pad(slopes, [*ends, (1, 0)], constant_values=1.0)
        last = jnp.pad(slopes, [*ends, (0, 1)], constant_values=1.0)
        return cls(*_bins(widths), *_bins(heights), first, last)

    def at(self, is_in: Array) -> Knots:
        """Return the bin of each value, without the axis of bins."""
        return Knots(*(jnp.where(is_in, x, 0.0).sum(-1) for x in self))

    def bend(self, x: Array) -> tuple[Array, Array]:
        """Return the value at each ``x`` and the logarithm of the slope there."""
        inside = jnp.clip(x, -EDGE, EDGE)
        bin_ = self.at(_is_in(inside, self.left))
        share = (inside - bin_.left) / bin_.width
        value, log_slope = bin_._value_at(share)
        is_outside = abs(x) > EDGE
        return jnp.where(is_outside, x, value), jnp.where(is_outside, 0.0, log_slope)

    def unbend(self, y: Array) -> Array:
        """Return where the value is ``y``."""
        inside = jnp.clip(y, -EDGE, EDGE)
        bin_ = self.at(_is_in(inside, self.bottom))
        mean, rise = bin_.height / bin_.width, inside - bin_.bottom
        bend = bin_.first + bin_.last - 2 * mean
        a = bin_.height * (mean - bin_.first) + rise * bend
        b = bin_.height * bin_.first - rise * bend
        root = jnp.sqrt(jnp.maximum(b**2 + 4 * a * mean * rise, 1e-12))
        share = 2 * mean * rise / (b + root)
        return jnp.where(abs(y) > EDGE, y, bin_.left + bin_.width * share)

    def _value_at(self, share: Array) -> tuple[Array, Array]:
        """Return the value and log-slope at a share of the width of a bin."""
        mean, both = self.height / self.width, share * (1 - share)
        below = mean + (self.first + self.last - 2 * mean) * both
        value = self.bottom + self.height * (mean * share**2 + self.first * both) / below
        slope = self.last * share**2 + 2 * mean * both + self.first * (1 - share) ** 2
        return value, 2 * jnp.log(mean) + jnp.log(slope) - 2 * jnp.log(below)


def _bins(raw: Float[Array, "*shape bins"]) -> tuple[Array, Array]:
    """Return where bins between the edges begin, and their widths."""
    share = LEAST + (1 - LEAST * NUM_BINS) * jax.nn.softmax(raw)
    width = 2 * EDGE * share
    return jnp.cumsum(width, -1) - width - EDGE, width


def _is_in(x: Float[Array, "*shape"], left: Float[Array, "*shape bins"]) -> Array:
    """Return in which bin each value lies, the last of those that begin before it."""
    begun = x[..., None] >= left.at[..., 0].set(-EDGE)
    return begun & ~jnp.pad(begun[..., 1:], [(0, 0)] * (begun.ndim - 1) + [(0, 1)])
