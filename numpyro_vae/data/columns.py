"""Columns of a Parquet dataset, as an array on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Columns"]


class Columns:
    """Numeric columns of a Parquet dataset, as an array on disk that is read by row groups.

    It stands where data are an array: alone, or in a tuple or dict of arguments. What is not on
    disk needs no such thing: a `pyarrow.Table` is taken as the array that it is.

    Args:
        source: the path of a file or a folder, or a `pyarrow.dataset.Dataset`.
        names: of the columns: a list of them for an array of rows and columns, one for an array of
            rows; by default all.

    Raises:
        ImportError: if pyarrow is not installed.
        KeyError: if there is no such column.
        TypeError: if a column has no numbers.

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.parquet as pq
        >>> path = f"{tempfile.mkdtemp()}/cells.parquet"
        >>> pq.write_table(pa.table({"a": [1.0, 2.0, 3.0], "b": [0, 1, 0]}), path)
        >>> Columns(path)[1:]
        array([[2., 1.],
               [3., 0.]])
        >>> Columns(path, "b").shape
        (3,)
    """

    def __init__(self, source: Any, names: str | Sequence[str] | None = None):
        if isinstance(source, str | os.PathLike):
            source = _dataset(source)
        self.source = source
        self.names = [names] if isinstance(names, str) else list(names or source.schema.names)
        self._types = [self._type(name) for name in self.names]
        self._groups = [
            group for file in source.get_fragments() for group in file.split_by_row_group()
        ]
        self._ends = np.cumsum([0, *(group.row_groups[0].num_rows for group in self._groups)])
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0))
        rows = int(self._ends[-1])
        self.shape = (rows,) if isinstance(names, str) else (rows, len(self.names))
        self.ndim, self.dtype = len(self.shape), np.result_type(*self._types)
        self.chunks = (max(1, int(np.diff(self._ends).max(initial=1))), *self.shape[1:])

    def _type(self, name: str) -> np.dtype:
        if name not in self.source.schema.names:
            raise KeyError(f"There is no column {name!r}, choose from {self.source.schema.names}.")
        kind = self.source.schema.field(name).type
        try:
            found = np.dtype(kind.to_pandas_dtype())
        except NotImplementedError:
            found = np.dtype(object)
        if found.kind != "b" and not np.issubdtype(found, np.number):
            raise TypeError(
                f"Column {name!r} is of type {kind}, expected numbers or booleans. Choose others "
                "with names=, or write it as numbers."
            )
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all rows."""
        return self[:].astype(dtype or self.dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return some rows, and of these what else is chosen."""
        rows, *rest = key if isinstance(key, tuple) else (key,)
        start, stop = 0, self.shape[0]
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(stop)
            rows = slice(None)
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        last = int(np.searchsorted(self._ends, max(stop, start), side="left"))
        parts = [self._read(number) for number in range(first, min(last, len(self._groups)))]
        empty = np.empty((0, *self.shape[1:]), self.dtype)
        offset = int(self._ends[first])
        found = np.concatenate([empty, *parts])[start - offset : max(stop, start) - offset]
        return found[(rows, *rest)]

    def _read(self, number: int) -> np.ndarray:
        """Return the rows of a group, of which the last one is kept."""
        if self._last[0] != number:
            table = self._groups[number].to_table(columns=self.names)
            pairs = zip(self.names, self._types, strict=True)
            columns = [self._values(table[name], name, known) for name, known in pairs]
            found = np.stack(columns, axis=1) if self.ndim == 2 else columns[0]
            self._last = (number, found.astype(self.dtype, copy=False))
        return self._last[1]

    @staticmethod
    def _values(column: Any, name: str, known: np.dtype) -> np.ndarray:
        """Return the values of a column, NaN where one of floats is missing."""
        if column.null_count and not np.issubdtype(known, np.floating):
            raise ValueError(
                f"Column {name!r} lacks {column.null_count} of its values in a row group, and "
                f"{known} has no NaN to stand for them. Fill them in, or write it as floats."
            )
        return column.to_numpy().astype(known, copy=False)


def _dataset(path: str | os.PathLike[str]) -> Any:
    try:
        import pyarrow.dataset
    except ImportError as error:
        raise ImportError(
            "Columns of a Parquet dataset are read by pyarrow: pip install 'numpyro-vae[stores]'."
        ) from error
    return pyarrow.dataset.dataset(os.fspath(path), format="parquet")
