"""Whether all values of a pytree are finite, by one reduction in compiled code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Return whether every floating-point value of a pytree is finite."""
    return _all(jnp.isfinite(leaf) for leaf in _floats(tree))


def stays_finite(old: Any, new: Any) -> Bool[Array, ""]:
    """Return whether what was finite in a pytree still is, in another of the same structure.

    Of an optimizer's state not all is: `optax.contrib.reduce_on_plateau` begins with an infinite
    loss, as the best so far.
    """
    pairs = zip(_floats(old), _floats(new), strict=True)
    return _all(jnp.isfinite(after) | ~jnp.isfinite(before) for before, after in pairs)


def _all(found: Iterable[Bool[Array, "..."]]) -> Bool[Array, ""]:
    """Return whether all values are true, by one reduction, as each takes time to compile."""
    return jnp.concatenate([jnp.ones(1, bool), *map(jnp.ravel, found)]).all()


def _floats(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
