"""Guides whose local posterior is read off each datum by a network: one for each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from numpyro_vae.families import (
    DiagonalNormal,
    Flow,
    FullRankNormal,
    LowRankNormal,
    PointEstimate,
)
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.guides.network import Encoder
from numpyro_vae.guides.options import GuideOptions
from numpyro_vae.scales.parameterization import AbstractParameterization, get_parameterization

__all__ = [
    "AutoAmortizedDelta",
    "AutoAmortizedFlow",
    "AutoAmortizedLowRankMultivariateNormal",
    "AutoAmortizedMultivariateNormal",
    "AutoAmortizedNormal",
]


class AutoAmortizedNormal(AmortizedGuide):
    r"""A guide that reads a Normal posterior over each datum's latents off the datum itself.

    A network maps a datum :math:`x_i` to ``loc`` and a raw scale, and the guide is

    .. math:: q(z_i \mid x_i) = \mathrm{Normal}(\mathrm{loc}(x_i), \mathrm{scale}(x_i)),

    over the unconstrained latents of the datum, sampled with the reparameterization trick and
    mapped to each site's support. Latent sites outside the local plate go to ``global_guide``.
    Everything else is read from the model. The guide works wherever NumPyro takes one.

    Args:
        model: a NumPyro model with latent sites in a plate.
        encoder: a network, or a builder of one; see `numpyro_vae.encoders.base`.
        scale: what the network's second output means: ``"log_scale"``, ``"log_variance"``,
            ``"softplus"``, ``"scale"`` (it is the standard deviation itself), or a
            parameterization with its own initial scale and bounds. By default a log-scale; `fit`
            warns if an encoder's own output does not look like one.
        options: see `GuideOptions`.

    Raises:
        ValueError: at the first call, if the model has no latent site in a plate or several
            candidate plates, nothing observed to encode, a discrete local site that is not
            enumerated, or if the encoder's output has not the shape that the sites need.

    Reference:
        Kingma and Welling, *Auto-Encoding Variational Bayes*, ICLR 2014.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpy as np, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> x = np.linspace(-2.0, 2.0, 50)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-2), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 500, x, progress_bar=False)
        >>> draws = svi.guide.sample_posterior(
        ...     jax.random.key(1), result.params, x[:3], sample_shape=(1000,)
        ... )
        >>> draws["z"].shape
        (1000, 3)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | None = None,
        *,
        scale: str | AbstractParameterization | None = None,
        **options: Unpack[GuideOptions],
    ):
        self.scale_is_declared = scale is not None
        family = DiagonalNormal(get_parameterization("log_scale" if scale is None else scale))
        super().__init__(model, encoder, family=family, **options)


class AutoAmortizedMultivariateNormal(AmortizedGuide):
    r"""A guide whose posterior of a datum is a Normal with a covariance of its own.

    .. math:: q(z_i \mid x_i) = \mathrm{MultivariateNormal}(\mathrm{loc}(x_i), L(x_i) L(x_i)^T)

    over all unconstrained latents of the datum, so that it knows which of them vary together. Its
    head has ``size (size + 3) / 2`` outputs: for more than some 50 latents see
    `AutoAmortizedLowRankMultivariateNormal`.

    Args:
        model: a NumPyro model with latent sites in a plate.
        encoder: a network, or a builder of one; see `numpyro_vae.encoders.base`.
        scale: what the outputs for the diagonal of ``L`` mean; see `AutoAmortizedNormal`.
        options: see `GuideOptions`.

    Raises:
        ValueError: see `AutoAmortizedNormal`; also if the model masks a local site.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):  # which sees but the sum of two latents
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z.sum(-1), 0.1), obs=x)
        >>> guide = AutoAmortizedMultivariateNormal(model)
        >>> numpyro.handlers.seed(guide, 0)(jnp.zeros(5))["z"].shape
        (5, 2)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | None = None,
        *,
        scale: str | AbstractParameterization = "log_scale",
        **options: Unpack[GuideOptions],
    ):
        family = FullRankNormal(get_parameterization(scale))
        super().__init__(model, encoder, family=family, **options)


class AutoAmortizedLowRankMultivariateNormal(AmortizedGuide):
    """A guide whose posterior of a datum has a covariance of low rank plus a diagonal.

    For many latents that vary together in a few directions; see `LowRankNormal`.

    Args:
        model: a NumPyro model with latent sites in a plate.
        encoder: a network, or a builder of one; see `numpyro_vae.encoders.base`.
        rank: the number of directions; by default the rounded root of the number of latents, as
            in NumPyro's ``AutoLowRankMultivariateNormal``.
        scale: what the outputs for the diagonal mean; see `AutoAmortizedNormal`.
        options: see `GuideOptions`.

    Raises:
        ValueError: see `AutoAmortizedMultivariateNormal`; also if the rank is below 1 or above the
            number of latents of a datum.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | None = None,
        *,
        rank: int | None = None,
        scale: str | AbstractParameterization = "log_scale",
        **options: Unpack[GuideOptions],
    ):
        family = LowRankNormal(rank, get_parameterization(scale))
        super().__init__(model, encoder, family=family, **options)


class AutoAmortizedFlow(AmortizedGuide):
    """A guide whose posterior of a datum is bent out of a Normal by a flow.

    For posteriors that are curved, skewed, of heavy tails or of several modes: a neural spline flow
    within a Normal of full covariance, see `Flow`.

    Args:
        model: a NumPyro model with latent sites in a plate.
        encoder: a network, or a builder of one; see `numpyro_vae.encoders.base`.
        num_layers: how many transforms there are.
        hidden_sizes: the widths of the hidden layers of their networks.
        scale: what the outputs for the scale of the Normal mean; see `AutoAmortizedNormal`.
        options: see `GuideOptions`.

    Raises:
        ValueError: see `AutoAmortizedMultivariateNormal`; also if there are no layers.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | None = None,
        *,
        num_layers: int = 4,
        hidden_sizes: Sequence[int] = (32,),
        scale: str | AbstractParameterization = "log_scale",
        **options: Unpack[GuideOptions],
    ):
        family = Flow(num_layers, tuple(hidden_sizes), get_parameterization(scale))
        super().__init__(model, encoder, family=family, **options)


class AutoAmortizedDelta(AmortizedGuide):
    """A guide that gives each datum a point: amortized maximum a posteriori.

    As NumPyro's ``AutoDelta``, it has no spread, so neither k-hats nor evidence can be had of it.

    Args:
        model: a NumPyro model with latent sites in a plate.
        encoder: a network, or a builder of one; see `numpyro_vae.encoders.base`.
        options: see `GuideOptions`.

    Raises:
        ValueError: see `AutoAmortizedNormal`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | None = None,
        **options: Unpack[GuideOptions],
    ):
        super().__init__(model, encoder, family=PointEstimate(), **options)
