"""The convolutional encoder: shapes, dtypes, standardization and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_vae.encoders.convnet import ConvNet

SMALL = functools.partial(ConvNet, channels=(4, 6), features=5)


def images(*shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (8, 8, 1), (6, 10, 3), (1, 1)])
@pytest.mark.parametrize("batch", [1, 4])
def test_features_of_any_image_and_batch(shape, batch):
    encoder = SMALL(images(3, *shape), rngs=nnx.Rngs(0))
    features = encoder(images(batch, *shape))
    assert features.shape == (batch, 5)
    assert jnp.isfinite(features).all()


@pytest.mark.slow
def test_a_channel_axis_of_one_may_be_left_out():
    flat = SMALL(images(2, 8, 8), rngs=nnx.Rngs(0))
    deep = SMALL(images(2, 8, 8, 1), rngs=nnx.Rngs(0))
    inputs = images(3, 8, 8, seed=1)
    np.testing.assert_array_equal(flat(inputs), deep(inputs[..., None]))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.bool_, jnp.float16])
@pytest.mark.parametrize("standardize", [False, True])
def test_pixels_of_any_dtype(dtype, standardize):
    pixels = (images(6, 8, 8) > 0.5).astype(dtype)
    encoder = SMALL(pixels, standardize=standardize, rngs=nnx.Rngs(0))
    assert encoder(pixels).dtype == jnp.float32
    np.testing.assert_allclose(encoder(pixels), encoder(pixels.astype(jnp.float32)), rtol=1e-6)


def test_standardization_is_by_channel_and_undoes_a_change_of_units():
    inputs = images(20, 8, 8, 3)
    units = jnp.array([1.0, 100.0, 0.01])
    plain = SMALL(inputs, standardize=True, rngs=nnx.Rngs(0))
    scaled = SMALL(inputs * units + 5, standardize=True, rngs=nnx.Rngs(0))
    assert plain.standardize.shift.shape == (3,)
    np.testing.assert_allclose(scaled(inputs * units + 5), plain(inputs), atol=2e-3)


def test_only_shapes_are_needed_to_build_without_standardization():
    abstract = jax.eval_shape(lambda: images(2, 8, 8))
    encoder = SMALL(abstract, standardize=False, rngs=nnx.Rngs(0))
    assert encoder(images(3, 8, 8)).shape == (3, 5)


def test_every_parameter_receives_a_gradient():
    inputs = images(16, 8, 8)
    encoder = SMALL(inputs, activation=nnx.tanh, standardize=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(encoder)
    gradients = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(inputs) ** 2).sum()))(params)
    leaves = jax.tree.leaves(gradients)
    assert len(leaves) == 6
    assert all(jnp.abs(leaf).max() > 0 for leaf in leaves)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (np.ones((4, 64)), r"shape \(4, 64\)"),
        (np.ones((4, 8, 8, 3, 1)), r"shape \(4, 8, 8, 3, 1\)"),
        (np.ones((4, 0, 8)), r"shape \(4, 0, 8\)"),
        ({"x": np.ones((4, 8, 8))}, "Found dict"),
    ],
)
def test_what_is_no_image_is_refused(inputs, found):
    with pytest.raises(ValueError, match=rf"(?s){found}.*reshap"):
        SMALL(inputs, rngs=nnx.Rngs(0))


def test_another_shape_than_the_example_is_refused():
    encoder = SMALL(images(2, 8, 8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"built for images of shape \(8, 8\), found \(8, 9\)"):
        encoder(images(2, 8, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ()}, "channels must be at least 1"),
        ({"channels": (4, 0)}, "channels must be at least 1"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"features": 0}, "features must be at least 1"),
    ],
)
def test_sizes_below_one_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(images(2, 8, 8), **options, rngs=nnx.Rngs(0))
