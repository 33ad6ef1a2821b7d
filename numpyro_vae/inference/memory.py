"""How much memory results need, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

GIB = 2**30
MEMINFO = Path("/proc/meminfo")


def size_of(shapes: Any) -> int:
    """Return how many bytes a pytree of arrays, or of what stands for them, takes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


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
