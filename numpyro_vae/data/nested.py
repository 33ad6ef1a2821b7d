"""Sets whose elements are sets, level by level."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

__all__ = ["Nested"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Nested:
    """What each datum has, what each of its elements has, what each element of these has, and on.

    Args:
        levels: an array of each level, ``(batch, k)``, ``(batch, elements, k)``, ``(batch,
            elements, rows, k)``, where ``k`` may be 0; or `Masked` values with a mask without the
            last axis.
        names: of each level, under which an encoder returns its features; None if no latent is in
            it, so that its elements count together alone.
    """

    levels: tuple[Any, ...]
    names: tuple[str | None, ...] = field(metadata={"static": True})
