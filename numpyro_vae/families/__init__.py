"""Distributions over the latents of one datum; one family a file, the contract in `base`."""

from numpyro_vae.families.base import AbstractFamily, AbstractHead
from numpyro_vae.families.delta import PointEstimate
from numpyro_vae.families.flow import Flow
from numpyro_vae.families.low_rank import LowRankNormal
from numpyro_vae.families.multivariate_normal import FullRankNormal
from numpyro_vae.families.normal import DiagonalNormal

__all__ = [
    "AbstractFamily",
    "AbstractHead",
    "DiagonalNormal",
    "Flow",
    "FullRankNormal",
    "LowRankNormal",
    "PointEstimate",
]
