"""A model of one data set on arguments that are made up, which are like those of many."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from numpyro_vae.data.arrays import is_array
from numpyro_vae.model.trace import Model
from numpyro_vae.numpyro_internals import draw_improper


class Like(NamedTuple):
    """The shape and type of an array of one data set, and whether data sets have their own."""

    shape: tuple[int, ...]
    dtype: str
    is_own: bool

    def draw(self, rng: np.random.Generator) -> Any:
        """Return random numbers near 1, or of integers 0 and 1, which most models can take."""
        if np.issubdtype(self.dtype, np.floating):
            return jnp.asarray(rng.uniform(0.5, 1.5, size=self.shape), self.dtype)
        return jnp.asarray(rng.integers(0, 2, size=self.shape), self.dtype)


def likes(leaves: list[Any], axes: list[int | None]) -> tuple[Any, ...]:
    """Return what arguments of one data set are like; other things than arrays as they are.

    Args:
        leaves: the arguments of all data sets.
        axes: of data sets in each of them.
    """
    return tuple(_like(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True))


def _like(leaf: Any, axis: int | None) -> Any:
    if not is_array(leaf):
        return leaf
    shape = list(jnp.shape(leaf))
    if axis is not None:
        shape.pop(axis)
    return Like(tuple(shape), np.dtype(jnp.result_type(leaf)).name, axis is not None)


def draw_all(found: tuple[Any, ...]) -> list[Any]:
    """Return made up arguments, the same at each call."""
    rng = np.random.default_rng(0)
    return [x.draw(rng) if isinstance(x, Like) else x for x in found]


@lru_cache
def plates_of(model: Model, treedef: Any, found: tuple[Any, ...]) -> dict[str, int]:
    """Return the lengths of the plates of a model, of which nothing is computed.

    Args:
        model: of one data set.
        treedef: how leaves make arguments ``(args, kwargs)``.
        found: what the leaves are like.
    """
    lengths: dict[str, int] = {}

    def run() -> None:
        args, kwargs = jax.tree.unflatten(treedef, draw_all(found))
        seeded, draw = handlers.seed(rng_seed=0), handlers.substitute(substitute_fn=draw_improper)
        with handlers.block(), handlers.trace() as trace, seeded, draw:
            model(*args, **kwargs)
        plates = (site for site in trace.values() if site["type"] == "plate")
        lengths.update({site["name"]: site["args"][0] for site in plates})

    jax.eval_shape(run)
    return lengths
