"""The leaves of a pytree as one vector of bytes, which Orbax cannot rename, move, or refuse.

Orbax makes texts of integer names, takes neither empty arrays nor random keys, and asks on which
devices arrays are to be. A vector has none of these; its parts are told apart by their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

Description = dict[str, Any]  # by array its dtype and its shape, in order


def leaves_of(tree: Any, name: str) -> dict[str, np.ndarray]:
    """Return the leaves of a pytree, random keys as numbers, as ``"name 0"`` and so on."""
    numbers = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(tree)]
    return {f"{name} {place}": leaf for place, leaf in enumerate(jax.device_get(numbers))}


def with_leaves(like: Any, arrays: Mapping[str, np.ndarray], name: str) -> Any:
    """Return a pytree of the structure of another one, with leaves that `leaves_of` returned."""
    leaves, treedef = jax.tree.flatten(like)
    found = [_as(leaf, arrays[f"{name} {place}"]) for place, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, found)


def _as(like: Array, found: np.ndarray) -> Array:
    if not _is_key(like):
        return jnp.asarray(found)
    return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(like))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def pack(arrays: Mapping[str, np.ndarray]) -> tuple[UInt8[np.ndarray, " bytes"], Description]:
    """Return the bytes of all arrays, and what they are.

    Example:
        >>> packed, known = pack({"a": np.array([1.5, 2.5], np.float32)})
        >>> packed.shape, known
        ((8,), {'a': ['float32', [2]]})
        >>> unpack(packed, known)["a"]
        array([1.5, 2.5], dtype=float32)
    """
    parts = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays.values()]
    known = {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}
    return np.concatenate(parts), known


def unpack(packed: UInt8[np.ndarray, " bytes"], known: Description) -> dict[str, np.ndarray]:
    """Return the arrays that `pack` made bytes of."""
    arrays, start = {}, 0
    for name, (dtype, shape) in known.items():
        stop = start + jnp.dtype(dtype).itemsize * math.prod(shape)
        part = packed[start:stop].tobytes()
        arrays[name], start = np.frombuffer(part, jnp.dtype(dtype)).reshape(shape), stop
    return arrays
