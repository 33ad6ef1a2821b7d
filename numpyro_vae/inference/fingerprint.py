"""Fingerprints of data, by which results know what rows they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, UInt32

from numpyro_vae.data.arrays import ArrayData

if TYPE_CHECKING:
    from xarray import DataTree

NAME = "fingerprint"  # of the coordinate and of the attribute that carry it
DIGEST = 8  # bytes of the fingerprint of all rows

Fingerprint = UInt32[np.ndarray, "rows"]


def fingerprint_rows(data: ArrayData, num_rows: int) -> Fingerprint:
    r"""Return a number for each row, made of the bytes of its values in all arrays.

    It is :math:`\sum_i k_i x_i \bmod 2^{64}`, less its lower half, of the 32-bit words :math:`x` of
    a row and fixed random numbers :math:`k`: rows that differ agree by chance alone, once in
    :math:`2^{32}`. All rows of data that the model takes whole have the same.

    Args:
        data: as they are on the device.
        num_rows: how many rows they are.

    Reference:
        Lemire and Kaser, *Strongly Universal String Hashing is Fast*, Computer Journal 57, 2014.
    """
    if data.is_whole:
        arrays = (*data.arrays, *data.layout.constants)
        return np.full(num_rows, int(_digest(arrays)[:8], 16), np.uint32)
    total = np.zeros(num_rows, np.uint64)
    for number, (array, axis) in enumerate(zip(data.arrays, data.layout.axes, strict=True)):
        if axis is not None:
            words = _words(np.moveaxis(np.asarray(array), axis, 0))
            keys = np.random.PCG64(number).random_raw(words.shape[1])
            total += np.einsum("ij,j->i", words, keys, dtype=np.uint64)
    return (total >> np.uint64(32)).astype(np.uint32)


def _words(rows: np.ndarray) -> np.ndarray:
    """Return the bytes of each row as unsigned integers of at most 32 bits."""
    rows = np.ascontiguousarray(rows).reshape(len(rows), -1)
    return rows.view(np.dtype(f"u{min(rows.dtype.itemsize, 4)}"))


def _digest(arrays: Iterable[Array | np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST)
    for array in arrays:
        digest.update(_words(np.asarray(array).reshape(1, -1)))
    return digest.hexdigest()


def of_all(fingerprint: Fingerprint) -> str:
    """Return the number of rows and one fingerprint for all of them, in their order."""
    return of_parts([fingerprint])


def of_parts(fingerprints: Iterable[Fingerprint]) -> str:
    """Return what `of_all` does of the fingerprints of parts, one after another."""
    digest, number = hashlib.blake2b(digest_size=DIGEST), 0
    for part in fingerprints:
        digest.update(np.ascontiguousarray(part))
        number += len(part)
    return f"{number} rows {digest.hexdigest()}"


def require_same_rows(name: str, known: Any, given: Fingerprint, remedy: str) -> None:
    """Raise ValueError if a result is on other rows than the data.

    Args:
        name: what the result is called.
        known: the fingerprint of its rows.
        given: that of the data.
        remedy: what to do.
    """
    others = np.flatnonzero(np.asarray(known) != given)
    if others.size:
        raise ValueError(
            f"{name} is on other data: {others.size} of {len(given)} rows have other values, the "
            f"first is row {others[0]}. {remedy}"
        )


def require_same_tree(name: str, known: str, tree: DataTree, plate: str) -> None:
    """Raise ValueError if a DataTree is of other rows than a result.

    A tree without a fingerprint, or one that rows were taken out of, may be of any data.

    Args:
        name: what the result is called.
        known: `of_all` the rows of the data that it is on.
        tree: the tree.
        plate: the name of the rows' dimension.
    """
    sizes = {str(group.sizes[plate]) for group in tree.subtree if plate in group.sizes}
    number, *_ = known.split()
    remedy = "Pass the tree of Posterior.to_datatree on the same data."
    if sizes - {number}:
        raise ValueError(
            f"{name} is on {number} rows of plate {plate!r}, and the tree has "
            f"{' and '.join(sorted(sizes))}. {remedy}"
        )
    found = str(tree.attrs.get(NAME, ""))
    if found.startswith(f"{number} ") and found != known:
        raise ValueError(
            f"{name} is on other data than the tree: of its {number} rows some have other values, "
            f"or another order. {remedy}"
        )
