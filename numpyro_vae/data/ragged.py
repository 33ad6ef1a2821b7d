"""Batches that are no plain arrays: entries that are missing, and groups of unequal size.

Both kinds reduce over the elements of a datum by the same methods (``sum``, ``mean``, ``softmax``,
``counts``), so that what is written for one form of ragged data works for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Num

__all__ = ["Masked", "Segments"]


def _pytree[T](data_fields: tuple[str, ...], meta_fields: tuple[str, ...], cls: type[T]) -> type[T]:
    """Register a dataclass whose unflattening checks nothing.

    `jax.tree_util.register_dataclass` calls the constructor, which would reject the objects, masks
    of floats and lone axes that JAX and its users put into trees on their way.
    """

    def flatten_with_keys(tree: T) -> tuple[list[tuple[Any, Any]], tuple]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in data_fields]
        return children, tuple(getattr(tree, name) for name in meta_fields)

    def unflatten(meta: tuple, data: Any) -> T:
        tree = object.__new__(cls)
        for name, value in zip((*data_fields, *meta_fields), (*data, *meta), strict=True):
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def _with_dtype(value: Any) -> Any:
    """An array, or whatever stands for one: a tracer, or only a shape and a dtype."""
    return value if hasattr(value, "dtype") and hasattr(value, "shape") else np.asarray(value)


def _as_float(values: Num[Array, "..."] | Bool[Array, "..."]) -> Float[Array, "..."]:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


@dataclass(frozen=True, eq=False)
class Masked:
    """An array of which some entries are not there.

    For missing values, for sequences ``(batch, time, k)`` padded to one length with a mask
    ``(batch, time)``, and for sets ``(batch, elements, k)`` with a mask ``(batch, elements)``.
    What stands where the mask is False (NaN too) never matters, nor does it receive a gradient.

    Args:
        values: an array ``(batch, *shape)``.
        mask: a boolean array ``(batch, *leading part of shape)``, True where a value is there.

    Raises:
        TypeError: if the mask is not boolean.
        ValueError: if the shape of the mask is no leading part of the shape of the values.

    Example:
        >>> masked = Masked(
        ...     jnp.array([[1.0, jnp.nan], [2.0, 4.0]]), jnp.array([[1, 0], [1, 1]]) == 1
        ... )
        >>> masked.filled()
        Array([[1., 0.],
               [2., 4.]], dtype=float32)
        >>> masked.mean(masked.filled())
        Array([1., 3.], dtype=float32)
    """

    values: Any
    mask: Any

    def __post_init__(self) -> None:
        values, mask = _with_dtype(self.values), _with_dtype(self.mask)
        if mask.dtype != bool:
            raise TypeError(
                f"The mask of Masked must be boolean, True where a value is there; found "
                f"{mask.dtype} for a mask of shape {mask.shape} and values of shape "
                f"{values.shape}. Write mask=(mask != 0), or mask=~jnp.isnan(values)."
            )
        if not mask.ndim or mask.shape != values.shape[: mask.ndim]:
            raise ValueError(
                f"The shape of the mask, {mask.shape}, is no leading part of the shape of the "
                f"values, {values.shape}. A mask has the values' axes, or the first of them."
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "mask", mask)

    @classmethod
    def from_lengths(cls, values: Any, lengths: Any) -> Masked:
        """Return sequences padded to one length, of which only the first steps are there.

        Args:
            values: an array ``(batch, time, ...)``.
            lengths: how many steps of each sequence are there, integers ``(batch,)``.

        Raises:
            TypeError: if the lengths are not integers.
            ValueError: if there is not one for each sequence, or it is beyond the data. Lengths
                that are traced cannot raise: the values of such a sequence are NaN then.

        Example:
            >>> Masked.from_lengths(jnp.ones((2, 3)), jnp.array([1, 3])).counts()
            Array([1., 3.], dtype=float32)
        """
        values, lengths = _with_dtype(values), _with_dtype(lengths)
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"The lengths of sequences must be integers, found {lengths.dtype}.")
        if values.ndim < 2 or lengths.shape != values.shape[:1]:
            raise ValueError(
                f"Masked.from_lengths needs a length for each sequence: values (batch, time, ...) "
                f"and lengths (batch,). Found values of shape {values.shape} and lengths of shape "
                f"{lengths.shape}."
            )
        _check_lengths(lengths, values.shape[1])
        known = (lengths >= 0) & (lengths <= values.shape[1])
        mask = jnp.arange(values.shape[1]) < jnp.asarray(lengths)[:, None]
        if jnp.issubdtype(values.dtype, jnp.inexact):
            values = jnp.where(known.reshape(-1, *[1] * (values.ndim - 1)), values, jnp.nan)
        return cls(values, mask | ~known[:, None])

    def filled(self) -> Num[Array, "batch ..."] | Bool[Array, "batch ..."]:
        """Return the values, and zeros where there are none; no gradient reaches the latter."""
        values = jnp.asarray(self.values)
        return jnp.where(self._expand(values), values, jnp.zeros((), values.dtype))

    def broadcast_mask(self) -> Bool[Array, "batch ..."]:
        """Return the mask in the shape of the values."""
        return jnp.broadcast_to(self._expand(self.values), self.values.shape)

    def counts(self) -> Float[Array, "batch"]:
        """Return how many entries of each datum are there."""
        return jnp.sum(jnp.asarray(self.mask), self._axes(), dtype=jnp.result_type(float))

    def sum(self, elements: Num[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Add up, for each datum, the elements that are there.

        Args:
            elements: an array whose leading axes are those of the mask.

        Returns:
            An array ``(batch, *other axes of elements)``; zero for a datum without elements.
        """
        elements = _as_float(elements)
        return jnp.where(self._expand(elements), elements, 0).sum(self._axes())

    def mean(self, elements: Num[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Average what `sum` adds up; zero for a datum without elements."""
        return _divide(self.sum(elements), self.counts())

    def softmax(self, scores: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Return positive weights that sum to 1 over the elements of each datum.

        Args:
            scores: an array whose leading axes are those of the mask.

        Returns:
            An array of the same shape, zero where the mask is False.
        """
        mask, axes = self._expand(scores), self._axes()
        # Finite where there is nothing to exponentiate, since where() has NaN gradients otherwise.
        low = jnp.finfo(scores.dtype).min
        highest = jnp.where(mask, scores, low).max(axes, keepdims=True, initial=low)
        shifted = jnp.where(mask, scores - jax.lax.stop_gradient(highest), 0)
        weights = jnp.where(mask, jnp.exp(shifted), 0)
        total = weights.sum(axes, keepdims=True)
        return weights / jnp.where(total > 0, total, 1)

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(1, self.mask.ndim))

    def _expand(self, like: Any) -> Bool[Array, "..."]:
        """The mask with axes of length 1 at its end, to broadcast against ``like``."""
        return jnp.asarray(self.mask).reshape(self.mask.shape + (1,) * (like.ndim - self.mask.ndim))


@dataclass(frozen=True, eq=False)
class Segments:
    """Groups of unequal size, all elements of all groups along one axis.

    For data of which each datum is a set: the houses of a county, the events of a user. The data
    are the groups, so a batch has ``num_segments`` of them.

    Args:
        values: an array, or a pytree of arrays, with the elements along the leading axis.
        ids: the group of each element, integers ``(elements,)`` from 0 to ``num_segments - 1``, in
            any order. A group may have no elements.
        num_segments: the number of groups, static under ``jit``.

    Raises:
        TypeError: if the ids are not integers, or ``num_segments`` is none.
        ValueError: if the number of ids is not the number of elements, or an id is out of range.
            Ids that are traced cannot raise: what is reduced by them is NaN then.

    Example:
        >>> houses = Segments(jnp.array([1.0, 2.0, 6.0]), ids=jnp.array([0, 2, 2]), num_segments=3)
        >>> houses.mean(houses.values)
        Array([1., 0., 4.], dtype=float32)
        >>> houses.counts()
        Array([1., 0., 2.], dtype=float32)
    """

    values: Any
    ids: Any
    num_segments: int

    def __post_init__(self) -> None:
        ids = _with_dtype(self.ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"The ids of Segments must be integers, found {ids.dtype}.")
        if isinstance(self.num_segments, bool) or not isinstance(
            self.num_segments, int | np.integer
        ):
            raise TypeError(
                "num_segments must be an integer that is known before tracing, found "
                f"{self.num_segments!r}. Pass the number of groups."
            )
        leaves = [_with_dtype(leaf) for leaf in jax.tree.leaves(self.values)]
        if ids.ndim != 1 or not leaves or any(leaf.shape[:1] != ids.shape for leaf in leaves):
            raise ValueError(
                "Segments needs an id for each element: values with the elements along the leading "
                f"axis and ids of shape (elements,). Found values of shapes "
                f"{[leaf.shape for leaf in leaves]} and ids of shape {ids.shape}."
            )
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "num_segments", int(self.num_segments))
        _check_range(ids, self.num_segments)

    def counts(self) -> Float[Array, "groups"]:
        """Return the number of elements of each group."""
        return self.sum(jnp.ones(self.ids.shape))

    def sum(self, elements: Num[Array, "elements ..."]) -> Float[Array, "groups ..."]:
        """Add up the elements of each group.

        Args:
            elements: an array with the elements along the leading axis.

        Returns:
            An array ``(num_segments, ...)``; zero for a group without elements.
        """
        total = jax.ops.segment_sum(_as_float(elements), self.ids, self.num_segments)
        # JAX drops what is out of range; all groups are NaN since nobody knows which lacks it.
        return jnp.where(self._in_range(), total, jnp.nan)

    def mean(self, elements: Num[Array, "elements ..."]) -> Float[Array, "groups ..."]:
        """Average the elements of each group; zero for a group without elements."""
        return _divide(self.sum(elements), self.counts())

    def softmax(self, scores: Float[Array, "elements ..."]) -> Float[Array, "elements ..."]:
        """Return positive weights that sum to 1 over the elements of each group.

        Args:
            scores: an array with the elements along the leading axis.

        Returns:
            An array of the same shape.
        """
        highest = jax.ops.segment_max(jax.lax.stop_gradient(scores), self.ids, self.num_segments)
        weights = jnp.exp(scores - highest[self.ids])
        return weights / self.sum(weights)[self.ids]

    def _in_range(self) -> Bool[Array, ""]:
        ids = jnp.asarray(self.ids)
        return jnp.all((ids >= 0) & (ids < self.num_segments))


def _divide(total: Array, counts: Array) -> Array:
    return total / jnp.maximum(counts, 1).reshape(counts.shape + (1,) * (total.ndim - 1))


def _is_concrete(array: Any) -> bool:
    return not isinstance(array, Tracer) and isinstance(array, np.ndarray | jax.Array)


def _check_lengths(lengths: Any, num_steps: int) -> None:
    if not _is_concrete(lengths):
        return
    found = np.asarray(lengths)
    wrong = np.flatnonzero((found < 0) | (found > num_steps))
    if wrong.size:
        raise ValueError(
            f"Sequence {wrong[0]} has the length {found[wrong[0]]}, but the data have {num_steps} "
            f"steps ({wrong.size} of {found.size} lengths are not between 0 and {num_steps}). "
            "Pad the sequences to the longest, and pass lengths in steps."
        )


def _check_range(ids: Any, num_segments: int) -> None:
    if not _is_concrete(ids):
        return
    found = np.asarray(ids)
    wrong = np.flatnonzero((found < 0) | (found >= num_segments))
    if wrong.size:
        raise ValueError(
            f"Element {wrong[0]} of Segments has the id {found[wrong[0]]}, but there are "
            f"{num_segments} groups, whose ids are 0 to {num_segments - 1} ({wrong.size} of "
            f"{found.size} ids are out of range). Number the groups from 0, and pass num_segments."
        )


_pytree(("values", "mask"), (), Masked)
_pytree(("values", "ids"), ("num_segments",), Segments)
