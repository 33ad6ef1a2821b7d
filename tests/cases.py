"""What the common tests run over: a row for each encoder, and for each family."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from numpyro_vae import (
    MLP,
    RNN,
    ConvNet,
    Fusion,
    LogScale,
    LogVariance,
    Masked,
    ResidualMLP,
    Scale,
    Segments,
    SetEncoder,
    Softplus,
)
from numpyro_vae.encoders import as_module
from numpyro_vae.families import DiagonalNormal, Flow, FullRankNormal, LowRankNormal, PointEstimate


def images(batch, *shape, dtype=np.uint8):
    return np.random.default_rng(batch).integers(0, 17, (batch, *shape)).astype(dtype)


def padded(batch, *shape, size=6):
    """Sets or sequences of 0 to `size` vectors, NaN in the padding, and not only at the end."""
    rng = np.random.default_rng(batch)
    mask = rng.random((batch, size)) < 0.6
    values = rng.normal(size=(batch, size, *shape)).astype(np.float32)
    return Masked(np.where(mask.reshape(batch, size, *[1] * len(shape)), values, np.nan), mask)


def segments(batch, *shape):
    """The elements of `padded` one after another, a few groups without any."""
    sets = padded(batch, *shape)
    return Segments(sets.values[sets.mask], np.nonzero(sets.mask)[0], batch)


def rows(inputs, start, stop):
    """Some of the data of a batch."""

    def take(x):
        if not isinstance(x, Segments):
            return x[start:stop]
        mine = (x.ids >= start) & (x.ids < stop)
        values = jax.tree.map(lambda values: values[mine], x.values)
        return Segments(values, x.ids[mine] - start, stop - start)

    return jax.tree.map(take, inputs, is_leaf=lambda x: isinstance(x, Segments))


def linen_dense(example_inputs, *, rngs):
    return as_module(linen.Dense(4), example_inputs, rngs)


def equinox_mlp(example_inputs, *, rngs):
    size = example_inputs.shape[-1]
    return as_module(eqx.nn.MLP(size, 4, 8, 1, key=rngs.params()), example_inputs, rngs)


def init_linear(rng_key, example_inputs):
    kernel = jax.random.normal(rng_key, (example_inputs.shape[-1], 4))
    return {"linear": {"kernel": kernel, "bias": jnp.zeros(4)}}


def apply_linear(params, inputs):
    return inputs @ params["linear"]["kernel"] + params["linear"]["bias"]


def functions(example_inputs, *, rngs):
    return as_module((init_linear, apply_linear), example_inputs, rngs)


def floats(batch):
    return images(batch, 5, dtype=np.float32)


# By name, a builder and a function from a batch size to inputs.
ENCODERS = {
    "MLP": (partial(MLP, hidden_sizes=(16, 4)), lambda batch: images(batch, 5)),
    "MLP, standardized": (partial(MLP, hidden_sizes=(4,), standardize=True), floats),
    "MLP of several inputs": (
        partial(MLP, hidden_sizes=(16,)),
        lambda batch: {"a": jnp.ones((batch, 2)), "b": jnp.arange(batch)},
    ),
    "MLP of missing values, standardized": (
        partial(MLP, hidden_sizes=(16,), standardize=True),
        lambda batch: {"a": padded(batch), "b": jnp.ones((batch, 2))},
    ),
    "ResidualMLP, standardized": (partial(ResidualMLP, hidden_size=8, standardize=True), floats),
    "ConvNet": (partial(ConvNet, channels=(4, 8), features=6), lambda batch: images(batch, 8, 8)),
    "ConvNet of colours, standardized": (
        partial(ConvNet, channels=(4,), features=6, standardize=True),
        lambda batch: images(batch, 9, 7, 3),
    ),
    "SetEncoder of arrays, sum": (
        partial(SetEncoder, element_sizes=(8,), hidden_sizes=(8,), pooling="sum"),
        lambda batch: images(batch, 6, 2),
    ),
    "SetEncoder of padded sets, attention": (
        partial(SetEncoder, element_sizes=(8,), hidden_sizes=(8,), pooling="attention"),
        lambda batch: padded(batch, 2),
    ),
    "SetEncoder of segments, standardized": (
        partial(SetEncoder, element_sizes=(8,), hidden_sizes=(8,), standardize=True),
        lambda batch: segments(batch, 2),
    ),
    "RNN": (partial(RNN, hidden_size=4), lambda batch: images(batch, 6, 2)),
    "RNN of masked sequences, forward, LSTM, standardized": (
        partial(
            RNN, hidden_size=4, direction="forward", cell=nnx.OptimizedLSTMCell, standardize=True
        ),
        lambda batch: padded(batch, 2),
    ),
    "Fusion": (
        partial(
            Fusion,
            encoders={"x": partial(MLP, hidden_sizes=(8,)), "items": SetEncoder},
            hidden_sizes=(8,),
        ),
        lambda batch: {"x": images(batch, 5), "items": segments(batch, 2)},
    ),
    "linen": (linen_dense, floats),
    "Equinox": (equinox_mlp, floats),
    "functions": (functions, floats),
}

FAMILIES = {
    "diagonal": DiagonalNormal(LogScale(init_scale=0.1)),
    "diagonal, bounded": DiagonalNormal(Softplus(bounds=(1e-3, 10.0))),
    "diagonal, of scales": DiagonalNormal(Scale(init_scale=0.1)),
    "full rank": FullRankNormal(LogScale(init_scale=0.1)),
    "rank 1": LowRankNormal(1, LogScale(init_scale=0.1)),
    "rank 2, variance": LowRankNormal(2, LogVariance()),
    "flow": Flow(parameterization=LogScale(init_scale=0.1)),
    "flow, of scales": Flow(parameterization=Scale(init_scale=0.1)),
    "flow, deep": Flow(3, (8, 6), LogVariance()),
    "point": PointEstimate(),
}
