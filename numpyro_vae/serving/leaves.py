"""Parameters as arrays by name, of dtypes that NumPy knows, and back in compiled code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arguments import is_typed_key

KINDS = "biufc"  # of dtypes; others, such as bfloat16, are stored as integers of their size


@dataclass(frozen=True)
class Leaves:
    """How parameters are made of arrays again; they are any pytree, as of dicts with integer keys.

    Attributes:
        names: of the arrays.
        types: of the leaves; of random keys the name of how they make bits.
        treedef: the structure of the parameters.
    """

    names: tuple[str, ...]
    types: tuple[Any, ...]
    treedef: Any

    @classmethod
    def of(cls, params: dict[str, Any]) -> tuple[dict[str, np.ndarray], Leaves]:
        """Return parameters as arrays by name, and how they are made of these.

        Example:
            >>> arrays, leaves = Leaves.of({"w": {0: jnp.ones(2, jnp.bfloat16)}})
            >>> arrays
            {"['w'][0]": array([16256, 16256], dtype=uint16)}
            >>> leaves.restore(arrays)
            {'w': {0: Array([1, 1], dtype=bfloat16)}}
        """
        pairs, treedef = jax.tree.flatten_with_path(params)
        values = [jnp.asarray(leaf) for _, leaf in pairs]
        names = tuple(jax.tree_util.keystr(path) for path, _ in pairs)
        arrays = dict(zip(names, map(_plain, values), strict=True))
        return arrays, cls(names, tuple(map(_type, values)), treedef)

    def restore(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters, in compiled code or outside of it."""
        pairs = zip(self.names, self.types, strict=True)
        return jax.tree.unflatten(
            self.treedef, [_typed(arrays[name], kind) for name, kind in pairs]
        )


def _type(value: Array) -> Any:
    return str(jax.random.key_impl(value)) if is_typed_key(value) else value.dtype


def _plain(value: Array) -> np.ndarray:
    array = np.asarray(jax.random.key_data(value) if is_typed_key(value) else value)
    return array if array.dtype.kind in KINDS else array.view(f"u{array.itemsize}")


def _typed(array: Any, kind: Any) -> Array:
    array = jnp.asarray(array)
    if isinstance(kind, str):
        return jax.random.wrap_key_data(array, impl=kind)
    return array if array.dtype == kind else jax.lax.bitcast_convert_type(array, kind)
