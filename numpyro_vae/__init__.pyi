from .checks import Check, check, khat_threshold, pareto_khat
from .convolution import Conv, ConvTranspose
from .distributions import LogScaleNormal
from .encoders import MLP, ConvNet, Standardize, flatten_inputs
from .encoding import Encoding
from .families import AbstractFamily, DiagonalNormal
from .fitting import FitResult, fit
from .guide import AutoAmortizedNormal
from .parameterization import (
    AbstractParameterization,
    LogScale,
    LogVariance,
    Softplus,
    get_parameterization,
    reparameterize,
)
from .plots import (
    plot_collapse,
    plot_khat,
    plot_latents,
    plot_prior_samples,
    plot_reconstructions,
    plot_training,
)
from .posterior import Posterior, SiteEncoding

__version__: str

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
