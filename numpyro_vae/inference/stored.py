"""Rows that are read where they are wanted: on disk, or of a sparse matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.stores import Store

SOME = 256  # rows that a model and a guide are read with


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of data that are not in memory, read as a model takes them.

    Attributes:
        store: the data.
        like: some of the rows.
    """

    store: Store
    like: ArrayData

    def read(self, rows: np.ndarray) -> ArrayData:
        """Return rows by their numbers, on the device."""
        first, last = int(np.min(rows)), int(np.max(rows))
        name = f"{self.store.name}[{first}:{last + 1}]"
        found = ArrayData.read(self.store.take(rows), self.store.batch_axes, name)
        cut = zip(found.arrays, found.layout.axes, strict=True)
        rest = iter(array for array, axis in cut if axis is not None)
        pairs = zip(self.like.arrays, self.like.layout.axes, strict=True)
        arrays = tuple(array if axis is None else next(rest) for array, axis in pairs)
        return replace(self.like, arrays=arrays, num_data=len(rows), not_finite=found.not_finite)

    def blocks(self) -> Iterator[ArrayData]:
        """Yield all rows in order, as many at once as are read at once."""
        number, size = self.store.num_rows, self.store.read_rows
        for start in range(0, number, size):
            yield self.read(np.arange(start, min(start + size, number)))
