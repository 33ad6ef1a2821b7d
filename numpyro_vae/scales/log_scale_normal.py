"""A Normal that carries the logarithm of its scale.

NumPyro's Normal holds the scale and takes its logarithm again for every density: ``log(exp(.))``
overflows, underflows and rounds. `LogScaleNormal` holds ``log_scale`` and takes its exponential
only where a scale is really needed, by `saturating_exp`. It is a NumPyro Normal in every other
respect, with the same draws for the same key. Importing this module also registers its analytic
Kullback-Leibler divergences.
"""

import math

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.util import lazy_property, promote_shapes, validate_sample

from numpyro_vae.scales.parameterization import saturating_exp, saturation_limit

__all__ = ["LogScaleNormal"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class LogScaleNormal(dist.Normal):
    r"""Normal distribution given by its location and the logarithm of its scale.

    With :math:`z = (x - \text{loc}) \exp(-\text{log\_scale})`,

    .. math::
        \log p(x) = -\tfrac12 z^2 - \text{log\_scale} - \tfrac12 \log 2\pi, \qquad
        H = \text{log\_scale} + \tfrac12 (1 + \log 2\pi).

    Values and gradients are finite for ``log_scale`` from -1e4 to 1e4 in bfloat16, float32 and
    float64: ``scale`` and ``z`` saturate as `saturating_exp` does, ``log_scale`` does not. The
    density of the distribution's own draw, as an ELBO takes it, uses the very noise the draw was
    made from, so it is exact even where ``scale`` is below the rounding error of ``loc``.

    NumPyro's ``LocScaleReparam`` rebuilds a site from ``loc`` and ``scale``; it needs a Normal.

    Args:
        loc: Mean.
        log_scale: Logarithm of the standard deviation; it broadcasts with ``loc``.
        validate_args: Whether NumPyro checks parameters and values.

    Example:
        >>> d = LogScaleNormal(0.0, -1000.0)
        >>> print(f"{d.entropy():.2f} {d.log_prob(0.0):.2f}")
        -998.58 999.08
        >>> print(f"{kl_divergence(d, dist.Normal(0.0, 1.0)):.2f}")
        999.50
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}  # noqa: RUF012
    reparametrized_params = ["loc", "log_scale"]  # noqa: RUF012

    def __init__(
        self,
        loc: ArrayLike = 0.0,
        log_scale: ArrayLike = 0.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.log_scale = promote_shapes(_floating(loc), _floating(log_scale))
        batch_shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(log_scale))
        # Not Normal's own __init__, which would store a scale.
        dist.Distribution.__init__(self, batch_shape, validate_args=validate_args)

    @lazy_property
    def scale(self) -> Array:
        """Standard deviation, ``exp(log_scale)``, saturated."""
        return saturating_exp(self.log_scale)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws ``loc + scale * eps``, of shape ``sample_shape + batch_shape``."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Array]]:
        """Draws like `sample`, and returns the noise ``eps`` for `log_prob` to reuse."""
        if key is None:
            raise ValueError(
                "LogScaleNormal: found key=None, expected a random key. Pass jax.random.key(0), "
                "or run the model under numpyro.handlers.seed."
            )
        eps = jax.random.normal(key, sample_shape + self.batch_shape)
        return self.loc + eps * self.scale, [eps]

    @validate_sample
    def log_prob(self, value: ArrayLike, intermediates: list[Array] | None = None) -> Array:
        """Log density of ``value``; ``intermediates`` are those it was sampled with, if any."""
        residual = value - self.loc
        if intermediates:
            z = _known_noise(intermediates[0], residual, self.log_scale)
        else:
            z = _standardize(residual, self.log_scale)
        return -0.5 * jnp.square(z) - (self.log_scale + _HALF_LOG_TWO_PI)

    def entropy(self) -> Array:
        """Differential entropy in nats, ``log_scale + (1 + log(2 pi)) / 2``."""
        return jnp.broadcast_to(self.log_scale + (0.5 + _HALF_LOG_TWO_PI), self.batch_shape)

    def cdf(self, value: ArrayLike) -> Array:
        """Probability of a draw below ``value``."""
        z = _standardize(value - self.loc, self.log_scale)
        return ndtr(_at_least_float32(z)).astype(z.dtype)

    def log_cdf(self, value: ArrayLike) -> Array:
        """Log probability of a draw below ``value``, accurate far into the lower tail."""
        z = _standardize(value - self.loc, self.log_scale)
        return log_normal_cdf(_at_least_float32(z)).astype(z.dtype)

    def icdf(self, q: ArrayLike) -> Array:
        """The value below which a draw falls with probability ``q``, for ``0 < q < 1``."""
        q = _floating(q)
        return self.loc + self.scale * ndtri(_at_least_float32(q)).astype(q.dtype)


@kl_divergence.register(LogScaleNormal, LogScaleNormal)
def _kl_log_scale_log_scale(p: LogScaleNormal, q: LogScaleNormal) -> Array:
    return _kl_normal(p.loc - q.loc, p.log_scale, q.log_scale)


@kl_divergence.register(LogScaleNormal, dist.Normal)
def _kl_log_scale_normal(p: LogScaleNormal, q: dist.Normal) -> Array:
    return _kl_normal(p.loc - q.loc, p.log_scale, jnp.log(q.scale))


@kl_divergence.register(dist.Normal, LogScaleNormal)
def _kl_normal_log_scale(p: dist.Normal, q: LogScaleNormal) -> Array:
    return _kl_normal(p.loc - q.loc, jnp.log(p.scale), q.log_scale)


def _kl_normal(residual: Array, p_log_scale: Array, q_log_scale: Array) -> Array:
    """``KL(p || q) = ((loc_p - loc_q) / scale_q)**2 / 2 + (expm1(2 d) - 2 d) / 2``.

    Here ``d`` is the log-scale of ``p`` less that of ``q``: Kingma and Welling, "Auto-Encoding
    Variational Bayes", 2013 (arXiv 1312.6114, appendix B), for a ``q`` that is not standard.
    """
    z = _standardize(residual, q_log_scale)
    return 0.5 * jnp.square(z) + _excess(p_log_scale - q_log_scale)


@jax.custom_jvp
def _excess(d: Array) -> Array:
    """``(expm1(2 d) - 2 d) / 2``; its derivative is ``expm1(2 d)``, without cancellation."""
    return 0.5 * _expm1_twice(d) - d


@_excess.defjvp
def _excess_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _excess(*primals), _expm1_twice(*primals) * tangents[0]


def _expm1_twice(d: Array) -> Array:
    """``expm1(2 d)``, saturated."""
    limit = saturation_limit(d.dtype)
    return jnp.expm1(2 * jnp.clip(d, -limit, limit))


@jax.custom_jvp
def _standardize(residual: Array, log_scale: Array) -> Array:
    """``z = residual * exp(-log_scale)``, saturated so that its square is finite.

    As in `saturating_exp`, the derivative is that of the formula at the saturated value.
    """
    z = residual * saturating_exp(-log_scale)
    largest = math.exp(saturation_limit(z.dtype))
    return jnp.clip(z, -largest, largest)


@_standardize.defjvp
def _standardize_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    z = _standardize(*primals)
    return z, tangents[0] * saturating_exp(-primals[1]) - z * tangents[1]


@jax.custom_jvp
def _known_noise(eps: Array, residual: Array, log_scale: Array) -> Array:
    """``eps``, with the derivatives of `_standardize`, whose value it is but for rounding."""
    return eps


@_known_noise.defjvp
def _known_noise_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    z = _known_noise(*primals)  # not the bare noise, whose own derivative is 0
    return z, tangents[1] * saturating_exp(-primals[2]) - z * tangents[2]


@jax.custom_jvp
def log_normal_cdf(z: Array) -> Array:
    """JAX's ``log_ndtr``, whose own derivative is 1 instead of ``-z`` far in the lower tail."""
    return log_ndtr(z)


@log_normal_cdf.defjvp
def log_normal_cdf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The inverse Mills ratio: phi(z) / Phi(z), or its asymptotic series where phi(z) is tiny.
    (z,) = primals
    log_cdf = log_normal_cdf(z)
    edge = -10.0 if z.dtype == jnp.float32 else -100.0
    x, far = jnp.maximum(z, edge), jnp.minimum(z, edge)
    near_ratio = jnp.exp(-0.5 * jnp.square(x) - _HALF_LOG_TWO_PI - log_ndtr(x))
    u = 1 / jnp.square(far)
    far_ratio = -far * (1 + u * (1 - u * (2 - 10 * u)))
    return log_cdf, jnp.where(z < edge, far_ratio, near_ratio) * tangents[0]


def _floating(x: ArrayLike) -> Array:
    """``x`` as an array, of the default floating dtype if it is not floating."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def _at_least_float32(x: Array) -> Array:
    """``x`` in a dtype that JAX's special functions take."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
