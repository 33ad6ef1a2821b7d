"""What a family is, on one page.

A **family** turns features into a NumPyro distribution over the latents of **one** datum: the
vector of ``size`` unconstrained values of its local sites, side by side in the model's order.
A new one is one file with two classes, written for one datum; batching, splitting by site,
supports, masks and log-determinants are done for you:

* a family, a frozen dataclass of options whose `AbstractFamily.head` returns
* a head, an ``nnx.Module`` with the weights. It maps features ``(*batch, k)`` to ``raw``, a pytree
  of arrays with ``batch`` in front, and `AbstractHead.distribution` makes of the ``raw`` of one
  datum (no batch axis, or any number of them in front) a distribution with
  ``event_shape == (size,)``. A head that has weights in its distribution, as that of a flow has,
  reads them from itself, and what depends on the datum from ``raw``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Bool, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_vae.scales.parameterization import saturating_exp, saturation_limit

__all__ = ["AbstractFamily", "AbstractHead"]


Normal = tuple[Float[Array, "*batch size"], Float[Array, "*batch size size"]]


class AbstractHead(nnx.Module):
    """From features to a distribution over a datum's latents; see the module's docstring."""

    @abstractmethod
    def __call__(self, features: Float[Array, "*batch k"]) -> Any:
        """Return the raw outputs, arrays with ``batch`` in front.

        Args:
            features: what the encoder says of each datum.
        """

    @abstractmethod
    def distribution(self, raw: Any) -> dist.Distribution:
        """Return the distribution over a datum's unconstrained latents.

        Args:
            raw: what the head returned, ``(*batch, ...)``.

        Returns:
            A distribution with ``batch_shape == batch`` and ``event_shape == (size,)``.
        """

    @abstractmethod
    def marginals(self, raw: Any) -> dist.Distribution | None:
        """Return the distribution of every latent value by itself, if it is known.

        Args:
            raw: what the head returned, ``(*batch, ...)``.

        Returns:
            A distribution with ``batch_shape == (*batch, size)`` that has a mean, a variance and
            ``icdf``; None if there is no closed form.
        """

    def as_normal(self, raw: Any) -> Normal | None:
        """Return ``loc`` and ``scale_tril`` of the Normal that the distribution is; None if not.

        Args:
            raw: what the head returned, ``(*batch, ...)``.
        """
        return None

    def part(self, raw: Any, mask: Bool[Array, "*batch size"]) -> dist.Distribution | None:
        """Return a distribution that draws all latents, with the density of some alone.

        A family that is factorized does not need it.

        Args:
            raw: what the head returned, ``(*batch, ...)``.
            mask: True for the latents that count; the model masks the others.

        Returns:
            A distribution as that of `distribution`; None if that density is not known.
        """
        return None


class AbstractFamily(ABC):
    """The contract of a guide family; see the module's docstring.

    Attributes:
        has_density: whether importance weights can be had of it; of a point they cannot.
        is_factorized: whether the distribution is the product of its marginals, and each of these
            depends on its own entries ``[..., i]`` of ``raw`` alone. The guide then declares every
            site with its own distribution; otherwise it draws the latents jointly.
        maps_bounded: whether latents between two bounds are mapped once more, so that a uniform
            one is standard Normal to the head; see `Bounded`.
    """

    has_density: ClassVar[bool] = True
    is_factorized: ClassVar[bool] = False
    maps_bounded: ClassVar[bool] = False

    @abstractmethod
    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> AbstractHead:
        """Return the module with the weights of the family.

        Args:
            num_features: the length of a feature vector.
            size: the number of unconstrained latent values of a datum.
            rngs: where the initial weights come from.
        """

    def pair(self) -> AbstractHead:
        """Return a head without weights, for an encoder that returns ``(loc, raw_scale)`` itself.

        Raises:
            TypeError: if the family is not made of such a pair.
        """
        raise TypeError(
            f"The encoder returned a pair (loc, raw_scale), but {type(self).__name__} needs "
            "features. Return one array of shape (batch, k) from the encoder."
        )


# -- what several families share -----------------------------------------------------------------

# GPUs and TPUs multiply matrices with some ten bits by default. That is enough for networks; but
# the inverse of a correlation magnifies what was lost, in the densities of a guide's own draws.
full_precision = partial(jax.default_matmul_precision, "highest")


class LogScaleAffine(Transform):
    """``loc + exp(log_scale) * x`` for vectors ``x``: a standardized distribution put in its place.

    NumPyro's ``AffineTransform`` takes a scale; this takes its logarithm, as `LogScaleNormal` does,
    and stays finite where ``exp`` does not. A draw's density uses the very ``x`` it was made from.

    Args:
        loc: where 0 goes.
        log_scale: the logarithm of the factor of each entry.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, loc: Float[Array, "*batch size"], log_scale: Float[Array, "*batch size"]):
        self.loc, self.log_scale = loc, log_scale

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        """Return ``loc + exp(log_scale) * x``, with a saturated exponential."""
        return self.loc + saturating_exp(self.log_scale) * x

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Return the sum of the log-scales, which do not saturate."""
        return jnp.broadcast_to(self.log_scale.sum(-1), x.shape[:-1])

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Return both arrays as leaves."""
        return (self.loc, self.log_scale), (("loc", "log_scale"), {})

    def _inverse(self, y: Array) -> Array:
        x = (y - self.loc) * saturating_exp(-self.log_scale)
        largest = math.exp(saturation_limit(x.dtype))  # of which the square is finite
        return jnp.clip(x, -largest, largest)


class PartOfNormal(dist.Distribution):
    """A multivariate Normal of which some values do not count: their density is integrated out.

    Args:
        whole: the distribution of all values, from which draws come.
        apart: the same without the correlations of the values that do not count, which are
            independent Normals there.
        loc: the means.
        log_scale: the log-scales of those independent Normals; the others are not used.
        counts: True for the values that count.
    """

    pytree_data_fields = ("whole", "apart", "loc", "log_scale", "counts")
    support = constraints.real_vector

    def __init__(
        self,
        whole: dist.Distribution,
        apart: dist.Distribution,
        loc: Float[Array, "*batch size"],
        log_scale: Float[Array, "*batch size"],
        counts: Bool[Array, "*batch size"],
    ):
        self.whole, self.apart, self.counts = whole, apart, counts
        self.loc, self.log_scale = loc, log_scale
        super().__init__(whole.batch_shape, whole.event_shape)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw all values."""
        return jnp.asarray(self.whole.sample(key, sample_shape))

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """Return the log-density of the values that count."""
        centred = jnp.where(self.counts, value, self.loc)
        left_out = jnp.where(self.counts, 0.0, -self.log_scale - 0.5 * math.log(2 * math.pi))
        return jnp.asarray(self.apart.log_prob(centred)) - left_out.sum(-1)


def constant_linear(num_features: int, size: int, start: float, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a linear map that starts at a constant, whatever the features; heads share it."""
    return nnx.Linear(
        num_features,
        size,
        kernel_init=initializers.zeros,
        bias_init=initializers.constant(start),
        rngs=rngs,
    )
