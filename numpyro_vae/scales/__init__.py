"""From a network's raw output to a scale."""

from numpyro_vae.scales.parameterization import (
    AbstractParameterization,
    for_heads,
    get_parameterization,
    reparameterize,
)

__all__ = ["AbstractParameterization", "for_heads", "get_parameterization", "reparameterize"]
