"""Objectives that numpyro.infer lacks; one a file, the contract in `base`."""

from numpyro_vae.objectives.forward_kl import ForwardKL
from numpyro_vae.objectives.free_bits import FreeBitsELBO
from numpyro_vae.objectives.importance_weighted import ImportanceWeightedELBO
from numpyro_vae.objectives.kl_weight import AnnealedELBO, count_steps, cyclical
from numpyro_vae.objectives.wake_sleep import ReweightedWakeSleep

__all__ = [
    "AnnealedELBO",
    "ForwardKL",
    "FreeBitsELBO",
    "ImportanceWeightedELBO",
    "ReweightedWakeSleep",
    "count_steps",
    "cyclical",
]
