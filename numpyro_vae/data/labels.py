"""The labels that frames, tables and xarray bring with them, by axis."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np

from numpyro_vae.data.arrays import Data, as_arguments, datum_axes
from numpyro_vae.data.columns import Columns

# By the place of an array among a model's arguments, its names along each axis, or None.
ColumnNames = dict[str, list[list[str] | None]]


def axis_labels(leaf: Any) -> list[Any]:
    """Return the pandas index of each axis, or None where it has none, or one of several levels."""
    if hasattr(leaf, "iloc"):  # of pandas
        found = list(leaf.axes)
    elif hasattr(leaf, "indexes") and hasattr(leaf, "dims"):  # of xarray
        found = [leaf.indexes.get(dim) for dim in leaf.dims]
    else:
        return [None] * len(np.shape(leaf))
    return [None if index is None or index.nlevels > 1 else index for index in found]


def column_names(data: Data, batch_axes: Any) -> ColumnNames:
    """Return the names of columns, of those arrays that have some; none of other data.

    Names are labels that are text, each of them once, along axes that are not of rows: numbers and
    dates say where something is, not what it is.

    Args:
        data: see `ArrayData.read`.
        batch_axes: likewise.

    Example:
        >>> import pandas as pd
        >>> column_names(pd.DataFrame({"a": [1.0], "b": [2.0]}), 0)
        {'[0][0]': [None, ['a', 'b']]}
    """
    if not (isinstance(data, tuple | dict) or hasattr(data, "__array__")):
        return {}
    leaves, found = jax.tree.leaves_with_path(as_arguments(data)), {}
    for (path, leaf), axis in zip(leaves, datum_axes(batch_axes, data), strict=True):
        names = _names(leaf, of_rows=axis or 0)
        if any(names):
            found[jax.tree_util.keystr(path)] = names
    return found


def in_order(data: Data, batch_axes: Any, known: ColumnNames, title: str = "data") -> Data:
    """Return data whose columns are in the order of those that are known, by their names.

    Columns without names stay in their places. So do those of other names, with a warning.

    Args:
        data: see `ArrayData.read`.
        batch_axes: likewise.
        known: what `column_names` found of other data.
        title: what the data are called.
    """
    if not known:
        return data
    own = column_names(data, batch_axes)
    args, kwargs = jax.tree.map_with_path(
        lambda path, leaf: _in_order(
            leaf, *(x.get(jax.tree_util.keystr(path), []) for x in (own, known)), title
        ),
        as_arguments(data),
    )
    if isinstance(data, dict):
        return kwargs
    return args if isinstance(data, tuple) else args[0]


def _in_order(
    leaf: Any, own: list[list[str] | None], known: list[list[str] | None], title: str
) -> Any:
    for axis, (mine, names) in enumerate(zip(own, known, strict=False)):
        if not mine or not names or mine == names:
            continue
        if {*mine} == {*names}:
            leaf = _take(leaf, axis, names)
            continue
        pairs = {"has": (mine, names), "lacks": (names, mine)}
        told = (
            f"{verb} {_few(sorted({*x} - {*y}))}" for verb, (x, y) in pairs.items() if {*x} - {*y}
        )
        warnings.warn(
            f"The {title} do not have the columns that were trained on: an argument "
            f"{' and '.join(told)}. Columns are taken by their places. Select those that were "
            f"trained on, {_few(names)}.",
            stacklevel=2,
        )
    return leaf


def _few(names: list[str]) -> str:
    """Write names, the first of them if they are many."""
    return f"{names[:5]}" if len(names) <= 5 else f"{names[:5]} and {len(names) - 5} others"


def _names(leaf: Any, of_rows: int) -> list[list[str] | None]:
    """Return the labels along each axis that are names; None along others, as that of rows."""
    names = _names_of_table(leaf)
    labels = axis_labels(leaf) if names is None else [None, names]
    return [
        list(index) if place != of_rows % len(labels) and _are_names(index) else None
        for place, index in enumerate(labels)
    ]


def _are_names(labels: Any) -> bool:
    if labels is None or not all(isinstance(x, str) for x in labels):
        return False
    return 0 < len(labels) == len({*labels})


def _names_of_table(leaf: Any) -> list[str] | None:
    """Return the names of the columns of a table of Parquet, Arrow or Polars; None of others."""
    if isinstance(leaf, Columns):
        return leaf.names if leaf.ndim == 2 else None
    names = getattr(leaf, "column_names", getattr(leaf, "columns", None))
    return names if isinstance(names, list) else None


def _take(leaf: Any, axis: int, names: list[str]) -> Any:
    """Return an array with those columns, in that order."""
    if isinstance(leaf, Columns):
        return Columns(leaf.source, names)
    if _names_of_table(leaf) is not None:
        return leaf.select(names)
    index = axis_labels(leaf)[axis].get_indexer(names)
    chosen = (*[slice(None)] * axis, index)
    return leaf.iloc[chosen] if hasattr(leaf, "iloc") else leaf[chosen]
