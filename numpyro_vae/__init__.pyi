from .checks import Finding
from .checks.report import Report
from .data.ragged import Masked, Segments
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
from .families import (
    AbstractFamily,
    AbstractHead,
    DiagonalNormal,
    Flow,
    FullRankNormal,
    LowRankNormal,
    PointEstimate,
)
from .guides.auto import (
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)
from .guides.base import AmortizedGuide, GuideOptions
from .guides.encoding import Encoding
from .inference.psis import khat_threshold, pareto_khat
from .layers.convolution import Conv, ConvTranspose
from .plots.figures import (
    plot_collapse,
    plot_khat,
    plot_latents,
    plot_prior_samples,
    plot_reconstructions,
    plot_training,
)
from .plots.page import save_report
from .posterior import Posterior, SiteEncoding
from .repair.result import Repair
from .scales.log_scale_normal import LogScaleNormal
from .scales.parameterization import (
    AbstractParameterization,
    LogScale,
    LogVariance,
    Softplus,
    get_parameterization,
    reparameterize,
)
from .training.fit import FitResult, fit

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
