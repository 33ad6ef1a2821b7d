"""What every encoder must do."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ENCODERS, rows
from flax import nnx


@pytest.fixture(params=ENCODERS, scope="module")
def encoder_case(request):
    """An encoder in two halves, a function from a batch size to inputs, and its builder."""
    build, inputs = ENCODERS[request.param]
    return nnx.split(build(inputs(7), rngs=nnx.Rngs(0))), inputs, build


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, inputs):
    return nnx.merge(graphdef, state)(inputs)


@pytest.mark.slow
def test_features_of_any_batch(encoder_case):
    encoder, inputs, _ = encoder_case
    widths = set()
    for batch in (1, 3, 7):
        features = apply(*encoder, inputs(batch))
        assert features.shape[0] == batch
        assert features.ndim in (2, 3)  # One vector, or one for each step.
        assert features.dtype == jnp.float32
        assert jnp.isfinite(features).all()
        widths.add(features.shape[1:])
    assert len(widths) == 1


@pytest.mark.slow
def test_rows_do_not_see_each_other(encoder_case):
    encoder, inputs, _ = encoder_case
    some = apply(*encoder, rows(inputs(7), 2, 5))
    np.testing.assert_allclose(some, apply(*encoder, inputs(7))[2:5], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_encoders_are_the_same_under_jit(encoder_case):
    encoder, inputs, _ = encoder_case
    eager = nnx.merge(*encoder)(inputs(3))
    np.testing.assert_allclose(apply(*encoder, inputs(3)), eager, rtol=1e-5, atol=1e-6)


def test_the_same_key_is_the_same_encoder_after_pickling(encoder_case):
    encoder, inputs, build = encoder_case
    same = nnx.split(pickle.loads(pickle.dumps(build))(inputs(7), rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(apply(*same, inputs(3)), apply(*encoder, inputs(3)))


@pytest.mark.slow
def test_gradient_reaches_every_weight_but_the_standardization(encoder_case):
    (graphdef, state), inputs, _ = encoder_case
    weights = jax.random.normal(jax.random.key(0), apply(graphdef, state, inputs(7)).shape)
    loss = jax.jit(lambda state, x: (weights * apply(graphdef, state, x)).sum())
    grads = jax.grad(loss)(state, inputs(7))
    assert jax.tree.leaves(grads)
    for path, grad in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
        trained = "standardize" not in jax.tree_util.keystr(path)
        assert bool(jnp.any(grad != 0)) == trained, path
        assert jnp.isfinite(grad).all(), path


def test_another_key_is_another_encoder(encoder_case):
    encoder, inputs, build = encoder_case
    other = nnx.split(build(inputs(7), rngs=nnx.Rngs(1)))
    assert not np.allclose(apply(*other, inputs(3)), apply(*encoder, inputs(3)))


def test_encoders_can_be_built_from_shapes_alone(encoder_case):
    (_, state), inputs, build = encoder_case

    def init(rng_key, inputs):
        return nnx.to_pure_dict(nnx.state(build(inputs, rngs=nnx.Rngs(rng_key))))

    abstract = jax.eval_shape(init, jax.random.key(0), inputs(7))
    expected = nnx.to_pure_dict(state)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, expected)
