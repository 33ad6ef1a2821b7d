"""From a network's raw output to a scale."""

from numpyro_vae.scales.parameterization import (
    AbstractParameterization,
    get_parameterization,
    reparameterize,
)

__all__ = ["AbstractParameterization", "get_parameterization", "reparameterize"]
