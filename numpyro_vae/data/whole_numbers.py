"""Floats among a model's arguments, where it looks something up by whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_vae.data.arrays import Layout
from numpyro_vae.data.batch import Batch


class WholeNumbersError(TypeError):
    """A model needs arguments as whole numbers, and has them as floats."""


def telling_of_floats(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a batch, and of more, that fails of floats with `WholeNumbersError`.

    Args:
        fn: the function; it is run again, abstractly, only where it fails.
    """

    def run(*args: Any) -> Any:
        place = next((i for i, arg in enumerate(args) if isinstance(arg, Batch)), None)
        if place is None:
            return fn(*args)
        batch = args[place]

        def again(arrays: tuple) -> Any:
            return fn(*args[:place], replace(batch, arrays=arrays), *args[place + 1 :])

        with floats_told(again, batch.arrays, batch.layout):
            return fn(*args)

    return run


@contextmanager
def floats_told(
    run: Callable[[tuple], Any], arrays: Sequence[Any], layout: Layout
) -> Generator[None]:
    """Say of an error within which arguments are floats, where whole numbers would have done.

    Args:
        run: what is done within, for other arrays.
        arrays: those among the model's arguments.
        layout: how they become the arguments.

    Raises:
        WholeNumbersError: in place of a TypeError or ValueError, if it does not come up with
            whole numbers in the place of floats.
    """
    try:
        yield
    except WholeNumbersError:
        raise
    except (TypeError, ValueError) as error:
        floats = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
        needed = _needed(run, tuple(arrays), floats)
        if not needed:
            raise
        names = layout.names
        found = [f"argument {names[i]} has values of type {arrays[i].dtype}" for i in needed]
        raise WholeNumbersError(
            f"The model or the encoder needs whole numbers, such as an index or a category, where "
            f"{' and '.join(found)}: pass integers, as with .astype(int). ({error})"
        ) from error


def _needed(run: Callable[[tuple], Any], arrays: tuple, floats: list[int]) -> list[int]:
    """Return which floats must be whole numbers for a function to run; none if that is not why."""
    one = next(([i] for i in floats if _runs(run, arrays, [i])), None)
    if one is not None:
        return one
    if len(floats) < 2 or not _runs(run, arrays, floats):
        return []
    return [i for i in floats if not _runs(run, arrays, {*floats} - {i})]


def _runs(run: Callable[[tuple], Any], arrays: tuple, whole: Collection[int]) -> bool:
    """Return whether a function runs with some arrays as whole numbers, computing nothing."""
    try:
        cast = (_whole(x) if i in whole else x for i, x in enumerate(arrays))
        jax.eval_shape(lambda: (run(tuple(cast)), None)[1])
    except Exception:  # of any kind, as the model's own code raises it
        return False
    return True


def _whole(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(int))
    return jnp.asarray(x).astype(int)
