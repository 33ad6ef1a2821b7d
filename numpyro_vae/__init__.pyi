from .amortization import amortize
from .checks import (
    Calibration,
    Collapse,
    Gap,
    Globals,
    Importance,
    Novelty,
    Predictive,
    Reference,
    Report,
)
from .comparison import Comparison, compare
from .data.columns import Columns
from .data.nested import Nested
from .data.ragged import Masked, Segments
from .encoders import (
    MLP,
    RNN,
    ConvNet,
    Fusion,
    NestedSetEncoder,
    ResidualMLP,
    SetEncoder,
)
from .guides.auto import (
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)
from .guides.base import AmortizedGuide
from .layers.convolution import Conv, ConvTranspose
from .model.data_sets import data_sets
from .objectives.forward_kl import ForwardKL
from .plots.figures import (
    plot_collapse,
    plot_comparison,
    plot_khat,
    plot_latents,
    plot_training,
)
from .plots.images import plot_manifold, plot_prior_samples, plot_reconstructions
from .posterior import Posterior
from .repair.global_sites import GlobalRepair
from .repair.result import Repair
from .scales.log_scale_normal import LogScaleNormal
from .scales.parameterization import (
    LogScale,
    LogVariance,
    Scale,
    Softplus,
)
from .training.checkpoints import Checkpoints
from .training.fit import fit
from .training.result import FitResult
from .training.simulations import Simulations

__version__: str

__all__ = [
    "MLP",
    "RNN",
    "AmortizedGuide",
    "AutoAmortizedDelta",
    "AutoAmortizedFlow",
    "AutoAmortizedLowRankMultivariateNormal",
    "AutoAmortizedMultivariateNormal",
    "AutoAmortizedNormal",
    "Calibration",
    "Checkpoints",
    "Collapse",
    "Columns",
    "Comparison",
    "Conv",
    "ConvNet",
    "ConvTranspose",
    "FitResult",
    "ForwardKL",
    "Fusion",
    "Gap",
    "GlobalRepair",
    "Globals",
    "Importance",
    "LogScale",
    "LogScaleNormal",
    "LogVariance",
    "Masked",
    "Nested",
    "NestedSetEncoder",
    "Novelty",
    "Posterior",
    "Predictive",
    "Reference",
    "Repair",
    "Report",
    "ResidualMLP",
    "Scale",
    "Segments",
    "SetEncoder",
    "Simulations",
    "Softplus",
    "amortize",
    "compare",
    "data_sets",
    "fit",
    "plot_collapse",
    "plot_comparison",
    "plot_khat",
    "plot_latents",
    "plot_manifold",
    "plot_prior_samples",
    "plot_reconstructions",
    "plot_training",
]
