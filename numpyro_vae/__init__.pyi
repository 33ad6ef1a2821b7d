from .amortized import AmortizedGuide, GuideOptions
from .checks import Finding, khat_threshold, pareto_khat
from .convolution import Conv, ConvTranspose
from .distributions import LogScaleNormal
from .encoders import (
    MLP,
    RNN,
    ConvNet,
    Fusion,
    ResidualMLP,
    SetEncoder,
    Standardize,
    as_module,
    flatten_inputs,
)
from .encoding import Encoding
from .families import (
    AbstractFamily,
    AbstractHead,
    DiagonalNormal,
    Flow,
    FullRankNormal,
    LowRankNormal,
    PointEstimate,
)
from .fitting import FitResult, fit
from .guide import (
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)
from .inputs import Masked, Segments
from .pages import save_report
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
from .repair import Repair
from .report import Report

__version__: str

__all__ = [
    "MLP",
    "RNN",
    "AbstractFamily",
    "AbstractHead",
    "AbstractParameterization",
    "AmortizedGuide",
    "AutoAmortizedDelta",
    "AutoAmortizedFlow",
    "AutoAmortizedLowRankMultivariateNormal",
    "AutoAmortizedMultivariateNormal",
    "AutoAmortizedNormal",
    "Conv",
    "ConvNet",
    "ConvTranspose",
    "DiagonalNormal",
    "Encoding",
    "Finding",
    "FitResult",
    "Flow",
    "FullRankNormal",
    "Fusion",
    "GuideOptions",
    "LogScale",
    "LogScaleNormal",
    "LogVariance",
    "LowRankNormal",
    "Masked",
    "PointEstimate",
    "Posterior",
    "Repair",
    "Report",
    "ResidualMLP",
    "Segments",
    "SetEncoder",
    "SiteEncoding",
    "Softplus",
    "Standardize",
    "as_module",
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
    "save_report",
]
