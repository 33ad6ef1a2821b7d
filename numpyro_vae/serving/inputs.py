"""What is given of the rows that are asked for: the arrays among the model's arguments, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_vae.data.arrays import Layout
from numpyro_vae.data.batch import Batch
from numpyro_vae.data.labels import ColumnNames
from numpyro_vae.inference.gathering import arguments_by_name
from numpyro_vae.inference.rows import Rows


@dataclass(frozen=True)
class Inputs:
    """The arrays of rows by name.

    Attributes:
        rows: like those that are to be served.
        names: of the arrays.
        axes: by name the axis of the rows; None for an array that they share.
        fills_plate: whether the model's plate is told to hold the row that it is given.
    """

    rows: Rows
    names: tuple[str, ...]
    axes: dict[str, int | None]
    fills_plate: bool

    @classmethod
    def of(cls, model: Callable[..., Any], rows: Rows) -> Inputs:
        """Return the inputs of a model.

        Args:
            model: whose arguments have names.
            rows: that it is given.
        """
        names = names_of_arrays(model, rows.data.layout)
        pairs = zip(rows.data.layout.axes, rows.data.arrays, strict=True)
        axes = [None if axis is None else axis % array.ndim for axis, array in pairs]
        fills_plate = rows.batch(jnp.arange(1)).fills_plate
        return cls(rows, names, dict(zip(names, axes, strict=True)), fills_plate)

    def shapes(self, size: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of so many rows, a number or a symbol of `jax.export`."""
        found = {}
        for name, array in zip(self.names, self.rows.data.arrays, strict=True):
            shape, axis = list(array.shape), self.axes[name]
            if axis is not None:
                shape[axis] = size
            found[name] = jax.ShapeDtypeStruct(tuple(shape), array.dtype)
        return found

    def columns(self, known: ColumnNames) -> dict[str, list[list[str] | None]]:
        """Return by name the names of columns, of those by the places of arguments."""
        layout = self.rows.data.layout
        places = jax.tree.unflatten(layout.treedef, range(len(layout.static)))
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(places)]
        arrays = [path for path, leaf in zip(paths, layout.static, strict=True) if leaf is None]
        pairs = zip(self.names, arrays, strict=True)
        return {name: known[path] for name, path in pairs if path in known}

    def take(self, indices: Any) -> dict[str, Array]:
        """Return rows by their numbers."""
        data = self.rows.data
        return dict(
            zip(self.names, data.layout.take(data.arrays, jnp.asarray(indices)), strict=True)
        )

    def batch(self, row: dict[str, Array], number: Array) -> Batch:
        """Return the batch of one row alone.

        Args:
            row: its arrays, without an axis of rows.
            number: by which its draws are told from those of others.
        """
        axes = self.axes.items()
        arrays = [
            row[name] if axis is None else jnp.expand_dims(row[name], axis) for name, axis in axes
        ]
        return Batch(
            tuple(arrays),
            number[None],
            None,
            layout=self.rows.data.layout,
            plate=self.rows.plate,
            num_data=1,
            cuts=self.fills_plate,  # as a plate that is told its rows holds the first then
            fills_plate=self.fills_plate,
        )


class _Place(int):
    """Stands for an array among the arguments."""


def names_of_arrays(model: Callable[..., Any], layout: Layout) -> tuple[str, ...]:
    """Return the names of arrays: of a model's arguments, and where in them they are.

    Example:
        >>> from numpyro_vae.data.arrays import ArrayData
        >>> data = {"x": jnp.zeros(2), "y": {"a": jnp.zeros(2)}}
        >>> names_of_arrays(lambda x, y: None, ArrayData.read(data).layout)
        ('x', "y['a']")
    """
    places = [_Place(place) for place in range(len(layout.axes))]
    by_name = arguments_by_name(model, *layout.whole(places))
    found = {
        leaf: name + jax.tree_util.keystr(path)
        for name, value in by_name.items()
        for path, leaf in jax.tree.leaves_with_path(value)
        if isinstance(leaf, _Place)
    }
    return tuple(found[place] for place in places)


def require_parted(rows: Rows) -> None:
    """Raise ValueError if the model takes its data whole."""
    if rows.data.is_whole:
        raise ValueError(
            "The posterior cannot be exported: the model or the guide takes its data whole, as "
            "Segments or with batch_axes=None, so that a row of them is nothing by itself. Write "
            "groups of unequal size as Masked, padded to one length, with a row a group."
        )
