"""A normalizing flow, for posteriors that are not Normal."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_vae.families.base import (
    AbstractFamily,
    AbstractHead,
    constant_linear,
    full_precision,
)
from numpyro_vae.families.multivariate_normal import CholeskyHead
from numpyro_vae.layers.splines import NUM_OUTPUTS, Knots
from numpyro_vae.scales.parameterization import (
    AbstractParameterization,
    LogScale,
    for_heads,
)

__all__ = ["Flow"]

MAX_LOG_SCALE = 3.0  # the scales of a layer lie between exp(-MAX_LOG_SCALE) and exp(MAX_LOG_SCALE)
MAX_SKEW, MAX_LOG_TAIL = 2.0, 0.7  # of a bend
TAIL = 0.1  # the least log-tail of one latent; of n it is TAIL / sqrt(n), which costs the same
START = -0.3  # of the raw outputs for the log-tails, near the least

Vector = Float[Array, "*batch size"]
Raw = tuple[
    Vector,
    Vector,
    Float[Array, "*batch lower"],
    Vector,
    Vector,
    tuple[Float[Array, "*batch hidden"], ...],
]


@functools.cache
def _halves(number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of ``size`` values a layer reads, and which of them it transforms.

    Pairs of layers transform both halves of the values in turn, and each pair divides them by
    another digit of their binary numbers, so that any two values are apart in some pair.
    """
    values = np.arange(size, dtype=np.int32)  # as JAX adds to indices, whatever its precision
    digit = (number // 2) % (size - 1).bit_length()
    transformed = (values >> digit) % 2 == number % 2
    return values[~transformed], values[transformed]


class Bend(Transform):
    r"""Makes a Normal value skewed, and its tails heavier or lighter, each value by itself.

    .. math::
        y = \frac{\sinh(\delta (\operatorname{asinh}(x) + \epsilon)) - \sinh(\delta \epsilon)}
                 {\delta \cosh(\delta \epsilon)}

    is the sinh-arcsinh transform of Jones and Pewsey (*Sinh-arcsinh distributions*, Biometrika
    2009), shifted and scaled to keep 0 and the slope there, so that it does not take the part of a
    location and a scale.

    Args:
        skew: :math:`\epsilon`; 0 is symmetric.
        log_tail: :math:`\log \delta`; tails are heavier above 0, and lighter below.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, skew: Vector, log_tail: Vector):
        self.skew, self.log_tail = skew, log_tail

    def __call__(self, x: Vector) -> Vector:
        """Return ``y``."""
        tail, shift, slope = self._constants()
        return (jnp.sinh(tail * (jnp.arcsinh(x) + self.skew)) - shift) / slope

    def log_abs_det_jacobian(
        self, x: Array, y: Array, intermediates: Array | None = None
    ) -> Float[Array, "*shape"]:
        """Return the sum of the logarithms of the slopes."""
        tail, _, slope = self._constants()
        start = jnp.arcsinh(x)
        slopes = _log_cosh(tail * (start + self.skew)) - _log_cosh(start) + jnp.log(tail / slope)
        return slopes.sum(-1)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Return both arrays as leaves."""
        return (self.skew, self.log_tail), (("skew", "log_tail"), {})

    def _inverse(self, y: Vector) -> Vector:
        tail, shift, slope = self._constants()
        return jnp.sinh(jnp.arcsinh(y * slope + shift) / tail - self.skew)

    def _constants(self) -> tuple[Vector, Vector, Vector]:
        """Return delta, and the value and the slope at 0 that are taken away."""
        tail = jnp.exp(self.log_tail)
        return tail, jnp.sinh(tail * self.skew), tail * jnp.cosh(tail * self.skew)


def _log_cosh(x: Vector) -> Vector:
    """Return ``log(cosh(x))``, whose cosh does not overflow."""
    return jnp.logaddexp(x, -x) - math.log(2)


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
        with full_precision():
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
        self.first = linear(len(seen), hidden_sizes[0], use_bias=False)
        self.hidden = nnx.List(linear(*sizes) for sizes in itertools.pairwise(hidden_sizes))
        outputs = len(changed) * (2 + NUM_OUTPUTS)  # a shift, a log-scale and a spline each
        self.last = linear(hidden_sizes[-1], outputs, kernel_init=initializers.normal(1e-3))

    def layer(self, context: Float[Array, "*batch hidden"]) -> CouplingLayer:
        """Return the transform of the data with these contexts."""
        others = [nnx.to_pure_dict(nnx.state(layer)) for layer in (*self.hidden, self.last)]
        kernels = (self.first.kernel[...], *(layer["kernel"] for layer in others))
        return CouplingLayer(kernels, tuple(o["bias"] for o in others), context, self.number)


class FlowHead(AbstractHead):
    """Linear maps to the outputs of a Normal, bends and contexts, and the layers' weights."""

    def __init__(self, num_features: int, size: int, family: Flow, *, rngs: nnx.Rngs):
        parameterization = for_heads(family.parameterization)
        self.normal = CholeskyHead(num_features, size, parameterization, rngs=rngs)
        self.skew = constant_linear(num_features, size, 0.0, rngs=rngs)
        self.log_tail = constant_linear(num_features, size, START, rngs=rngs)
        # A single value has none beside it.
        self.conditioners = nnx.List(
            Conditioner(num_features, size, family.hidden_sizes, number, rngs=rngs)
            for number in range(family.num_layers if size > 1 else 0)
        )

    def __call__(self, features: Float[Array, "*batch k"]) -> Raw:
        """Return ``(loc, raw_scale, lower, skew, log_tail, contexts)``."""
        contexts = tuple(conditioner.context(features) for conditioner in self.conditioners)
        return *self.normal(features), self.skew(features), self.log_tail(features), contexts

    def distribution(self, raw: Raw) -> dist.TransformedDistribution:
        """Return Normal noise, bent, sent through the layers, correlated, scaled and shifted."""
        loc, raw_scale, lower, skew, log_tail, contexts = raw
        normal = self.normal.distribution((loc, raw_scale, lower))
        bend = Bend(MAX_SKEW * jnp.tanh(skew / MAX_SKEW), _log_tail(log_tail))
        layers = [
            conditioner.layer(context)
            for conditioner, context in zip(self.conditioners, contexts, strict=True)
        ]
        transforms = [bend, *layers, *normal.transforms]
        return dist.TransformedDistribution(normal.base_dist, transforms)

    def marginals(self, raw: Raw) -> None:
        """Return None: they have no closed form."""


def _log_tail(raw: Vector) -> Vector:
    """Return log-tails from the least to ``MAX_LOG_TAIL`` more, near the least at ``START``."""
    least, more = TAIL / math.sqrt(raw.shape[-1]), jax.nn.softplus(10 * raw) / 10
    return least + MAX_LOG_TAIL * jnp.tanh(more / MAX_LOG_TAIL)


@dataclass(frozen=True)
class Flow(AbstractFamily):
    r"""A full-rank Normal whose noise is bent by networks that know the datum.

    .. math::
        z = \text{loc} + \text{diag}(\text{scale})\, C\,
        (f_L \circ \dots \circ f_1 \circ b)(\varepsilon), \qquad
        f_l(x)_i = \begin{cases}
            m_{l,i} + e^{s_{l,i}} \, g_{l,i}(x_i) & i \in A_l \\
            x_i & i \notin A_l
        \end{cases}

    with :math:`C` as in `FullRankNormal`. Half of the values, :math:`A_l`, are bent by monotone
    rational-quadratic splines :math:`g_{l,i}` of 8 bins from -4 to 4, which are the identity
    beyond. One network of each layer makes splines, shifts and log-scales (every :math:`|s| < 3`)
    of the other half and of the datum's features: Durkan et al., "Neural Spline Flows", 2019 (arXiv
    1906.04032). Layers take turns in which half they bend, and pairs of layers in how values are
    divided.

    A `Bend` :math:`b` of each value by itself skews it, and gives it tails a little heavier than a
    Normal's, or much heavier, so that importance weights have no heavy tail, and their k-hat is
    low, where the guide is near the posterior; if that is Normal, it costs 0.001 nats.

    A latent between two bounds is the logit of :math:`\Phi(z)`, so that a uniform one is standard
    Normal; the tails of its logit are no Normal's, which splines do not mend.

    A draw and the density of any value take one pass. It starts near the diagonal Normal with this
    ``loc`` and ``scale``. A single latent value has the bend alone.

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

    maps_bounded: ClassVar[bool] = True
    num_layers: int = 4
    hidden_sizes: tuple[int, ...] = (32,)
    parameterization: AbstractParameterization = LogScale()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        if self.num_layers < 1 or not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(
                f"Flow: found num_layers={self.num_layers} and hidden_sizes={self.hidden_sizes}, "
                "expected at least one layer, and sizes of at least 1, such as Flow(4, (32,)). "
                "Without layers it would be nearly FullRankNormal()."
            )

    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> FlowHead:
        """Return the maps from features to ``(loc, raw_scale, contexts)``, and the layers."""
        return FlowHead(num_features, size, self, rngs=rngs)
