"""The residual network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_vae import ResidualMLP

INPUTS = jax.random.normal(jax.random.key(0), (6, 3))


def test_features_are_a_sum_over_the_blocks():
    encoder = ResidualMLP(INPUTS, hidden_size=4, num_blocks=3, standardize=False, rngs=nnx.Rngs(0))
    expected = encoder.linear(INPUTS)
    for number, block in enumerate(encoder.blocks):
        block.second.kernel[...] = jax.random.normal(jax.random.key(number), (4, 4))
        centred = expected - expected.mean(-1, keepdims=True)
        normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        hidden = block.first(nnx.relu(normed))
        expected = expected + block.second(nnx.relu(hidden))
    assert len(encoder.blocks) == 3
    np.testing.assert_allclose(encoder(INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_features_start_linear_in_the_data():
    encoder = ResidualMLP(INPUTS, hidden_size=4, standardize=False, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(encoder(INPUTS), encoder.linear(INPUTS))


@pytest.mark.parametrize("option", ["hidden_size", "num_blocks"])
def test_sizes_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, found 0"):
        ResidualMLP(INPUTS, **{option: 0}, rngs=nnx.Rngs(0))


def test_data_of_another_size_are_refused():
    encoder = ResidualMLP(INPUTS, hidden_size=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="built for data of 3 values each, found 2"):
        encoder(INPUTS[:, :2])
