"""Rows that are to be read: on disk, or of a sparse matrix."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from numpyro_vae.data.arrays import count_rows, datum_axes, take_rows
from numpyro_vae.data.sparse import as_rows

READ_BYTES = 2**23  # of a contiguous read, after which seeking costs next to nothing
KEPT = 2  # blocks that were read last, as a batch may begin in one and end in the next


def is_stored(data: Any, batch_axes: Any = 0) -> bool:
    """Return whether rows of data are to be read: on disk, as in a memmap or in Zarr, or sparse.

    Example:
        >>> is_stored((np.zeros(3), np.zeros(3)))
        False
    """
    leaves = zip(jax.tree.leaves(data), datum_axes(batch_axes, data), strict=True)
    return any(axis is not None and _is_stored(leaf) for leaf, axis in leaves)


def _is_stored(leaf: Any) -> bool:
    # Arrays of dask and xarray have chunks too, but compute as NumPy's do.
    has_chunks = hasattr(leaf, "chunks") and not hasattr(leaf, "__array_ufunc__")
    return isinstance(leaf, np.memmap) or has_chunks


def _of_memory(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, np.memmap) else leaf


def in_memory(data: Any) -> Any:
    """Return data whose arrays are all in memory, dense, and take rows by their numbers."""

    def read(leaf: Any) -> Any:
        is_as_is = isinstance(leaf, jax.Array) or not hasattr(leaf, "__array__")
        return np.asarray(leaf) if _is_stored(leaf) or not is_as_is else leaf

    return jax.tree.map(read, as_rows(data))


class Store:
    """Data of which some arrays are on disk: their rows, read in blocks of consecutive ones.

    Args:
        data: as for `ArrayData.read`; some leaves are on disk or sparse, others in memory.
        batch_axes: likewise.
        name: what the data are called in messages.
        read_bytes: how much is read at once; a whole number of the store's own chunks.

    Raises:
        ValueError: if arrays disagree in length, or there are no rows.
    """

    def __init__(
        self, data: Any, batch_axes: Any, name: str = "data", read_bytes: int = READ_BYTES
    ):
        # A slice of a JAX array is compiled for every length; frames take rows by their labels.
        self.data = jax.tree.map(
            lambda x: np.asarray(x) if hasattr(x, "__array__") and not _is_stored(x) else x, data
        )
        self.batch_axes, self.axes = batch_axes, datum_axes(batch_axes, data)
        self.name, self.num_rows = name, count_rows(data, batch_axes, name)
        leaves = jax.tree.leaves_with_path(self.data)
        self.paths = [name + jax.tree_util.keystr(path) for path, _ in leaves]
        self.read_rows = self._rows_of(read_bytes)
        self._blocks: dict[int, Any] = {}

    def _rows_of(self, read_bytes: int) -> int:
        """Return the rows of a read: about so many bytes, and whole chunks of the stores."""
        leaves = zip(jax.tree.leaves(self.data), self.axes, strict=True)
        batched = [(leaf, axis) for leaf, axis in leaves if axis is not None]
        row_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in batched) / self.num_rows
        chunks = [x.chunks[axis] for x, axis in batched if getattr(x, "chunks", None)]
        chunk = max(chunks, default=1)
        return chunk * max(1, round(read_bytes / max(row_bytes, 1) / chunk))

    def require_length(self) -> None:
        """Raise ValueError if an array has another length than at first."""
        for leaf, axis, path in self._leaves(self.data):
            self._require_length(leaf.shape[axis], self.num_rows, path)

    def read(self, span: slice) -> Any:
        """Return consecutive rows, in the form of the data, in memory.

        Raises:
            ValueError: if an array no longer has them.
        """
        part = jax.tree.map(_of_memory, take_rows(self.data, self.batch_axes, span))
        for leaf, axis, path in self._leaves(part):
            place = f"{path}[{span.start}:{span.stop}]"
            self._require_length(leaf.shape[axis], span.stop - span.start, place)
        return part

    def take(self, rows: np.ndarray) -> Any:
        """Return rows by their numbers, in the form of the data, in memory."""
        wanted, places = np.unique(rows, return_inverse=True)
        starts = wanted // self.read_rows
        is_dense = wanted[-1] - wanted[0] < len(wanted)
        parts = []
        for run in np.split(wanted, np.flatnonzero(np.diff(starts)) + 1):
            start = int(run[0])
            if is_dense:  # as in a pass over all rows, where the block's others are wanted too
                start -= start % self.read_rows
                block = self._block(start // self.read_rows)
            else:
                block = self.read(slice(start, int(run[-1]) + 1))
            parts.append(take_rows(block, self.batch_axes, run - start))
        return take_rows(self.join(parts), self.batch_axes, places)

    def _block(self, number: int) -> Any:
        """Return a block of rows, of which the last few are kept."""
        if number not in self._blocks:
            start = number * self.read_rows
            found = self.read(slice(start, min(start + self.read_rows, self.num_rows)))
            kept = list(self._blocks.items())[1 - KEPT :]
            self._blocks = dict([*kept, (number, found)])
        return self._blocks[number]

    def join(self, parts: list[Any]) -> Any:
        """Return the rows of several parts one after another."""
        leaves, treedef = jax.tree.flatten(parts[0])
        columns = zip(*map(jax.tree.leaves, parts), strict=True)
        joined = [
            leaf if axis is None else np.concatenate(column, axis)
            for leaf, axis, column in zip(leaves, self.axes, columns, strict=True)
        ]
        return jax.tree.unflatten(treedef, joined)

    def _leaves(self, data: Any) -> list[tuple[Any, int, str]]:
        """Return the arrays with a datum axis, this axis, and what they are called."""
        leaves = zip(jax.tree.leaves(data), self.axes, self.paths, strict=True)
        return [(leaf, axis, path) for leaf, axis, path in leaves if axis is not None]

    @staticmethod
    def _require_length(found: int, expected: int, name: str) -> None:
        if found != expected:
            raise ValueError(
                f"{name} has {found} rows, and had {expected} when it was first read. A store may "
                "not change its length while it is in use: use a copy, or a slice of it."
            )
