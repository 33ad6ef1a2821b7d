"""Data in memory, as the arguments of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arguments import is_typed_key, require_known
from numpyro_vae.data.devices import ONE_DEVICE, Devices
from numpyro_vae.data.sparse import as_rows

Data = Any


def as_arguments(data: Data) -> tuple[tuple, dict[str, Any]]:
    """Return data as the model's arguments: an array, a tuple of them, or a dict by keyword.

    Example:
        >>> as_arguments({"x": 1})
        ((), {'x': 1})
    """
    if isinstance(data, dict):
        return (), data
    return (tuple(data) if isinstance(data, tuple) else (data,)), {}


def is_array(leaf: Any) -> bool:
    """Return whether a leaf of the arguments is an array, or stands for one."""
    return hasattr(leaf, "__array__") or isinstance(leaf, jax.ShapeDtypeStruct)


def is_in_memory(data: Data) -> bool:
    """Return whether data is an array, or a tuple or dict of them, rather than an iterable.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(data, tuple | dict) or hasattr(data, "__array__"):
        return True
    if isinstance(data, Iterable):
        return False
    raise TypeError(
        f"data must be an array, a tuple or dict of arrays, or an iterable of batches; found "
        f"{type(data).__name__}."
    )


@dataclass(frozen=True, eq=False)
class Constant:
    """An array that compiled code depends on, as a model asks for its values; equal by these."""

    value: Array

    def __hash__(self) -> int:
        """Return a hash of the values."""
        return hash((self.value.shape, np.asarray(self.value).tobytes()))

    def __eq__(self, other: object) -> bool:
        """Return whether the other has the same values."""
        return isinstance(other, Constant) and np.array_equal(self.value, other.value)


@dataclass(frozen=True)
class Layout:
    """How arrays become a model's arguments; hashable, so that compiled code can depend on it.

    Attributes:
        static: the leaves of the arguments, None where an array belongs, and `Constant` for one
            that never changes.
        axes: for each array its datum axis, or None.
        treedef: the structure of ``(args, kwargs)``.
        devices: those among which the rows of a batch are divided.
    """

    static: tuple[Any, ...]
    axes: tuple[int | None, ...]
    treedef: Any
    devices: Devices = ONE_DEVICE

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], Layout]:
        """Split arguments into their arrays, none with a datum axis, and their layout."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if is_array(leaf)]
        static = tuple(None if is_array(leaf) else leaf for leaf in leaves)
        return arrays, cls(static, (None,) * len(arrays), treedef)

    @property
    def constants(self) -> tuple[Array, ...]:
        """The arrays that never change."""
        return tuple(leaf.value for leaf in self.static if isinstance(leaf, Constant))

    @property
    def every_axis(self) -> tuple[int | None, ...]:
        """The datum axis of each array among the arguments, constants among them."""
        axes, arrays = iter(self.axes), [leaf for leaf in self.static if _is_slot(leaf)]
        return tuple(next(axes) if leaf is None else None for leaf in arrays)

    @property
    def names(self) -> tuple[str, ...]:
        """Of each array, the position or name of its argument, and where in it the array is."""
        places = jax.tree.unflatten(self.treedef, range(len(self.static)))
        paths = [path[1:] for path, _ in jax.tree.leaves_with_path(places)]
        return tuple(
            jax.tree_util.keystr(path[:1]).strip("[]") + jax.tree_util.keystr(path[1:])
            for path, leaf in zip(paths, self.static, strict=True)
            if leaf is None
        )

    def rows(self, arrays: Sequence[Array], indices: Array) -> tuple[tuple, dict[str, Any]]:
        """Return the model's arguments with just the given rows of each batched array."""
        return self.whole(self.take(arrays, indices))

    def take(self, arrays: Sequence[Array], indices: Array) -> tuple[Array, ...]:
        """Return the given rows of each batched array."""
        return tuple(
            array if axis is None else self.devices.take(array, indices, axis)
            for array, axis in zip(arrays, self.axes, strict=True)
        )

    def num_data(self, arrays: Sequence[Array]) -> int:
        """Return how many rows the arrays have."""
        batched = zip(arrays, self.axes, strict=True)
        return next(array.shape[axis] for array, axis in batched if axis is not None)

    def whole(self, arrays: Sequence[Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the model's arguments with arrays, or what stands for them, in their places."""
        rest = iter(arrays)
        filled = [next(rest) if leaf is None else leaf for leaf in self.static]
        leaves = [leaf.value if isinstance(leaf, Constant) else leaf for leaf in filled]
        return jax.tree.unflatten(self.treedef, leaves)


def _is_slot(leaf: Any) -> bool:
    """Return whether a static leaf stands where the arguments have an array."""
    return leaf is None or isinstance(leaf, Constant)


@dataclass(frozen=True, eq=False)
class ArrayData:
    """The model's arguments in memory.

    Attributes:
        arrays: those that are arrays.
        layout: how they become arguments.
        num_data: how many data there are; 1 if no array has a datum axis.
        not_finite: which values are NaN or infinite, for a message; empty if none is.
    """

    arrays: tuple[Array, ...]
    layout: Layout
    num_data: int
    not_finite: str

    @classmethod
    def read(cls, data: Data, batch_axes: Any = 0, name: str = "data") -> ArrayData:
        """Check data and bring it to the device.

        Args:
            data: an array, a tuple of positional arguments, or a dict of keyword arguments; None
                is an argument like others.
            batch_axes: the datum axis of each leaf, as ``in_axes`` of `jax.vmap`: an int, or a
                structure that is a prefix of the data's, with None for what is not batched. None
                alone is for data that the model takes whole, such as ragged groups.
            name: what the data are called in messages.

        Raises:
            ValueError: if there are no data, their numbers disagree, or a value is beyond the
                range of the device's numbers.
            TypeError: if the data are no numbers.

        Example:
            >>> ArrayData.read((np.zeros((5, 2)), 3.0), batch_axes=(0, None)).num_data
            5
        """
        data = as_rows(data)
        axes = datum_axes(batch_axes, data)
        paths = [name + jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(data)]
        leaves, treedef = jax.tree.flatten(as_arguments(data))
        num_data = 1 if batch_axes is None else count_rows(data, batch_axes, name)
        is_array = [hasattr(leaf, "__array__") for leaf in leaves]
        arrays = tuple(
            _to_device(leaf, axis, path)
            for leaf, axis, path, array in zip(leaves, axes, paths, is_array, strict=True)
            if array
        )
        array_axes = tuple(axis for axis, array in zip(axes, is_array, strict=True) if array)
        given = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
        array_paths = [path for path, array in zip(paths, is_array, strict=True) if array]
        static = tuple(
            None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        )
        found = ", ".join(
            _not_finite(array, axis, path)
            for array, axis, path, leaf in zip(arrays, array_axes, array_paths, given, strict=True)
            if jnp.issubdtype(array.dtype, jnp.floating) and not _is_finite(array, leaf)
        )
        return cls(arrays, Layout(static, array_axes, treedef), num_data, found)

    def on(self, devices: Devices) -> ArrayData:
        """Return the rows of all hosts, each with those of its host."""
        pairs = zip(self.arrays, self.layout.axes, strict=True)
        arrays = tuple(devices.hold(array, axis) for array, axis in pairs)
        layout = replace(self.layout, devices=devices)
        num_data = self.num_data * devices.num_hosts
        return replace(self, arrays=arrays, layout=layout, num_data=num_data)

    def with_constants(self) -> ArrayData:
        """Return the same data where arrays without a datum axis are constants of compiled code."""
        pairs = list(zip(self.arrays, self.layout.axes, strict=True))
        rest = iter(pairs)
        leaves = self.layout.static
        static = [_constant(*next(rest)) if leaf is None else leaf for leaf in leaves]
        kept = [(array, axis) for array, axis in pairs if axis is not None]
        axes = tuple(axis for _, axis in kept)
        layout = replace(self.layout, static=tuple(static), axes=axes)
        return replace(self, arrays=tuple(array for array, _ in kept), layout=layout)

    @property
    def is_whole(self) -> bool:
        """Whether the model takes the data whole, as no array has a datum axis."""
        return all(axis is None for axis in self.layout.axes)

    def whole(self) -> tuple[tuple, dict[str, Any]]:
        """Return the model's arguments with all rows."""
        return self.layout.whole(self.arrays)

    def rows(self, indices: Array) -> tuple[tuple, dict[str, Any]]:
        """Return the model's arguments with the given rows."""
        return self.layout.rows(self.arrays, indices)


def _constant(array: Array, axis: int | None) -> Constant | None:
    return Constant(array) if axis is None else None


def take_rows(data: Data, batch_axes: Any, indices: Any) -> Data:
    """Return some rows of data, in the form in which they were given.

    Args:
        data: see `ArrayData.read`.
        batch_axes: likewise.
        indices: the numbers of the rows.

    Example:
        >>> take_rows((np.arange(4), 3.0), (0, None), [1, 2])
        (array([1, 2]), 3.0)
    """
    axes = iter(datum_axes(batch_axes, data))

    def take(leaf: Any) -> Any:
        axis = next(axes)
        return leaf if axis is None else leaf[(slice(None),) * (axis % leaf.ndim) + (indices,)]

    return jax.tree.map(take, data)


def count_rows(data: Data, batch_axes: Any = 0, name: str = "data") -> int:
    """Return how many rows data have by the shapes of their arrays, which need not be in memory.

    Args:
        data: see `ArrayData.read`.
        batch_axes: likewise.
        name: what the data are called in messages.

    Raises:
        ValueError: if there are none, or their numbers disagree.

    Example:
        >>> count_rows((np.zeros((2, 5)), 3.0), (1, None))
        5
    """
    axes = datum_axes(batch_axes, data)
    return _num_data(jax.tree.leaves(data), axes, _paths(data, name), name)


def datum_axes(batch_axes: Any, data: Data) -> list[int | None]:
    """Return the datum axis of each leaf of the data, among which None does not count.

    Raises:
        ValueError: if the axes have not the form of the data, or are no numbers.
    """
    axes: list[Any] = []

    def add(axis: int | None, part: Any) -> None:
        axes.extend([axis] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(add, batch_axes, data, is_leaf=lambda x: x is None)
    except ValueError:
        axes = ["?"]
    if not all(axis is None or isinstance(axis, Integral) for axis in axes):
        raise ValueError(
            f"batch_axes is {batch_axes!r}, which does not fit data with the arrays "
            f"{_paths(data, 'data')}. Give one axis for all of them, or a tuple or dict of the "
            "form of the data, with an axis or None for each."
        )
    return axes


def _paths(data: Data, name: str) -> list[str]:
    """Return where in the data each array is."""
    return [name + jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(data)]


def _num_data(leaves: list, axes: list, paths: list[str], name: str) -> int:
    sizes = {}
    for leaf, axis, path in zip(leaves, axes, paths, strict=True):
        if axis is None:
            continue
        shape = np.shape(leaf)
        if shape == () and is_typed_key(leaf):
            raise ValueError(f"{path} is a random key. Pass the key first, and then the data.")
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"{path} is {leaf!r} of type {type(leaf).__name__}, where an array of data is "
                "expected. Pass a list of numbers as np.asarray(numbers); what all data share has "
                "None in batch_axes=, or is in static_kwargs= if it is no array."
            )
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{path} has shape {shape}, so no axis {axis} that counts the data. Give each "
                "argument's datum axis with batch_axes=, None for what is not batched."
            )
        sizes[path] = shape[axis]
    if not sizes:
        raise ValueError(f"{name} holds no array with a datum axis. Pass the data to learn from.")
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{name} disagrees on the number of data: {sizes}. Give the same number of rows, or "
            "say with batch_axes= which axis counts the data and, by None, what is not batched."
        )
    num_data = next(iter(sizes.values()))
    if num_data == 0:
        raise ValueError(f"{name} is empty: {sizes}. Pass at least one row.")
    return num_data


def _to_device(leaf: Any, axis: int | None, path: str) -> Array:
    """Return the leaf as a JAX array, refusing values that are not the same there."""
    require_known(leaf, path)
    if isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise ValueError(
            f"{path} is a masked array, and the {np.ma.count_masked(leaf)} values under its mask "
            "would be read as numbers. Pass NaN for them, as with .filled(np.nan), or the mask as "
            "an argument of the model; see the page on models for missing data."
        )
    leaf = np.asarray(leaf)
    if not (leaf.dtype == bool or jnp.issubdtype(leaf.dtype, np.number)):
        raise TypeError(
            f"{path} has values of type {leaf.dtype}, expected numbers or booleans. Convert them, "
            "as with .astype(float), or number them if they are names."
        )
    with np.errstate(over="ignore"):  # values beyond the range are found below
        array = jnp.asarray(leaf)
    if array.dtype == leaf.dtype:
        return array
    lost = np.isfinite(leaf) & ~np.isfinite(np.asarray(array))
    if jnp.issubdtype(array.dtype, jnp.integer):
        lost = leaf != np.asarray(array)
    if lost.any():
        row = "" if axis is None else f", the first in row {np.argwhere(lost)[0][axis]}"
        raise ValueError(
            f"{path} is {leaf.dtype} and has {lost.sum()} values beyond the range of "
            f"{array.dtype}{row}. Rescale the data, or call numpyro.enable_x64()."
        )
    return array


def _is_finite(array: Array, leaf: Any) -> bool:
    """Return whether all values are finite, by those in memory where the device is busy."""
    return bool(np.isfinite(leaf).all() if type(leaf) is np.ndarray else jnp.isfinite(array).all())


def _not_finite(array: Array, axis: int | None, path: str) -> str:
    bad = np.argwhere(~np.isfinite(np.asarray(array)))
    row = "" if axis is None else f", the first in row {bad[0][axis]}"
    return f"{path} has {len(bad)} values that are NaN or infinite{row}"
