"""What the common tests run over: a row for each encoder, and for each family."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from numpyro_vae import MLP, ConvNet, DiagonalNormal, LogScale, LogVariance, Softplus


def images(batch, *shape, dtype=np.uint8):
    return np.random.default_rng(batch).integers(0, 17, (batch, *shape)).astype(dtype)


# By name, a builder and a function from a batch size to inputs.
ENCODERS = {
    "MLP": (partial(MLP, hidden_sizes=(16, 4)), lambda batch: images(batch, 5)),
    "MLP, standardized": (
        partial(MLP, hidden_sizes=(4,), standardize=True),
        lambda batch: images(batch, 5, dtype=np.float32),
    ),
    "MLP of several inputs": (
        partial(MLP, hidden_sizes=(16,)),
        lambda batch: {"a": jnp.ones((batch, 2)), "b": jnp.arange(batch)},
    ),
    "ConvNet": (partial(ConvNet, channels=(4, 8), features=6), lambda batch: images(batch, 8, 8)),
    "ConvNet of colours, standardized": (
        partial(ConvNet, channels=(4,), features=6, standardize=True),
        lambda batch: images(batch, 9, 7, 3),
    ),
}

FAMILIES = {
    f"diagonal, {type(scale).__name__}": DiagonalNormal(scale)
    for scale in (LogScale(init_scale=0.1), LogVariance(), Softplus(bounds=(1e-3, 10.0)))
}
