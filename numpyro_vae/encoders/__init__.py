"""Networks from an observation to features; one encoder a file, the contract in `base`."""

from numpyro_vae.encoders.adapters import as_module
from numpyro_vae.encoders.base import Standardize, flatten_inputs
from numpyro_vae.encoders.convnet import ConvNet
from numpyro_vae.encoders.fusion import Fusion
from numpyro_vae.encoders.mlp import MLP
from numpyro_vae.encoders.nested_set_encoder import NestedSetEncoder
from numpyro_vae.encoders.residual import ResidualMLP
from numpyro_vae.encoders.rnn import RNN
from numpyro_vae.encoders.set_encoder import SetEncoder

__all__ = [
    "MLP",
    "RNN",
    "ConvNet",
    "Fusion",
    "NestedSetEncoder",
    "ResidualMLP",
    "SetEncoder",
    "Standardize",
    "as_module",
    "flatten_inputs",
]
