"""The labels that pandas and xarray data bring with them, as coordinates of results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from numpyro_vae.data.arrays import as_arguments, datum_axes
from numpyro_vae.data.labels import axis_labels
from numpyro_vae.inference.datatree import argument_dims, tree_name
from numpyro_vae.inference.gathering import arguments_by_name, rows_first, site_dims

if TYPE_CHECKING:
    from numpyro_vae.inference.gathering import Gathering

Coords = dict[str, np.ndarray]


class Leaf(NamedTuple):
    """An array among a model's arguments, and its datum axis."""

    value: Any
    axis: int | None


def with_row_labels(
    coords: Mapping[str, Any] | None, data: Any, batch_axes: Any, plate: str
) -> dict[str, Any]:
    """Return coordinates with the labels of the rows, if data have some and the user gave none.

    Args:
        coords: those of the user, by dimension.
        data: as for `fit`.
        batch_axes: likewise.
        plate: the name of the plate.

    Raises:
        ValueError: if arrays have other labels than one another.
    """
    # xarray takes a tuple for dimensions and values.
    coords = {dim: list(x) if isinstance(x, tuple) else x for dim, x in (coords or {}).items()}
    if plate in coords:
        return coords
    found: Coords = {}
    paths = jax.tree.leaves_with_path(data)
    for (path, leaf), axis in zip(paths, datum_axes(batch_axes, data), strict=True):
        index = None if axis is None else axis_labels(leaf)[axis]
        if index is None or _is_numbering(index):
            continue
        labels = np.asarray(index)
        if not np.array_equal(found.setdefault(plate, labels), labels):
            raise ValueError(
                f"data{jax.tree_util.keystr(path)} has other labels of rows than what stands "
                "before it, and rows go together by their places. Align them, as with .loc, or "
                f"drop the labels, or name the rows with coords={{{plate!r}: ...}}."
            )
    return {**found, **coords}


def with_labels(
    coords: Mapping[str, Any] | None, gathering: Gathering, data: Any
) -> dict[str, Any]:
    """Return coordinates with the labels of rows and of other axes of data.

    Args:
        coords: those of the user, by the dimensions of a tree.
        gathering: what the tree has.
        data: as for `fit`.
    """
    runner, plate = gathering.runner, gathering.rows.plate
    found = with_row_labels(coords, data, runner.batch_axes, plate)
    leaves, treedef = jax.tree.flatten(as_arguments(data))
    pairs = map(Leaf, leaves, datum_axes(runner.batch_axes, data))
    arguments = arguments_by_name(runner.guide.model, *jax.tree.unflatten(treedef, list(pairs)))
    named = site_dims(runner.guide.sites)
    for name, leaf in arguments.items():
        if not isinstance(leaf, Leaf) or leaf.axis is None:
            continue
        indexes = axis_labels(leaf.value)
        indexes.pop(leaf.axis)
        if all(index is None for index in indexes):
            continue
        is_observed = name in gathering.observes
        if not is_observed and "constant_data" not in gathering.groups:
            continue
        site = gathering.observes.get(name, name)
        plates = (plate, *runner.guide.segments)
        dims = rows_first(named, [site], plates)[site]
        if not is_observed:
            shape = list(np.shape(leaf.value))
            shape.insert(0, shape.pop(leaf.axis))
            dims = argument_dims(runner.guide.sites, site, dims, shape)
        dims = dims[1:]
        dims += [f"{site}_dim_{place}" for place in range(len(indexes) - len(dims))]
        for dim, index in zip(dims, indexes, strict=False):
            if index is not None:
                found.setdefault(dim, np.asarray(index))
    return found


def require_length(coords: Mapping[str, Any], plate: str, num_rows: int) -> None:
    """Raise ValueError if the coordinates of the rows are not as many as these."""
    for name in {plate, tree_name(plate)} & set(coords):
        if len(coords[name]) != num_rows:
            raise ValueError(
                f"coords[{name!r}] has {len(coords[name])} values, and the data have {num_rows} "
                "rows. Give one for each row."
            )


def _is_numbering(index: Any) -> bool:
    """Return whether labels are the numbers of rows, as results have them anyway."""
    return index.dtype.kind in "iu" and np.array_equal(index, np.arange(len(index)))
