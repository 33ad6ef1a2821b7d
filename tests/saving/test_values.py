"""Values and arrays as they are stored, and back."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpyro.infer.autoguide import AutoNormal

from numpyro_vae import MLP, RNN, Fusion, LogScale, Masked, Segments, Softplus
from numpyro_vae.families import Flow
from numpyro_vae.saving.arrays import restore, store
from numpyro_vae.saving.codec import CannotStoreError, pack, unpack

VALUES = [
    None,
    True,
    1,
    0.1,
    float("inf"),
    "name",
    [1, [2.5, None]],
    (1, ("a", ())),
    {"a": {"b": (1,)}},
    {0: "zero", "0": "text"},
    {},
    LogScale(init_scale=0.1, bounds=(1e-3, 7.0)),
    Flow(3, (8, 6), Softplus()),
    MLP,
    AutoNormal,
    jax.nn.gelu,
]


def named(value):
    """A name that is the same in every process, as those of functions have their address."""
    return getattr(value, "__name__", repr(value))


@pytest.mark.parametrize("value", VALUES, ids=named)
def test_values_come_back_as_they_were(value):
    found = unpack(json.loads(json.dumps(pack(value), allow_nan=False)))
    assert found == value
    assert type(found) is type(value)


def test_partials_come_back_as_they_were():
    rnn = partial(RNN, cell=nnx.GRUCell, hidden_size=4)
    value = partial(Fusion, encoders={"x": partial(MLP, hidden_sizes=(8,)), "y": rnn})
    found = unpack(json.loads(json.dumps(pack(value))))
    assert found.func is Fusion
    assert found.keywords["encoders"]["x"].keywords == {"hidden_sizes": (8,)}
    assert found.keywords["encoders"]["y"].keywords == rnn.keywords


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda x: x, "lambda"),
        ({"a": [1, object()]}, r"\['a'\]\[1\] is an object of type builtins.object"),
        (partial(MLP, activation=lambda x: x), "lambda"),
        (np.zeros(3), "is an array"),
        (np.float64(3.0), "is an array"),
        ({1.5: 0}, "type builtins.dict"),
    ],
)
def test_what_cannot_be_stored_is_named(value, named):
    with pytest.raises(CannotStoreError, match=named):
        pack(value)


@pytest.mark.parametrize(
    "array",
    [
        jnp.float32(3.0),
        jnp.zeros((0, 2)),
        jnp.arange(3),
        jnp.array([True, False]),
        jnp.array([1.5, -0.0, jnp.nan, jnp.inf], jnp.bfloat16),
        jnp.array(2.5, jnp.bfloat16),
        jnp.array([[1 + 2j]]),
        jnp.arange(6.0).reshape(2, 3).T,
        np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        jax.random.key(3),
        jax.random.split(jax.random.key(3, impl="rbg"), 4),
        jax.random.PRNGKey(3),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_come_back_bit_for_bit(array):
    arrays = {}
    known = json.loads(json.dumps(store(arrays, array, "a")))
    found = restore(arrays, known)
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array, found = jax.random.key_data(array), jax.random.key_data(found)
    assert np.asarray(found).tobytes() == np.asarray(array).tobytes()


def test_more_digits_than_jax_is_set_to_are_not_lost():
    arrays = {}
    known = store(arrays, np.zeros(3), "a")
    with pytest.raises(ValueError, match=r"a has values of type float64.*numpyro.enable_x64\(\)"):
        restore(arrays, known)


def test_shapes_of_masked_and_grouped_data_come_back():
    masked = Masked(jnp.zeros((4, 2)), jnp.ones((4, 2), bool))
    value = (masked, Segments(jnp.zeros(5), jnp.array([0, 1, 1, 2, 2]), 3))
    packed = pack(value, lambda array, path: [array.shape, str(array.dtype)])
    first, second = unpack(packed, lambda known: jax.ShapeDtypeStruct(*known))
    assert isinstance(first, Masked)
    assert first.mask == jax.ShapeDtypeStruct((4, 2), bool)
    assert second.num_segments == 3
    assert second.ids == jax.ShapeDtypeStruct((5,), jnp.int32)
