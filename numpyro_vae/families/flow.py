"""A normalizing flow, for posteriors that are not Normal."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_vae.families.base import AbstractFamily, AbstractHead, constant_linear
from numpyro_vae.families.multivariate_normal import CholeskyHead
from numpyro_vae.scales.parameterization import (
    AbstractParameterization,
    LogScale,
    for_heads,
)

__all__ = ["Flow"]

# The scales of a layer lie between exp(-MAX_LOG_SCALE) and exp(MAX_LOG_SCALE).
MAX_LOG_SCALE = 3.0

MAX_SKEW, MAX_LOG_TAIL = 2.0, 0.7  # of a bend
TAIL = 0.1  # the least log-tail of one latent; of n it is TAIL / sqrt(n), which costs the same
START = -0.3  # of the raw outputs for the log-tails, near the least

Vector = Float[Array, "*batch size"]
Raw = tuple[Vector, Vector, Float[Array, "*batch lower"], Vector, Vector, tuple[Array, ...]]


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


@functools.cache
def _masks(sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The masks of a MADE with these sizes of layers: inputs, hidden layers, twice the inputs.

    A hidden unit of degree ``m`` sees the first ``m`` inputs, and output ``i`` those before ``i``.
    """
    inputs = np.arange(1, sizes[0] + 1)
    hidden = [np.round(np.linspace(1, sizes[0] - 1, size)) for size in sizes[1:-1]]
    degrees = [inputs, *hidden, np.tile(inputs - 1, 2)]
    return tuple(seen[:, None] <= degree for seen, degree in itertools.pairwise(degrees))


class InverseAutoregressiveLayer(Transform):
    """``y = reverse(shift(x) + exp(log_scale(x)) * x)``, where entry ``i`` sees those before it.

    NumPyro's ``InverseAutoregressiveTransform`` keeps its network out of its pytree, so that the
    arrays of a network that knows the datum would leak out of jit, scan and vmap; here they are
    leaves.

    Args:
        kernels: of each layer of the conditioner, not masked yet.
        biases: of each layer but the first, whose bias is in ``context``.
        context: what the features of a datum add to the first hidden layer.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        kernels: tuple[Float[Array, "_ _"], ...],
        biases: tuple[Float[Array, " _"], ...],
        context: Float[Array, "*batch hidden"],
    ):
        self.kernels, self.biases, self.context = kernels, biases, context

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        """Return ``y``."""
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Float[Array, "*shape size"]) -> tuple[Array, Array]:
        """Return ``y`` and the log-scales, for `log_abs_det_jacobian` to reuse."""
        shift, log_scale = self._conditioner(x)
        return jnp.flip(shift + jnp.exp(log_scale) * x, -1), log_scale

    def log_abs_det_jacobian(
        self, x: Array, y: Array, intermediates: Array | None = None
    ) -> Float[Array, "*shape"]:
        """Return the sum of the log-scales."""
        log_scale = self._conditioner(x)[1] if intermediates is None else intermediates
        return log_scale.sum(-1)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Return all arrays as leaves."""
        leaves = ("kernels", "biases", "context")
        return tuple(getattr(self, name) for name in leaves), (leaves, {})

    def _conditioner(self, x: Array) -> tuple[Array, Array]:
        """``shift`` and ``log_scale``; after the tanh, both are bounded for any ``x``."""
        masks = _masks((x.shape[-1], *(kernel.shape[1] for kernel in self.kernels)))
        first, *others = (k * mask for k, mask in zip(self.kernels, masks, strict=True))
        hidden = x @ first + self.context
        for kernel, bias in zip(others, self.biases, strict=True):
            hidden = jnp.tanh(hidden) @ kernel + bias
        shift, log_scale = jnp.split(hidden, 2, -1)
        return shift, MAX_LOG_SCALE * jnp.tanh(log_scale / MAX_LOG_SCALE)

    def _inverse(self, y: Array) -> Array:
        y = jnp.flip(y, -1)
        shape = jnp.broadcast_shapes(y.shape[:-1], self.context.shape[:-1])
        start = jnp.zeros((*shape, y.shape[-1]), jnp.result_type(y, self.context))

        def settle_one_more(_: Array, x: Array) -> Array:
            shift, log_scale = self._conditioner(x)
            return (y - shift) * jnp.exp(-log_scale)

        return jax.lax.fori_loop(0, y.shape[-1], settle_one_more, start)


class Conditioner(nnx.Module):
    """The weights of an `InverseAutoregressiveLayer`, and the map from features to contexts."""

    def __init__(
        self, num_features: int, size: int, hidden_sizes: tuple[int, ...], *, rngs: nnx.Rngs
    ):
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.context = linear(num_features, hidden_sizes[0])
        self.first = linear(size, hidden_sizes[0], use_bias=False)
        self.hidden = nnx.List(linear(*sizes) for sizes in itertools.pairwise(hidden_sizes))
        # A last layer near 0 is a transform near the identity; at 0 the others had no gradient.
        self.last = linear(hidden_sizes[-1], 2 * size, kernel_init=initializers.normal(1e-3))

    def layer(self, context: Float[Array, "*batch hidden"]) -> InverseAutoregressiveLayer:
        """Return the transform of the data with these contexts."""
        others = [nnx.to_pure_dict(nnx.state(layer)) for layer in (*self.hidden, self.last)]
        kernels = (self.first.kernel[...], *(layer["kernel"] for layer in others))
        return InverseAutoregressiveLayer(kernels, tuple(o["bias"] for o in others), context)


class FlowHead(AbstractHead):
    """Linear maps to the outputs of a Normal, bends and contexts, and the layers' weights."""

    def __init__(self, num_features: int, size: int, family: Flow, *, rngs: nnx.Rngs):
        parameterization = for_heads(family.parameterization)
        self.normal = CholeskyHead(num_features, size, parameterization, rngs=rngs)
        self.skew = constant_linear(num_features, size, 0.0, rngs=rngs)
        self.log_tail = constant_linear(num_features, size, START, rngs=rngs)
        # A single value has none before it: the layers would only shift and scale it.
        self.conditioners = nnx.List(
            Conditioner(num_features, size, family.hidden_sizes, rngs=rngs)
            for _ in range(family.num_layers if size > 1 else 0)
        )

    def __call__(self, features: Float[Array, "*batch k"]) -> Raw:
        """Return ``(loc, raw_scale, lower, skew, log_tail, contexts)``."""
        contexts = tuple(conditioner.context(features) for conditioner in self.conditioners)
        bends = self.skew(features), self.log_tail(features)
        return *self.normal(features), *bends, contexts

    def distribution(self, raw: Raw) -> dist.TransformedDistribution:
        """Return Normal noise, bent, sent through the layers, correlated, scaled and shifted."""
        loc, raw_scale, lower, skew, log_tail, contexts = raw
        last = self.normal.distribution((loc, raw_scale, lower))
        bend = Bend(MAX_SKEW * jnp.tanh(skew / MAX_SKEW), _log_tail(log_tail))
        layers = [
            conditioner.layer(context)
            for conditioner, context in zip(self.conditioners, contexts, strict=True)
        ]
        transforms = [bend, *layers, *last.transforms]
        return dist.TransformedDistribution(last.base_dist, transforms)

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
        f_l(x)_i = m_{l,i}(x_{<i}, h) + e^{s_{l,i}(x_{<i}, h)} x_i,

    with :math:`C` as in `FullRankNormal`, and a `Bend` :math:`b` of each value by itself, which
    skews it and gives it tails a little heavier than a Normal's, or much heavier. So importance
    weights are bounded, and their k-hat is low, where the guide is near the posterior; if that is
    Normal, it costs 0.001 nats. The :math:`f_l` are an inverse autoregressive flow: the order of
    the values is reversed after each layer, and all :math:`m_l, s_l` are from one masked network
    that sees the datum's features :math:`h` too: Kingma et al., "Improving Variational Inference
    with Inverse Autoregressive Flow", 2016 (arXiv 1606.04934); Germain et al., "MADE", 2015 (arXiv
    1502.03509). Every :math:`|s| < 3`. It starts near the diagonal Normal with this ``loc`` and
    ``scale``.

    A draw and its own density take one pass; the density of any other value takes ``size`` passes.
    A datum with a single latent value has the bend alone: there is nothing before it to depend on.

    Args:
        num_layers: how many :math:`f_l`; with 2 or more, every value depends on every other.
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

    num_layers: int = 2
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
