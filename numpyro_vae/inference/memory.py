"""How much memory results need, how much there is, and what is kept in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

GIB = 2**30
MEMINFO = Path("/proc/meminfo")


def size_of(shapes: Any) -> int:
    """Return how many bytes a pytree of arrays, or of what stands for them, takes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def largest_of_row(by_row: Any) -> int:
    """Return how many values a row has of the largest array."""
    return max((leaf[0].size for leaf in jax.tree.leaves(by_row)), default=1)


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping; None if it is not known.

    Where the system does not say, it is all the memory that there is.
    """
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def require_memory(num_bytes: int) -> None:
    """Raise MemoryError if a result does not fit in memory."""
    there = available_memory()
    if there is not None and num_bytes > there:
        raise MemoryError(
            f"The result takes {num_bytes / GIB:.1f} GiB, and {there / GIB:.1f} GiB of memory are "
            "available. Ask for fewer draws (num_samples=) or sites (var_names=, groups=), or pass "
            "the rows in parts."
        )


class Kept:
    """What belongs to some rows, kept for those who ask for the same rows, or for some of them."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._numbers = np.empty(0, int)
        self._value: Any = None

    def get(self, of: tuple[Any, ...], numbers: np.ndarray, make: Callable[[], Any]) -> Any:
        """Return what belongs to rows, which is made if it is not all there.

        Args:
            of: the objects that it is computed from.
            numbers: of the rows.
            make: returns a pytree of arrays with these rows in front.
        """
        if list(map(id, of)) == list(map(id, self._of)):
            order = np.argsort(self._numbers)
            places = np.searchsorted(self._numbers, numbers, sorter=order)
            places = order[places.clip(max=len(order) - 1)]
            if np.array_equal(self._numbers[places], numbers):
                return jax.tree.map(lambda x: x[places], self._value)
        self._of, self._numbers, self._value = of, numbers, make()
        return self._value
