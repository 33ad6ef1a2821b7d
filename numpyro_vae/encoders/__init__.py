"""Networks from an observation to features; one encoder a file, the contract in `base`."""

from numpyro_vae.encoders.base import Standardize, flatten_inputs
from numpyro_vae.encoders.convnet import ConvNet
from numpyro_vae.encoders.mlp import MLP

__all__ = ["MLP", "ConvNet", "Standardize", "flatten_inputs"]
