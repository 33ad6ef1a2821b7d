"""What a manifest may refer to by name; loading looks names up here, and imports nothing."""

from __future__ import annotations

from typing import Any

from flax import nnx
from numpyro import infer
from numpyro.infer import autoguide

from numpyro_vae import encoders, families
from numpyro_vae.data.ragged import Masked, Segments
from numpyro_vae.guides import auto
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.model.covariates import WithCovariates
from numpyro_vae.scales.parameterization import PARAMETERIZATIONS

GUIDES: dict[str, type[AmortizedGuide]] = {
    "AmortizedGuide": AmortizedGuide,
    **{name: getattr(auto, name) for name in auto.__all__},
}
ENCODERS = ("MLP", "RNN", "ConvNet", "Fusion", "NestedSetEncoder", "ResidualMLP", "SetEncoder")
FAMILIES = ("DiagonalNormal", "Flow", "FullRankNormal", "LowRankNormal", "PointEstimate")
OF_FLAX = (
    "GRUCell",
    "LSTMCell",
    "OptimizedLSTMCell",
    "SimpleCell",
    "celu",
    "elu",
    "gelu",
    "leaky_relu",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
)
OF_NUMPYRO = (
    "AutoBNAFNormal",
    "AutoDelta",
    "AutoDiagonalNormal",
    "AutoIAFNormal",
    "AutoLaplaceApproximation",
    "AutoLowRankMultivariateNormal",
    "AutoMultivariateNormal",
    "AutoNormal",
)
STARTS = ("init_to_feasible", "init_to_mean", "init_to_median", "init_to_sample", "init_to_uniform")

KNOWN: dict[str, Any] = {
    **GUIDES,
    **{name: getattr(encoders, name) for name in ENCODERS},
    **{name: getattr(families, name) for name in FAMILIES},
    **{known.__name__: known for known in PARAMETERIZATIONS.values()},
    **{known.__name__: known for known in (Masked, Segments, WithCovariates)},
    **{f"nnx.{name}": getattr(nnx, name) for name in OF_FLAX},
    **{f"numpyro.{name}": getattr(autoguide, name) for name in OF_NUMPYRO},
    **{f"numpyro.{name}": getattr(infer, name) for name in STARTS},
}


def name_of(value: Any) -> str | None:
    """Return the name of a class or a function, if a manifest may refer to it."""
    return next((name for name, known in KNOWN.items() if known is value), None)
