"""Masked arrays and ragged groups, and how encoders of vectors read them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_vae import MLP, Masked, Segments
from numpyro_vae.encoders import Standardize, flatten_inputs

MASK = np.array([[True, False, True], [False, False, False]])
IDS = np.array([2, 0, 2, 2])
VALUES = np.array([1.0, -2.0, 3.0, 0.5], np.float32)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_what_is_masked_reaches_neither_values_nor_gradients(junk):
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(values):
        masked = Masked(values, MASK)
        parts = masked.filled(), masked.sum(values), masked.mean(values), masked.softmax(values)
        return sum((part**2).sum() for part in parts), parts

    clean = jnp.where(MASK, jnp.arange(6.0).reshape(2, 3), 0)
    (_, expected), expected_grad = run(clean)
    (_, parts), grad = run(jnp.where(MASK, clean, junk))
    jax.tree.map(np.testing.assert_array_equal, parts, expected)
    np.testing.assert_array_equal(grad, expected_grad)
    assert (np.asarray(grad)[~MASK] == 0).all()


def test_reductions_of_masked_values():
    masked = Masked(jnp.arange(12.0).reshape(2, 3, 2), MASK)
    np.testing.assert_array_equal(masked.counts(), [2, 0])
    np.testing.assert_array_equal(masked.sum(masked.values), [[4, 6], [0, 0]])
    np.testing.assert_array_equal(masked.mean(masked.values), [[2, 3], [0, 0]])
    weights = masked.softmax(masked.values)
    np.testing.assert_allclose(weights[0, [0, 2], 0], jax.nn.softmax(jnp.array([0.0, 4.0])))
    assert (weights[:, 1] == 0).all()
    assert (weights[1] == 0).all()
    np.testing.assert_array_equal(masked.broadcast_mask(), np.stack([MASK, MASK], -1))


def test_lengths_say_which_steps_are_there():
    masked = Masked.from_lengths(np.ones((3, 4, 2)), np.array([4, 0, 1]))
    assert masked.mask.tolist() == [[True] * 4, [False] * 4, [True, False, False, False]]
    np.testing.assert_array_equal(masked.counts(), [4, 0, 1])


@pytest.mark.parametrize("wrong", [5, -1])
def test_lengths_beyond_the_data_are_refused_and_when_traced_no_silent_loss(wrong):
    values, lengths = np.ones((2, 4)), np.array([4, wrong])
    message = rf"Sequence 1 has the length {wrong}, but the data have 4 steps.*Pad the sequences"
    with pytest.raises(ValueError, match=message):
        Masked.from_lengths(values, lengths)
    total = jax.jit(
        lambda x, n: Masked.from_lengths(x, n).sum(x * Masked.from_lengths(x, n).filled())
    )
    found = total(values, lengths)
    assert found[0] == 4
    assert np.isnan(found[1])


def test_lengths_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="must be integers, found float32"):
        Masked.from_lengths(np.ones((2, 4)), np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"a length for each sequence.*\(2, 4\).*\(3,\)"):
        Masked.from_lengths(np.ones((2, 4)), np.ones(3, int))


def test_the_softmax_of_one_element_has_no_gradient():
    one = Masked(jnp.ones((1, 2)), jnp.array([[True, False]]))
    grad = jax.jacobian(one.softmax)(jnp.array([[5.0, 1.0]]))
    np.testing.assert_array_equal(grad, jnp.zeros((1, 2, 1, 2)))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.float16])
def test_filling_keeps_the_dtype(dtype):
    filled = Masked(np.ones((2, 3), dtype), MASK).filled()
    assert filled.dtype == dtype
    np.testing.assert_array_equal(filled, MASK.astype(dtype))


def test_reductions_of_segments_are_those_of_each_group():
    segments = Segments({"x": VALUES}, IDS, 4)
    groups = [VALUES[group == IDS] for group in range(4)]
    values = jnp.asarray(VALUES)
    np.testing.assert_array_equal(segments.counts(), [1, 0, 3, 0])
    np.testing.assert_allclose(segments.sum(values), [group.sum() for group in groups])
    means = [group.mean() if group.size else 0 for group in groups]
    np.testing.assert_allclose(segments.mean(values), means)
    weights = segments.softmax(values)
    for group in (0, 2):
        mine = group == IDS
        np.testing.assert_allclose(weights[mine], jax.nn.softmax(values[mine]), rtol=1e-6)


def test_both_kinds_pass_through_jax_with_whatever_leaves():
    for tree in (Masked(np.ones((2, 3, 1)), MASK), Segments({"x": VALUES}, IDS, 4)):
        leaves, treedef = jax.tree.flatten(tree)
        assert type(jax.tree.unflatten(treedef, ["text"] * len(leaves))) is type(tree)
        jitted = jax.jit(lambda tree: tree)(tree)
        assert jax.tree.structure(jitted) == treedef
    by_row = jax.vmap(lambda row: row.filled().sum())(Masked(np.ones((2, 3)), MASK))
    np.testing.assert_array_equal(by_row, [2, 0])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
    assert paths == [".values['x']", ".ids"]


def test_both_kinds_can_be_constructed_under_tracing():
    masked = jax.jit(lambda x: Masked(x, ~jnp.isnan(x)).mean(x))(np.array([[1.0, np.nan, 3.0]]))
    np.testing.assert_array_equal(masked, [2])
    total = jax.jit(lambda ids: Segments(VALUES, ids, 4).sum(jnp.asarray(VALUES)))
    np.testing.assert_allclose(total(IDS), [-2, 0, 4.5, 0])


@pytest.mark.parametrize("wrong", [4, -1])
@pytest.mark.parametrize("reduce", ["sum", "mean", "softmax", "counts"])
def test_traced_ids_out_of_range_are_no_silent_loss(wrong, reduce):
    def run(ids):
        segments = Segments(VALUES, ids, 4)
        method = getattr(segments, reduce)
        return method() if reduce == "counts" else method(jnp.asarray(VALUES))

    assert jnp.isnan(jax.jit(run)(np.array([0, 1, wrong, 2]))).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Masked(np.ones((2, 3)), np.ones((2, 3))), TypeError, "must be boolean.*float64"),
        (lambda: Masked(np.ones((2, 3)), MASK[:, :2]), ValueError, r"\(2, 2\).*\(2, 3\)"),
        (lambda: Masked(np.ones(2), MASK), ValueError, r"\(2, 3\).*\(2,\)"),
        (lambda: Masked(np.ones((2, 3)), np.array(True)), ValueError, r"\(\).*\(2, 3\)"),
        (lambda: Segments(VALUES, IDS[:3], 4), ValueError, r"\[\(4,\)\].*\(3,\)"),
        (lambda: Segments({"x": VALUES, "y": np.ones(())}, IDS, 4), ValueError, r"\(\)"),
        (lambda: Segments({}, IDS, 4), ValueError, r"shapes \[\]"),
        (lambda: Segments(VALUES, IDS[:, None], 4), ValueError, r"\(4, 1\)"),
        (lambda: Segments(VALUES, IDS * 1.0, 4), TypeError, "must be integers, found float64"),
        (lambda: Segments(VALUES, IDS, 4.0), TypeError, "num_segments.*4.0"),
        (lambda: Segments(VALUES, IDS, 2), ValueError, "Element 0 .* id 2, .*2 groups.* 0 to 1"),
        (lambda: Segments(VALUES, IDS - 1, 4), ValueError, "Element 1 .* id -1, .*1 of 4 ids"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        make()


def test_flattening_tells_what_is_missing():
    values = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    flat = flatten_inputs({"a": Masked(values, MASK), "b": np.array([7, 8])})
    np.testing.assert_array_equal(flat, [[1, 0, 3, 1, 0, 1, 7], [0, 0, 0, 0, 0, 0, 8]])


@pytest.mark.parametrize("inputs", [Segments(VALUES, IDS, 4), {"x": Segments(VALUES, IDS, 4)}])
def test_flattening_groups_is_refused(inputs):
    with pytest.raises(ValueError, match=re.escape("Use SetEncoder")):
        flatten_inputs(inputs)


def test_statistics_are_those_of_the_values_that_are_there():
    values = np.array([[1.0, np.nan, 3.0], [3.0, np.nan, np.nan]], np.float32)
    inputs = Masked(values, ~np.isnan(values))
    encoder = MLP(inputs, hidden_sizes=(4,), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(encoder.standardize.shift[:3], [2, 0, 3])
    np.testing.assert_array_equal(encoder.standardize.factor[:3], [1, 1, 1])
    assert jnp.isfinite(encoder(inputs)).all()


def test_nothing_of_the_first_data_is_far_away_in_any_units():
    rng = np.random.default_rng(0)
    rare, heavy = (rng.random(128) < 0.01).astype(float), rng.standard_cauchy(128)
    example = np.stack([rare, heavy, rng.normal(size=128)], 1)
    for unit in (1.0, 1e8, 1e25, 1e-25):
        standardize = Standardize(jnp.asarray(unit * example + unit))
        outputs = standardize(jnp.asarray(unit * example + unit))
        np.testing.assert_allclose(jnp.abs(outputs).max(0)[:2], 5.0, rtol=1e-5)
        np.testing.assert_allclose(outputs[:, 2].std(), 1.0, rtol=1e-5)
        np.testing.assert_allclose(outputs.mean(0), 0.0, atol=1e-5)


def test_what_was_constant_is_kept_near_and_one_row_is_left_as_it_is():
    pixels = Standardize(jnp.asarray([[0, 3], [0, 5]], jnp.uint8))
    rows = pixels(jnp.asarray([[0, 4], [1, 4], [200, 4]], jnp.uint8))
    np.testing.assert_array_equal(rows, [[0, 0], [1, 0], [5, 0]])
    rows = jnp.array([[1e8, -7.0]])
    for few in (rows, rows[:0]):
        np.testing.assert_array_equal(Standardize(few)(rows), rows)


def test_decaying_statistics_shrink_what_is_standardized_and_no_more():
    example = jnp.asarray(1000 + np.random.default_rng(0).normal(size=(50, 3)))
    standardize = Standardize(example)
    expected = 0.5 * standardize(example)
    for stat in (standardize.factor, standardize.shift, standardize.constant):
        stat[...] = 0.5 * stat[...]
    np.testing.assert_allclose(standardize(example), expected, atol=1e-3)


def test_what_is_missing_is_at_the_mean_after_standardization():
    standardize = Standardize(jnp.array([[10.0], [30.0]]))
    rows = standardize(jnp.array([[0.0], [40.0]]), where=jnp.array([[False], [True]]))
    np.testing.assert_array_equal(rows, [[0], [2]])
