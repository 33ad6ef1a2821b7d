"""Amortized guides for NumPyro models in which every datum has latent variables of its own.

A network reads a datum and says what the posterior over its latents is; it is trained by SVI, and
every datum's posterior is checked::

    data -> inputs -> encoder -> scale parameterization / family -> sites -> guide
         -> fit -> posterior -> checks -> DataTree

`AutoAmortizedNormal` is the guide, `fit` trains it, `Posterior` encodes, samples and predicts for
any rows of data and hands them to ArviZ, and `check` says which of them can be trusted.
"""

from numpyro_vae.checks import Check, check, khat_threshold, pareto_khat
from numpyro_vae.convolution import Conv, ConvTranspose
from numpyro_vae.distributions import LogScaleNormal
from numpyro_vae.encoders import MLP, ConvNet, Standardize, flatten_inputs
from numpyro_vae.encoding import Encoding
from numpyro_vae.families import AbstractFamily, DiagonalNormal
from numpyro_vae.fit import FitResult, fit
from numpyro_vae.guide import AutoAmortizedNormal
from numpyro_vae.parameterization import (
    AbstractParameterization,
    LogScale,
    LogVariance,
    Softplus,
    get_parameterization,
    reparameterize,
)
from numpyro_vae.plots import (
    plot_collapse,
    plot_khat,
    plot_latents,
    plot_prior_samples,
    plot_reconstructions,
    plot_training,
)
from numpyro_vae.posterior import Posterior, SiteEncoding

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AbstractFamily",
    "AbstractParameterization",
    "AutoAmortizedNormal",
    "Check",
    "Conv",
    "ConvNet",
    "ConvTranspose",
    "DiagonalNormal",
    "Encoding",
    "FitResult",
    "LogScale",
    "LogScaleNormal",
    "LogVariance",
    "Posterior",
    "SiteEncoding",
    "Softplus",
    "Standardize",
    "check",
    "fit",
    "flatten_inputs",
    "get_parameterization",
    "khat_threshold",
    "pareto_khat",
    "plot_collapse",
    "plot_khat",
    "plot_latents",
    "plot_prior_samples",
    "plot_reconstructions",
    "plot_training",
    "reparameterize",
]
