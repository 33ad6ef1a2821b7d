"""Sparse matrices, of which rows are dense once they are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

SPARSE = ("csr", "csc", "coo", "bsr", "dia", "dok", "lil")


class SparseRows:
    """A matrix in compressed sparse rows, of SciPy's or anndata's, of which rows are dense.

    Args:
        matrix: the matrix.
    """

    chunks, ndim = None, 2

    def __init__(self, matrix: Any):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, np.dtype(matrix.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all rows."""
        return self[:].astype(dtype or self.dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return some rows."""
        return self.matrix[key].toarray()


def as_rows(data: Any) -> Any:
    """Return data in which sparse matrices give dense rows, and tables of pyarrow are arrays.

    Raises:
        TypeError: if a sparse matrix is not of rows, or a Parquet dataset comes without columns.
    """
    return jax.tree.map(_as_rows, data, is_leaf=_is_one)


def _is_one(data: Any) -> bool:
    """Return whether data are an array, or an iterable of batches, which is not to be begun."""
    return isinstance(data, Iterable) and not isinstance(data, tuple | list | dict)


def _as_rows(leaf: Any) -> Any:
    if type(leaf).__module__.startswith("pyarrow"):
        if hasattr(leaf, "__array__"):
            return np.asarray(leaf)
        raise TypeError(
            f"data has a {type(leaf).__name__} of pyarrow: choose its columns, as in "
            "numpyro_vae.Columns(dataset, ['a', 'b'])."
        )
    form = getattr(leaf, "format", None)
    if not isinstance(form, str) or form not in SPARSE or hasattr(leaf, "__array__"):
        return leaf
    if form != "csr":
        raise TypeError(
            f"data has a sparse matrix of format {form!r}, expected compressed sparse rows, of "
            "which rows can be read. Convert it, as with x.tocsr()."
        )
    return SparseRows(leaf)
