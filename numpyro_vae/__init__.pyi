from .checks import Calibration, Collapse, Gap, Importance, Novelty, Predictive, Report
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
from .layers.convolution import Conv, ConvTranspose
from .plots.figures import (
    plot_collapse,
    plot_khat,
    plot_latents,
    plot_prior_samples,
    plot_reconstructions,
    plot_training,
)
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
    "Calibration",
    "Collapse",
    "Conv",
    "ConvNet",
    "ConvTranspose",
    "DiagonalNormal",
    "Encoding",
    "FitResult",
    "Flow",
    "FullRankNormal",
    "Fusion",
    "Gap",
    "GuideOptions",
    "Importance",
    "LogScale",
    "LogScaleNormal",
    "LogVariance",
    "LowRankNormal",
    "Masked",
    "Novelty",
    "PointEstimate",
    "Posterior",
    "Predictive",
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
    "plot_collapse",
    "plot_khat",
    "plot_latents",
    "plot_prior_samples",
    "plot_reconstructions",
    "plot_training",
    "reparameterize",
]
