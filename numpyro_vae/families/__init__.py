"""Distributions over the latents of one datum; one family a file, the contract in `base`."""

from numpyro_vae.families.base import AbstractFamily
from numpyro_vae.families.normal import DiagonalNormal

__all__ = ["AbstractFamily", "DiagonalNormal"]
