"""The shapes of a model's arguments: those that a guide read, and those that it is given later."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

Shapes = dict[str, tuple[int, ...]]


def argument_shapes(args: tuple, kwargs: Mapping[str, Any]) -> Shapes:
    """Return the shape of each array among a model's arguments, by position or name.

    Example:
        >>> argument_shapes((np.zeros(3), "scalar"), {"y": {"a": np.zeros((2, 1))}})
        {'0': (3,), "'y'['a']": (2, 1)}
    """
    return {
        f"{place!r}{jax.tree_util.keystr(path)}": leaf.shape
        for place, argument in (*enumerate(args), *sorted(kwargs.items()))
        for path, leaf in jax.tree.leaves_with_path(argument)
        if hasattr(leaf, "shape")
    }


def abstract(arguments: Any) -> Any:
    """Return arguments with shapes in the place of arrays; what is no array stays.

    Example:
        >>> abstract((np.zeros(3), "scalar"))
        (ShapeDtypeStruct(shape=(3,), dtype=float32), 'scalar')
    """

    def shape_of(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))

    return jax.tree.map(shape_of, arguments)


def require_rows(
    known: Shapes, args: tuple, kwargs: Mapping[str, Any], axes: Sequence[int | None]
) -> None:
    """Raise if an array has the shape of one datum, where rows of data are expected.

    A datum of three values would be read as three data of one value each.

    Args:
        known: the shapes that the guide has read.
        args: the model's arguments now.
        kwargs: its keyword arguments.
        axes: the datum axis of each array among these.

    Raises:
        ValueError: naming the argument, and both shapes.
    """
    for (name, now), axis in zip(argument_shapes(args, kwargs).items(), axes, strict=True):
        before = known.get(name, ())
        if axis is not None and len(now) < len(before) and now == _without(axis, before):
            raise ValueError(
                f"Argument {name} has shape {now}, that of one datum; the guide was made with "
                f"rows of data, of shape {before}. Pass rows, as in x[None] for one datum."
            )


@contextmanager
def explained(
    known: Shapes, args: tuple, kwargs: Mapping[str, Any], axes: Sequence[int | None]
) -> Generator[None]:
    """Say of an error within that the data have another shape than those a guide has read.

    Whether such data can be had is up to the model and the network: sequences of any length may do.

    Args:
        known: the shapes that the guide has read.
        args: the model's arguments now.
        kwargs: its keyword arguments.
        axes: the datum axis of each array among these, in which alone shapes differ as they may.

    Raises:
        ValueError: in place of a TypeError or ValueError, if shapes differ.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        found = argument_shapes(args, kwargs)
        differ = [
            f"argument {name} has shape {now}, where it had {known[name]}"
            for (name, now), axis in zip(found.items(), axes, strict=True)
            if name in known and _without(axis, known[name]) != _without(axis, now)
        ]
        if not differ:
            raise
        raise ValueError(
            f"The data have another shape than those that the guide was made with: "
            f"{'; '.join(differ)}. Only the number of rows may differ, unless the model and the "
            f"network can take more. Pass data of the shape it was trained on. ({error})"
        ) from error


def _without(axis: int | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a row."""
    if axis is None or not -len(shape) <= axis < len(shape):
        return shape
    return tuple(np.delete(shape, axis).tolist())
