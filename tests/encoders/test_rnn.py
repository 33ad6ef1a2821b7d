"""The recurrent encoder: direction, masks of any pattern, lengths, cells and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_vae import RNN, Masked

STEPS = np.random.default_rng(0).normal(size=(3, 6, 2)).astype(np.float32)
MASK = np.array(
    [[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
).astype(bool)
DIRECTIONS = ("forward", "backward", "bidirectional")
SMALL = functools.partial(RNN, hidden_size=3)


@functools.cache
def encoder(direction, cell=nnx.GRUCell):
    return SMALL(STEPS, direction=direction, cell=cell, standardize=False, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, inputs):
    return nnx.merge(graphdef, state)(inputs)


def encode(encoder, inputs):
    return apply(*nnx.split(encoder), inputs)


@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.OptimizedLSTMCell])
def test_without_a_mask_it_is_flaxs_rnn(cell):
    forward, backward = encoder("bidirectional", cell).cells
    both = encode(encoder("bidirectional", cell), STEPS)
    np.testing.assert_allclose(both[..., :3], nnx.RNN(forward)(STEPS), rtol=1e-5, atol=1e-6)
    expected = nnx.RNN(backward, reverse=True, keep_order=True)(STEPS)
    np.testing.assert_allclose(both[..., 3:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.OptimizedLSTMCell])
def test_a_masked_step_is_as_if_it_were_not_there(cell):
    features = encode(encoder("bidirectional", cell), Masked(STEPS, MASK))
    for row in (0, 1):
        shorter = encode(encoder("bidirectional", cell), STEPS[row : row + 1, MASK[row]])
        np.testing.assert_allclose(features[row, MASK[row]], shorter[0], rtol=1e-5, atol=1e-6)
    # Between two steps, what is known of the past and of the future; before any, the start.
    np.testing.assert_array_equal(features[0, 2, :3], features[0, 1, :3])
    np.testing.assert_array_equal(features[0, 2, 3:], features[0, 3, 3:])
    np.testing.assert_array_equal(features[0, 0, :3], 0)
    np.testing.assert_array_equal(features[2], 0)


def test_masked_entries_change_neither_values_nor_gradients():
    graphdef, state = nnx.split(encoder("bidirectional"))

    @jax.jit
    def run(state, values):
        def loss(state, values):
            features = nnx.merge(graphdef, state)(Masked(values, MASK))
            return (features**2).sum(), features

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(state, values)

    expected = run(state, np.where(MASK[..., None], STEPS, 0))
    for junk in (np.nan, 1e30):
        found = run(state, np.where(MASK[..., None], STEPS, junk).astype(np.float32))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    grad = np.asarray(expected[1][1])
    assert (grad[~MASK] == 0).all()
    assert (grad[MASK] != 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_each_step_depends_on(direction):
    graphdef, state = nnx.split(encoder(direction))
    jacobian = jax.jacobian(lambda steps: apply(graphdef, state, steps[None])[0].sum(-1))
    depends = (np.asarray(jacobian(STEPS[0])) != 0).any(-1)
    triangle = np.tri(6, dtype=bool)
    expected = {"forward": triangle, "backward": triangle.T, "bidirectional": triangle | triangle.T}
    np.testing.assert_array_equal(depends, expected[direction])


def test_sequences_of_any_length():
    longer = np.concatenate([STEPS, STEPS, STEPS], axis=1)
    features = encode(encoder("forward"), longer)
    assert features.shape == (3, 18, 3)
    start = encode(encoder("forward"), STEPS)
    np.testing.assert_allclose(features[:, :6], start, rtol=1e-5, atol=1e-6)


def test_scalars_are_steps():
    scalars = SMALL(STEPS[..., 0], rngs=nnx.Rngs(0))
    features = encode(scalars, STEPS[..., 0])
    np.testing.assert_array_equal(features, encode(scalars, STEPS[..., :1]))


def test_a_step_of_which_some_values_are_missing_is_read():
    mask = np.ones(STEPS.shape, bool)
    mask[:, 2] = mask[:, 4, 0] = False
    partly = SMALL(Masked(STEPS, mask), direction="forward", rngs=nnx.Rngs(0))
    features = encode(partly, Masked(STEPS, mask))
    np.testing.assert_array_equal(features[:, 2], features[:, 1])
    assert not np.allclose(features[:, 4], features[:, 3])
    inputs = {"control": STEPS[..., 0], "y": Masked(STEPS[..., 1], mask[..., 1])}
    both = encode(SMALL(inputs, direction="forward", rngs=nnx.Rngs(0)), inputs)
    assert not np.allclose(both[:, 2], both[:, 1])


def test_float64_steps_with_float32_weights():
    with jax.enable_x64(True):
        lstm = encoder("forward", nnx.OptimizedLSTMCell)
        features = encode(lstm, STEPS.astype(np.float64))
        assert features.dtype == jnp.float64


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (STEPS, {"direction": "sideways"}, "direction must be one of .*found 'sideways'"),
        (STEPS, {"hidden_size": 0}, "hidden_size must be at least 1, found 0"),
        (STEPS[:, 0, 0], {}, r"Found shapes \[\(3,\)\]"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        RNN(inputs, **options, rngs=nnx.Rngs(0))


def test_steps_of_another_size_are_refused():
    with pytest.raises(ValueError, match="built for data of 2 values each, found 3"):
        encoder("forward")(np.ones((2, 4, 3)))
