"""Which plates of a data set are sets and sets of sets, and what their elements have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool

from numpyro_vae.data.nested import Nested
from numpyro_vae.data.ragged import Masked

Sites = Sequence[tuple[bool, tuple[str, ...]]]  # observed or not, and the plates by their dims


def nested_plates(sites: Sites, sized: Mapping[str, int]) -> tuple[str, ...]:
    """Return plates of which each lies in the one before, so that a data set is a set of sets.

    They are those that hold latents or have sizes; if these do not lie in each other, those that
    have sizes. Where other plates hold latents too, these count as latents of the whole.

    Args:
        sites: what the model of a data set holds.
        sized: the plates whose rows are counted by ``sizes=``, with the number of axes of these.

    Returns:
        Their names from the outermost to the innermost; none if they do not lie in each other.
    """
    latent = {name for is_observed, names in sites if not is_observed for name in names}
    for wanted in (latent | set(sized), set(sized)):
        found = _chain([[name for name in names if name in wanted] for _, names in sites], sized)
        if found and all(_leads(names, found) for is_observed, names in sites if not is_observed):
            return found
    return ()


def _chain(held: list[list[str]], sized: Mapping[str, int]) -> tuple[str, ...]:
    """Return plates from the outermost to the innermost; none if they do not lie in each other."""
    found: list[str] = []
    for names in sorted(held, key=len):
        if not set(found) <= set(names):
            return ()
        new = [name for name in names if name not in found]
        found += sorted(new, key=lambda name: sized.get(name, 1))  # by dim where that is the same
    return tuple(found)


def _leads(names: tuple[str, ...], levels: tuple[str, ...]) -> bool:
    """Return whether those plates of a latent site that are levels are the first of its axes."""
    count = sum(name in levels for name in names)
    return names[:count] == levels[:count]


@dataclass(frozen=True)
class Padding:
    """Which rows of plates are no padding.

    Attributes:
        plates: the length of each plate.
        lengths: by plate, how many of its rows each data set has, ``(sets,)``, or each row of
            another plate, ``(sets, rows of it)``.
    """

    plates: Mapping[str, int]
    lengths: Mapping[str, Array]

    @property
    def known(self) -> dict[str, int]:
        """The lengths of the plates that decide on padding."""
        rows = {length.shape[1] for length in self.lengths.values() if length.ndim > 1}
        return {
            name: size for name, size in self.plates.items() if name in self.lengths or size in rows
        }

    def mask(self, axes: Mapping[str, int], ndim: int) -> Bool[Array, "sets ..."] | None:
        """Return where an array has rows; None if it has all.

        Args:
            axes: by plate, the axis of an array of a data set.
            ndim: how many axes of it the mask is to have.
        """
        found = [
            self._of_plate(name, axes, ndim)
            for name in axes
            if name in self.lengths and axes[name] < ndim
        ]
        if not found:
            return None
        shape = [1] * ndim
        for name, axis in axes.items():
            if axis < ndim:
                shape[axis] = self.plates[name]
        shape = jnp.broadcast_shapes((len(found[0]), *shape), *(mask.shape for mask in found))
        return jnp.stack([jnp.broadcast_to(mask, shape) for mask in found]).all(0)

    def _of_plate(self, name: str, axes: Mapping[str, int], ndim: int) -> Array:
        length, shape = self.lengths[name], [1] * ndim
        there = jnp.arange(self.plates[name]) < length[..., None]
        shape[axes[name]] = self.plates[name]
        if length.ndim == 1:
            return there.reshape(-1, *shape)
        outer = next(x for x in axes if x != name and self.plates[x] == length.shape[1])
        shape[axes[outer]] = length.shape[1]
        there = there if axes[outer] < axes[name] else there.swapaxes(1, 2)
        return there.reshape(-1, *shape)


def axes_of(shape: tuple[int, ...], plates: Mapping[str, int]) -> dict[str, int]:
    """Return by plate the axis of an array of a data set that has its length.

    Args:
        shape: of the array.
        plates: the lengths of the plates, by their dims.

    Raises:
        ValueError: if it is unknown which of several plates an axis is of.
    """
    found = {}
    for length in dict.fromkeys(plates.values()):
        names = [name for name, size in plates.items() if size == length]
        axes = [axis for axis, size in enumerate(shape) if size == length]
        if 0 < len(axes) < len(names):
            raise ValueError(
                f"The plates {names} have {length} rows each, so that it is unknown of which an "
                f"argument of shape {shape} in a data set has a value for each row. Pad the "
                "arguments so that the plates have unlike lengths."
            )
        found |= dict(zip(names, axes, strict=False))
    return found


def nested_inputs(
    arrays: list[Array], levels: tuple[str, ...], names: tuple[str | None, ...], padding: Padding
) -> Nested:
    """Return what each element of a data set has, and its elements, and theirs.

    Args:
        arrays: with an axis of data sets in front.
        levels: the plates, see `nested_plates`.
        names: of each level, that of the whole first; see `Nested`.
        padding: which rows there are.
    """
    plates = {name: padding.plates[name] for name in levels}
    parts: list[list[Array]] = [[] for _ in names]
    for x in arrays:
        axes = axes_of(x.shape[1:], plates)
        depth = max((levels.index(name) + 1 for name in axes), default=0)
        parts[depth].append(_by_level(x, levels[:depth], axes, plates))
    found = []
    for depth, held in enumerate(parts):
        shape = (len(arrays[0]), *(plates[name] for name in levels[:depth]))
        values = jnp.concatenate([*held, jnp.zeros((*shape, 0))], axis=-1)
        mask = padding.mask({name: axis for axis, name in enumerate(levels[:depth])}, depth)
        found.append(values if mask is None else Masked(values, mask))
    return Nested(tuple(found), names)


def _by_level(
    x: Array, levels: tuple[str, ...], axes: Mapping[str, int], plates: Mapping[str, int]
) -> Array:
    """Return an array with the axes of the levels in front, and the rest side by side."""
    for number, name in enumerate(levels):
        if name not in axes:
            x = jnp.expand_dims(x, number + 1)
            axes = {key: axis + (axis >= number) for key, axis in axes.items()}
        else:
            x = jnp.moveaxis(x, axes[name] + 1, number + 1)
            axes = {
                key: axis + 1 if number <= axis < axes[name] else axis for key, axis in axes.items()
            } | {name: number}
    shape = tuple(plates[name] for name in levels)
    x = jnp.broadcast_to(x, (len(x), *shape, *x.shape[len(shape) + 1 :]))
    size = math.prod(x.shape[len(shape) + 1 :])
    return x.reshape(len(x), *shape, size).astype(jnp.result_type(float))
