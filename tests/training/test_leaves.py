"""The arrays of a checkpoint as bytes, and what tells one fit from another."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_vae.training.identity import digest
from numpyro_vae.training.leaves import leaves_of, pack, unpack, with_leaves

TREE = {
    0: jnp.arange(3),
    1: [jnp.zeros((0, 2)), jnp.float32(1.5)],
    2: (jnp.array([True, False]), jnp.array([1.5, jnp.nan], jnp.bfloat16)),
    3: {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2)},
    4: {"legacy": jax.random.PRNGKey(0), "transposed": jnp.arange(6.0).reshape(2, 3).T},
}


def test_a_pytree_comes_back_bit_for_bit():
    packed, known = pack(leaves_of(TREE, "state"))
    arrays = unpack(packed, json.loads(json.dumps(known)))
    found = with_leaves(TREE, arrays, "state")
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for one, other in zip(*map(jax.tree.leaves, (found, TREE)), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_fingerprint_is_the_same_for_the_same():
    assert digest(TREE) == digest(jax.tree.map(lambda x: x, TREE))
    assert digest(jnp.arange(3)) == digest(np.arange(3, dtype=np.int32))
    assert digest(object()) == digest(object())  # of what has no values


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.array([1.0, 2.0, 4.0])},
        {"b": np.array([1.0, 2.0, 3.0])},
        {"a": np.array([[1.0, 2.0, 3.0]])},
        {"a": np.array([1.0, 2.0, 3.0], np.float32)},
        {"a": [1.0, 2.0, 3.0]},
        {"a": np.array([1.0, 2.0, 3.0]), "b": "text"},
    ],
)
def test_a_fingerprint_differs(other):
    assert digest({"a": np.array([1.0, 2.0, 3.0])}) != digest(other)
