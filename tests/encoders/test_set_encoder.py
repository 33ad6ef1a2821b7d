"""The encoder of sets: invariances, its two forms of ragged data, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_vae import Masked, Segments, SetEncoder

POOLINGS = ("mean", "sum", "attention")
SIZES = (3, 0, 5, 1)
SMALL = functools.partial(SetEncoder, element_sizes=(6, 5), hidden_sizes=(4,), activation=nnx.tanh)

RNG = np.random.default_rng(0)
SETS = [RNG.normal(size=(size, 2)).astype(np.float32) for size in SIZES]


def as_segments(sets, order=None):
    values = np.concatenate(sets)
    ids = np.repeat(np.arange(len(sets)), [len(group) for group in sets])
    order = np.arange(len(ids)) if order is None else order
    return Segments(values[order], ids[order], len(sets))


def as_padded(sets, size=7, junk=np.nan):
    values = np.full((len(sets), size, 2), junk, np.float32)
    mask = np.zeros((len(sets), size), bool)
    for row, group in enumerate(sets):
        values[row, : len(group)], mask[row, : len(group)] = group, True
    return Masked(values, mask)


@functools.cache
def encoder(pooling, standardize=False):
    return SMALL(as_segments(SETS), pooling=pooling, standardize=standardize, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, inputs):
    return nnx.merge(graphdef, state)(inputs)


def encode(encoder, inputs):
    return apply(*nnx.split(encoder), inputs)


def dense(layer, hidden):
    return np.tanh(hidden @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]))


def by_hand(encoder, group):
    """The features of one set, with what the papers write, in NumPy."""
    hidden = group
    for layer in encoder.element_layers:
        hidden = dense(layer, hidden)
    weights = np.ones(len(group)) / (1 if encoder.pooling == "sum" else max(len(group), 1))
    if encoder.pooling == "attention":
        scores = dense(encoder.attention.hidden, hidden) @ np.asarray(
            encoder.attention.score.kernel[...]
        )
        weights = np.exp(scores[:, 0]) / np.exp(scores).sum()
    hidden = np.append(weights @ hidden, np.log(1 + len(group)))
    for layer in encoder.layers:
        hidden = dense(layer, hidden)
    return hidden


@pytest.mark.parametrize("pooling", POOLINGS)
def test_segments_padding_and_one_set_at_a_time_agree(pooling):
    expected = np.stack([by_hand(encoder(pooling), group) for group in SETS])
    assert np.isfinite(expected).all()  # An empty set has features too.
    for inputs in (as_segments(SETS), as_padded(SETS), as_padded(SETS, junk=1e30)):
        found = encode(encoder(pooling), inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_elements_changes_nothing(pooling):
    shuffled = as_segments(SETS, np.random.default_rng(1).permutation(sum(SIZES)))
    features = encode(encoder(pooling), as_segments(SETS))
    np.testing.assert_allclose(encode(encoder(pooling), shuffled), features, rtol=1e-5, atol=1e-6)
    padded = as_padded(SETS)
    flipped = Masked(padded.values[:, ::-1], padded.mask[:, ::-1])
    np.testing.assert_allclose(encode(encoder(pooling), flipped), features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_padding_changes_no_gradient(pooling):
    graphdef, state = nnx.split(encoder(pooling))

    @jax.jit
    def grads(state, values, mask):
        def loss(state, values):
            return (nnx.merge(graphdef, state)(Masked(values, mask)) ** 2).sum()

        return jax.grad(loss, (0, 1))(state, values)

    clean, mask = as_padded(SETS, junk=0).values, as_padded(SETS).mask
    expected = grads(state, clean, mask)
    for junk in (np.nan, 1e30):
        found = grads(state, as_padded(SETS, junk=junk).values, mask)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (np.asarray(expected[1])[~mask] == 0).all()
    assert (np.asarray(expected[1])[mask] != 0).any()


def test_the_number_of_elements_matters_whatever_the_pooling():
    copies = as_segments([SETS[0], np.concatenate([SETS[0], SETS[0]])])
    for pooling in POOLINGS:
        one, two = encode(encoder(pooling), copies)
        assert not np.allclose(one, two)


def test_the_statistics_of_both_forms_agree():
    padded = SMALL(as_padded(SETS), standardize=True, rngs=nnx.Rngs(0))
    ragged = encoder("mean", standardize=True)
    loc = padded.standardize.shift / padded.standardize.factor
    np.testing.assert_allclose(loc, np.concatenate(SETS).mean(0), rtol=1e-5)
    features = encode(padded, as_padded(SETS))
    np.testing.assert_allclose(features, encode(ragged, as_segments(SETS)), rtol=1e-4, atol=1e-5)


def test_a_dict_of_values_is_laid_side_by_side():
    segments = as_segments(SETS)
    parts = {"floor": segments.values[:, 0], "y": segments.values[:, 1:]}
    features = encode(encoder("mean"), Segments(parts, segments.ids, segments.num_segments))
    np.testing.assert_array_equal(features, encode(encoder("mean"), segments))
    padded = as_padded(SETS, junk=0.0)
    arrays = {"floor": padded.values[..., 0], "y": padded.values[..., 1]}
    np.testing.assert_allclose(
        encode(encoder("sum"), arrays), encode(encoder("sum"), padded.values), rtol=1e-6
    )


def test_scalars_are_elements():
    scalars = RNG.normal(size=(4, 6)).astype(np.float32)
    few = SMALL(scalars, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(encode(few, scalars), encode(few, scalars[..., None]))


def test_missing_values_of_an_element_are_told_apart_from_missing_elements():
    values = np.stack([SETS[2][:3], SETS[2][1:4]])
    mask = np.ones(values.shape, bool)
    mask[0, 0, 1] = mask[1, 2] = False
    partly = SMALL(Masked(values, mask), rngs=nnx.Rngs(0))
    features = encode(partly, Masked(values, mask))
    shorter = encode(partly, Masked(values[1:, :2], mask[1:, :2]))
    np.testing.assert_allclose(features[1:], shorter, rtol=1e-6)
    assert not np.allclose(features[0], encode(partly, Masked(values, np.ones_like(mask)))[0])


def test_traced_ids_out_of_range_are_seen():
    segments = as_segments(SETS)
    run = jax.jit(lambda ids: encode(encoder("mean"), Segments(segments.values, ids, 4)))
    assert jnp.isfinite(run(segments.ids)).all()
    assert jnp.isnan(run(segments.ids + 1)).all()


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (as_segments(SETS), {"pooling": "max"}, "pooling must be one of .*found 'max'"),
        (as_segments(SETS), {"element_sizes": ()}, "element_sizes must be sizes of at least 1"),
        (as_segments(SETS), {"hidden_sizes": (3, 0)}, "hidden_sizes must be .*found \\(3, 0\\)"),
        (np.ones(4), {}, r"\(batch, elements, k\).*Found shapes \[\(4,\)\]"),
        ({"a": np.ones((2, 3)), "b": np.ones((2, 4))}, {}, r"\(2, 3\), \(2, 4\)"),
        (Masked(np.ones((2, 3)), np.ones(2, bool)), {}, r"\(2, 3\), \(2,\)"),
        ({}, {}, r"Found shapes \[\]"),
        ({"a": as_segments(SETS)}, {}, "Fusion with a SetEncoder"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SetEncoder(inputs, **options, rngs=nnx.Rngs(0))


def test_elements_of_another_size_are_refused():
    with pytest.raises(ValueError, match="built for data of 2 values each, found 3"):
        encoder("mean")(np.ones((2, 4, 3)))
