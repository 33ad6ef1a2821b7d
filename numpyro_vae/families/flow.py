"""A normalizing flow, for posteriors that are not Normal."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_vae.families.base import AbstractFamily, AbstractHead, LogScaleAffine, constant_linear
from numpyro_vae.scales.parameterization import (
    AbstractParameterization,
    LogScale,
    for_heads,
)

__all__ = ["Flow"]

MAX_LOG_SCALE = 3.0  # the scales of a layer lie between exp(-MAX_LOG_SCALE) and exp(MAX_LOG_SCALE)
NUM_BINS = 8  # of a spline
EDGE = 4.0  # a spline bends what lies between -EDGE and EDGE
LEAST = 1e-3  # of the widths and heights of bins, as shares of their sum, and of slopes

Vector = Float[Array, "*batch size"]
Raw = tuple[Vector, Vector, tuple[Float[Array, "*batch hidden"], ...]]


@functools.cache
def _halves(number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of ``size`` values a layer reads, and which of them it transforms.

    Pairs of layers transform both halves of the values in turn, and each pair divides them by
    another digit of their binary numbers, so that any two values are apart in some pair.
    """
    values = np.arange(size)
    if size == 1:
        return values[:0], values
    digit = (number // 2) % (size - 1).bit_length()
    transformed = (values >> digit) % 2 == number % 2
    return values[~transformed], values[transformed]


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


class CouplingLayer(Transform):
    """Bends half of the values by splines that the other half and the datum choose.

    The arrays of the network are leaves of the pytree, so that those that depend on the datum go
    through jit, scan and vmap.

    Args:
        kernels: of each layer of the conditioner.
        biases: of each layer but the first, whose bias is in ``context``.
        context: what the features of a datum add to the first hidden layer.
        number: of the layer in the flow, see `_halves`.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        kernels: tuple[Float[Array, "_ _"], ...],
        biases: tuple[Float[Array, " _"], ...],
        context: Float[Array, "*batch hidden"],
        number: int,
    ):
        self.kernels, self.biases, self.context = kernels, biases, context
        self.number = number

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        """Return ``y``."""
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Float[Array, "*shape size"]) -> tuple[Array, Array]:
        """Return ``y`` and the logarithm of the determinant."""
        _, changed = _halves(self.number, x.shape[-1])
        knots, shift, log_scale = self._conditioner(x)
        bent, log_slope = knots.bend(x[..., changed])
        moved = shift + jnp.exp(log_scale) * bent
        return self._put(x, moved), (log_slope + log_scale).sum(-1)

    def log_abs_det_jacobian(
        self, x: Array, y: Array, intermediates: Array | None = None
    ) -> Float[Array, "*shape"]:
        """Return the sum of the logarithms of the slopes."""
        if intermediates is not None:
            return intermediates
        _, changed = _halves(self.number, x.shape[-1])
        knots, _, log_scale = self._conditioner(y)  # which are those that the inverse has read
        return (knots.bend(x[..., changed])[1] + log_scale).sum(-1)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Return all arrays as leaves."""
        leaves = ("kernels", "biases", "context")
        return tuple(getattr(self, name) for name in leaves), (leaves, {"number": self.number})

    def _conditioner(self, x: Array) -> tuple[Knots, Array, Array]:
        """Return the splines, shifts and log-scales; after the tanh, bounded for any ``x``."""
        seen, changed = _halves(self.number, x.shape[-1])
        first, *others = self.kernels
        hidden = x[..., seen] @ first + self.context
        for kernel, bias in zip(others, self.biases, strict=True):
            hidden = jnp.tanh(hidden) @ kernel + bias
        raw = hidden.reshape(*hidden.shape[:-1], len(changed), -1)
        raw = raw / math.sqrt(others[-1].shape[0])  # or a step of Adam moves it the further
        log_scale = MAX_LOG_SCALE * jnp.tanh(raw[..., 1] / MAX_LOG_SCALE)
        return Knots.of(raw[..., 2:]), raw[..., 0], log_scale

    def _put(self, x: Array, changed: Array) -> Array:
        """Return the values with the transformed ones among them."""
        parts = _halves(self.number, x.shape[-1])
        seen = jnp.broadcast_to(x[..., parts[0]], (*changed.shape[:-1], len(parts[0])))
        return jnp.concatenate([seen, changed], -1)[..., np.argsort(np.concatenate(parts))]

    def _inverse(self, y: Array) -> Array:
        _, changed = _halves(self.number, y.shape[-1])
        knots, shift, log_scale = self._conditioner(y)
        bent = (y[..., changed] - shift) * jnp.exp(-log_scale)
        return self._put(y, knots.unbend(bent))


class Conditioner(nnx.Module):
    """The weights of a `CouplingLayer`, and the map from features to contexts."""

    def __init__(
        self,
        num_features: int,
        size: int,
        hidden_sizes: tuple[int, ...],
        number: int,
        *,
        rngs: nnx.Rngs,
    ):
        seen, changed = _halves(number, size)
        self.number = number
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.context = linear(num_features, hidden_sizes[0])
        # A single value has none beside it: the datum alone chooses the spline.
        self.first = linear(len(seen), hidden_sizes[0], use_bias=False) if size > 1 else None
        self.hidden = nnx.List(linear(*sizes) for sizes in itertools.pairwise(hidden_sizes))
        outputs = len(changed) * (3 * NUM_BINS + 1)
        self.last = linear(hidden_sizes[-1], outputs, kernel_init=initializers.normal(1e-3))

    def layer(self, context: Float[Array, "*batch hidden"]) -> CouplingLayer:
        """Return the transform of the data with these contexts."""
        others = [nnx.to_pure_dict(nnx.state(layer)) for layer in (*self.hidden, self.last)]
        width = self.context.out_features
        first = jnp.zeros((0, width)) if self.first is None else self.first.kernel[...]
        kernels = (first, *(layer["kernel"] for layer in others))
        return CouplingLayer(kernels, tuple(o["bias"] for o in others), context, self.number)


class FlowHead(AbstractHead):
    """Linear maps to ``loc``, ``raw_scale`` and each layer's context, and the layers' weights."""

    def __init__(
        self,
        num_features: int,
        size: int,
        family: Flow,
        *,
        rngs: nnx.Rngs,
    ):
        self.parameterization = for_heads(family.parameterization)
        self.loc = nnx.Linear(num_features, size, rngs=rngs)
        self.raw_scale = constant_linear(
            num_features, size, self.parameterization.init_raw, rngs=rngs
        )
        self.conditioners = nnx.List(
            Conditioner(num_features, size, family.hidden_sizes, number, rngs=rngs)
            for number in range(family.num_layers)
        )

    def __call__(self, features: Float[Array, "*batch k"]) -> Raw:
        """Return ``(loc, raw_scale, contexts)``."""
        contexts = tuple(conditioner.context(features) for conditioner in self.conditioners)
        return self.loc(features), self.raw_scale(features), contexts

    def distribution(self, raw: Raw) -> dist.TransformedDistribution:
        """Return a standard Normal, sent through the layers, scaled and shifted."""
        loc, raw_scale, contexts = raw
        noise = dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1)
        layers: list[Transform] = [
            conditioner.layer(context)
            for conditioner, context in zip(self.conditioners, contexts, strict=True)
        ]
        rescale = LogScaleAffine(loc, self.parameterization.log_scale(raw_scale))
        return dist.TransformedDistribution(noise, [*layers, rescale])

    def marginals(self, raw: Raw) -> None:
        """Return None: they have no closed form."""


@dataclass(frozen=True)
class Flow(AbstractFamily):
    r"""A neural spline flow: Normal noise bent by networks that know the datum.

    .. math::
        z = \text{loc} + \text{scale} \cdot (f_L \circ \dots \circ f_1)(\varepsilon), \qquad
        f_l(x)_i = \begin{cases}
            m_{l,i} + e^{s_{l,i}} \, g_{l,i}(x_i) & i \in A_l \\
            x_i & i \notin A_l
        \end{cases}

    where half of the values, :math:`A_l`, are bent by monotone rational-quadratic splines
    :math:`g_{l,i}` of 8 bins from -4 to 4, which are the identity beyond. One network of each layer
    makes splines, shifts and log-scales (every :math:`|s| < 3`) of the other half and of the
    datum's features: Durkan et al., "Neural Spline Flows", 2019 (arXiv 1906.04032). Layers take
    turns in which half they bend, and pairs of layers in how values are divided. A draw and the
    density of any value take one pass. It starts within a percent of the diagonal Normal with this
    ``loc`` and ``scale``. A single latent value is bent as the datum says.

    Args:
        num_layers: how many :math:`f_l`; with 4 or more, every value depends on every other.
        hidden_sizes: widths of the hidden layers of each network.
        parameterization: what the raw scale means; its ``init_scale`` is where every scale starts.

    Raises:
        ValueError: if there are no layers, or no hidden units.

    Example:
        >>> head = Flow(num_layers=3).head(8, 2, rngs=nnx.Rngs(0))
        >>> flow = head.distribution(head(jnp.zeros((4, 8))))
        >>> flow.log_prob(flow.sample(jax.random.key(0))).shape
        (4,)
    """

    num_layers: int = 4
    hidden_sizes: tuple[int, ...] = (32,)
    parameterization: AbstractParameterization = LogScale()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        if self.num_layers < 1 or not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(
                f"Flow: found num_layers={self.num_layers} and hidden_sizes={self.hidden_sizes}, "
                "expected at least one layer, and sizes of at least 1, such as Flow(2, (32,)). "
                "Without layers it would be DiagonalNormal()."
            )

    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> FlowHead:
        """Return the maps from features to ``(loc, raw_scale, contexts)``, and the layers."""
        return FlowHead(num_features, size, self, rngs=rngs)
