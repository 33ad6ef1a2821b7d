"""What a network's raw output means: how it is turned into a scale.

A network's second output is any real number; a scale is positive. Code that learns
``log(scale**2)`` and code that learns ``log(scale)`` differ by a factor of two, and a number
written by one and read by the other is silently wrong. So the meaning is an object, stated once.

**Saturation.** Every exponential here is `saturating_exp`. It stays between ``finfo.max**-0.4``
and ``finfo.max**0.4`` (3.9e-16 and 2.6e15 in float32 and bfloat16), so that the product of any two
is finite, with room to sum ten million of them. Its derivative saturates with it and does not
vanish: a head that has left the range is still pulled back. ``log_scale`` does not saturate.
"""

import abc
import dataclasses
import functools
import math
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

__all__ = [
    "AbstractParameterization",
    "LogScale",
    "LogVariance",
    "Scale",
    "Softplus",
    "for_heads",
    "get_parameterization",
    "reparameterize",
]

Floats = Float[Array, "*shape"]
FloatsLike = Float[ArrayLike, "*shape"]


def saturation_limit(dtype: DTypeLike) -> float:
    """``0.4 * log(finfo(dtype).max)``, the largest exponent that `saturating_exp` uses."""
    return 0.4 * math.log(float(jnp.finfo(dtype).max))


@jax.custom_jvp
def saturating_exp(x: FloatsLike) -> Floats:
    """The exponential, with value and derivative kept within the dtype's usable range.

    ``y = exp(clip(x, -limit, limit))`` with ``dy/dx = y`` also beyond the limits, where the
    derivative of the clipped function is 0 and would leave a network stuck. NaN stays NaN.

    Example:
        >>> float(jax.grad(saturating_exp)(0.0)), bool(jnp.isfinite(saturating_exp(1e4)))
        (1.0, True)
    """
    limit = saturation_limit(jnp.result_type(x))
    return jnp.exp(jnp.clip(x, -limit, limit))


@saturating_exp.defjvp
def _saturating_exp_jvp(primals: tuple[ArrayLike], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = saturating_exp(*primals)
    return y, y * tangents[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractParameterization(abc.ABC):
    """Maps a network's raw output to the scale of a distribution, and back.

    To write another, subclass this, define the three abstract methods, elementwise and in plain
    JAX, and add a row to `PARAMETERIZATIONS`, the table that the tests run over: value and gradient
    are finite for ``raw`` from -1e4 to 1e4 in bfloat16, float32 and float64. Override nothing else.
    Instances are immutable, hashable, picklable and equal by value.

    **Bounds.** With ``bounds=(low, high)`` the logarithm ``u`` of the unbounded scale becomes

        ``log_scale = c + e / sqrt(1 + (e / m)**2)``,

    with ``m = min(1, log(high / low) / 4)``, ``c = clip(u, log(low) + m, log(high) - m)`` and
    ``e = u - c``. Scales at least a factor ``exp(m)`` inside the bounds are left exactly as they
    are; the rest bend towards the bounds: increasing, invertible, twice continuously
    differentiable. The derivative falls only as ``|e|**-3``, so no raw output is without gradient.

    Args:
        init_scale: The scale that a fresh head starts at; the head's bias is then ``init_raw``.
        bounds: Smallest and largest scale, with ``init_scale`` between them, or None.

    Example:
        >>> p = LogVariance(init_scale=0.5, bounds=(1e-3, 10.0))
        >>> print(f"{p.scale(p.init_raw):.4f}", f"{p.scale(jnp.array(1e4)):.3f}")
        0.5000 10.000
    """

    init_scale: float = 1.0
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        limit = math.exp(saturation_limit("float32"))
        try:
            low, high = map(float, (1 / limit, limit) if self.bounds is None else self.bounds)
            init_scale = float(self.init_scale)
        except (TypeError, ValueError):
            low = high = init_scale = math.nan
        if not 1 / limit <= low < init_scale < high <= limit:
            raise ValueError(
                f"{type(self).__name__}: found init_scale={self.init_scale!r} with bounds="
                f"{self.bounds!r}, expected {1 / limit:.1e} <= low < init_scale < high <= "
                f"{limit:.1e}, or bounds=None. Change the number that breaks this order."
            )
        object.__setattr__(self, "init_scale", init_scale)
        object.__setattr__(self, "bounds", None if self.bounds is None else (low, high))

    @abc.abstractmethod
    def unbounded_scale(self, raw: Floats) -> Floats:
        """The scale before bounds: positive, and increasing in ``raw``."""

    @abc.abstractmethod
    def unbounded_log_scale(self, raw: Floats) -> Floats:
        """The logarithm of ``unbounded_scale``, by a formula that never takes ``log(exp(.))``."""

    @abc.abstractmethod
    def unbounded_inverse(self, scale: Floats) -> Floats:
        """The raw output that gives ``scale``, the inverse of ``unbounded_scale``."""

    @final
    def scale(self, raw: FloatsLike) -> Floats:
        """The scale, saturated where the dtype cannot hold its square."""
        if self.bounds is None:
            return self.unbounded_scale(jnp.asarray(raw))
        return saturating_exp(self.log_scale(raw))

    @final
    def log_scale(self, raw: FloatsLike) -> Floats:
        """The logarithm of the scale; it does not saturate."""
        log_scale = self.unbounded_log_scale(jnp.asarray(raw))
        if self.bounds is None:
            return log_scale
        *limits, margin = _inner_limits(self.bounds)
        middle = jnp.clip(log_scale, *limits)
        return middle + _bend(log_scale - middle, margin)

    @final
    def log_variance(self, raw: FloatsLike) -> Floats:
        """``2 * log_scale(raw)``, to the last bit."""
        return 2 * self.log_scale(raw)

    @final
    def inverse(self, scale: FloatsLike) -> Floats:
        """The raw output whose scale is ``scale``; not finite where no raw output has it."""
        scale = jnp.asarray(scale)
        if self.bounds is None:
            return self.unbounded_inverse(scale)
        *limits, margin = _inner_limits(self.bounds)
        middle = jnp.clip(jnp.log(scale), *limits)
        bent = (jnp.log(scale) - middle) / margin
        unbent = jnp.exp(middle + margin * bent / jnp.sqrt((1 - bent) * (1 + bent)))
        return self.unbounded_inverse(jnp.where(bent == 0, scale, unbent))

    @property
    @final
    def init_raw(self) -> float:
        """``inverse(init_scale)``, a number also under ``jit``: the bias of a fresh head."""
        with jax.ensure_compile_time_eval():
            return float(self.inverse(self.init_scale))


@final
class LogScale(AbstractParameterization):
    """The raw output is the logarithm of the scale: ``scale = exp(raw)``.

    Example:
        >>> float(LogScale().log_scale(-3.0))
        -3.0
    """

    def unbounded_scale(self, raw: Floats) -> Floats:
        """``exp(raw)``."""
        return saturating_exp(raw)

    def unbounded_log_scale(self, raw: Floats) -> Floats:
        """``raw``."""
        return raw

    def unbounded_inverse(self, scale: Floats) -> Floats:
        """``log(scale)``."""
        return jnp.log(scale)


@final
class LogVariance(AbstractParameterization):
    """The raw output is the logarithm of the variance: ``scale = exp(raw / 2)``.

    Halving is exact in binary, so this is `LogScale` of ``raw / 2`` bit for bit. It is the form of
    Kingma and Welling, "Auto-Encoding Variational Bayes", 2013 (arXiv 1312.6114, appendix C).
    ``init_scale`` and ``bounds`` are scales here too, not variances.

    Example:
        >>> float(LogVariance().log_scale(-3.0))
        -1.5
    """

    def unbounded_scale(self, raw: Floats) -> Floats:
        """``exp(raw / 2)``."""
        return saturating_exp(0.5 * raw)

    def unbounded_log_scale(self, raw: Floats) -> Floats:
        """``raw / 2``."""
        return 0.5 * raw

    def unbounded_inverse(self, scale: Floats) -> Floats:
        """``2 * log(scale)``."""
        return 2 * jnp.log(scale)


@final
class Softplus(AbstractParameterization):
    """The scale is linear in a large raw output: ``scale = log(1 + exp(raw))``.

    Example:
        >>> float(Softplus().log_scale(-1000.0)), float(Softplus().scale(50.0))
        (-1000.0, 50.0)
    """

    def unbounded_scale(self, raw: Floats) -> Floats:
        """``log(1 + exp(raw))``."""
        limit = saturation_limit(raw.dtype)
        body = jax.nn.softplus(jnp.maximum(raw, -limit))
        return jnp.where(raw < -limit, saturating_exp(raw), body)

    def unbounded_log_scale(self, raw: Floats) -> Floats:
        """``log(log(1 + exp(raw)))``, which is ``raw`` to rounding where ``exp(raw)`` is small."""
        limit = saturation_limit(raw.dtype)
        return jnp.where(raw < -limit, raw, jnp.log(self.unbounded_scale(raw)))

    def unbounded_inverse(self, scale: Floats) -> Floats:
        """``log(exp(scale) - 1)``, in a form that does not overflow."""
        return scale + jnp.log(-jnp.expm1(-scale))


@final
class Scale(AbstractParameterization):
    """The raw output is the scale: of an encoder that returns a standard deviation.

    What is not positive is no scale, and gets the smallest one that has a finite square,
    ``finfo.max**-0.4``. There the gradient is that of ``log|raw|`` with the sign turned, which
    pulls the output back above 0. A head of the guide, which is linear, is not held above 0 by
    itself, and uses `Softplus` instead; see `for_heads`.

    Example:
        >>> float(Scale().scale(0.25)), float(Scale().log_scale(1.0))
        (0.25, 0.0)
    """

    def unbounded_scale(self, raw: Floats) -> Floats:
        """``raw``."""
        return _saturated(raw)

    def unbounded_log_scale(self, raw: Floats) -> Floats:
        """``log(raw)``."""
        return _log_of_positive(raw)

    def unbounded_inverse(self, scale: Floats) -> Floats:
        """``scale``."""
        return scale


@jax.custom_jvp
def _saturated(raw: Array) -> Array:
    """``raw`` within the dtype's usable range of scales; its derivative is 1 everywhere."""
    largest = math.exp(saturation_limit(raw.dtype))
    return jnp.clip(raw, 1 / largest, largest)


@_saturated.defjvp
def _saturated_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _saturated(*primals), tangents[0]


@jax.custom_jvp
def _log_of_positive(raw: Array) -> Array:
    """``log(raw)``, of what is not positive that of the smallest scale."""
    return jnp.log(jnp.maximum(raw, math.exp(-saturation_limit(raw.dtype))))


@_log_of_positive.defjvp
def _log_of_positive_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Below 0 no steeper than its mirror image: the slope of the smallest scale, 1e15, would fill
    # an optimizer's second moments for the rest of the training.
    smallest = math.exp(-saturation_limit(primals[0].dtype))
    return _log_of_positive(*primals), tangents[0] / jnp.maximum(jnp.abs(primals[0]), smallest)


PARAMETERIZATIONS: dict[str, type[AbstractParameterization]] = {
    "log_scale": LogScale,
    "log_variance": LogVariance,
    "softplus": Softplus,
    "scale": Scale,
}


def get_parameterization(parameterization: object) -> AbstractParameterization:
    """The parameterization that a user asked for, by name or as an object.

    An object is returned as it is; what is not a key of `PARAMETERIZATIONS` is a ValueError.

    Example:
        >>> get_parameterization("log_variance")
        LogVariance(init_scale=1.0, bounds=None)
    """
    if isinstance(parameterization, AbstractParameterization):
        return parameterization
    if isinstance(parameterization, str) and parameterization in PARAMETERIZATIONS:
        return PARAMETERIZATIONS[parameterization]()
    raise ValueError(
        f"scale parameterization: found {parameterization!r}, expected one of "
        f"{', '.join(PARAMETERIZATIONS)} or an object such as LogVariance(init_scale=0.1). Pass "
        "what the network's raw output means."
    )


def for_heads(parameterization: AbstractParameterization) -> AbstractParameterization:
    """What the guide's own heads use, whose raw outputs are any real numbers.

    That is the parameterization itself, but `Softplus` for `Scale`: a linear map does not stay
    positive.

    Example:
        >>> for_heads(Scale(init_scale=0.1))
        Softplus(init_scale=0.1, bounds=None)
    """
    if isinstance(parameterization, Scale):
        return Softplus(init_scale=parameterization.init_scale, bounds=parameterization.bounds)
    return parameterization


def reparameterize(
    rng_key: Array, loc: ArrayLike, raw: ArrayLike, parameterization: object = "log_scale"
) -> Array:
    """Draws ``loc + scale * eps`` with ``eps ~ Normal(0, 1)``, differentiable in loc and raw.

    ``parameterization`` says what the network's output ``raw`` means: see `get_parameterization`.

    Example:
        >>> reparameterize(jax.random.key(0), jnp.zeros((3, 2)), jnp.zeros(2), "softplus").shape
        (3, 2)
    """
    scale = get_parameterization(parameterization).scale(raw)
    shape, dtype = jnp.broadcast_shapes(jnp.shape(loc), scale.shape), jnp.result_type(loc, scale)
    return jnp.add(loc, scale * jax.random.normal(rng_key, shape, dtype))


def _inner_limits(bounds: tuple[float, float]) -> tuple[float, float, float]:
    """Where the log-scale starts to bend, below and above, and the margin it bends within."""
    low, high = math.log(bounds[0]), math.log(bounds[1])
    margin = min(1.0, (high - low) / 4)
    return low + margin, high - margin, margin


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _bend(excess: Array, margin: float) -> Array:
    """``e / sqrt(1 + (e / m)**2)``: the identity near 0, between ``-m`` and ``m`` everywhere."""
    return excess / jnp.sqrt(1 + jnp.square(excess / margin))


@_bend.defjvp
def _bend_jvp(m: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Autodiff would form (1 + q**2)**-1.5 as a difference that cancels to 0 for a large q.
    slope = jax.lax.rsqrt(1 + jnp.square(primals[0] / m)) ** 3
    return _bend(primals[0], m), slope * tangents[0]
