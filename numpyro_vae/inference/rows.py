"""Rows of data for a trained guide: read, cut into batches, and put together again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.batch import Batch, padded_batches, prefetch
from numpyro_vae.data.devices import ONE_DEVICE, Devices
from numpyro_vae.data.shapes import explained, require_rows
from numpyro_vae.data.sparse import as_rows
from numpyro_vae.data.stores import Store, in_memory, is_stored
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.inference.fingerprint import Fingerprint, fingerprint_rows, of_parts
from numpyro_vae.inference.memory import Kept
from numpyro_vae.inference.plate_rows import (
    declares_rows,
    held_rows,
    require_same_events,
    warn_of_batch_statistics,
    warn_of_forecast,
)
from numpyro_vae.inference.stored import SOME, StoredRows
from numpyro_vae.model.missing import require_finite_observations
from numpyro_vae.model.plan import check_observed
from numpyro_vae.model.reading import read_for
from numpyro_vae.numpyro_internals import HANDLERS


@dataclass(frozen=True)
class Rows:
    """Data, how many rows they are, and how these are taken out of them.

    Attributes:
        data: the data; some of the rows, if they are read where they are wanted.
        plate: the name of the local plate.
        num_rows: how many rows it has.
        subsamples: whether the model selects rows in its own plate.
        is_unobserved: whether the model is given none of the observations that the guide reads.
        held: by plate its size and the rows that it is told to hold, where the model declares
            another number of them than the data have.
        declares: whether the model declares a plate of as many rows as it is given, so many.
        picked: the numbers of the rows that results are wanted of, in that order; None for all.
        args: the model's arguments with all rows of ``data``.
        kwargs: its keyword arguments, those that never change among them.
        devices: those among which the rows of a batch are divided; all have a copy of the data.
        stored: reads the rows, if they are not in memory.
        part_of: as many rows as batches are cut for, where these are the last ones of a part.
        kept: what several quantities of the rows are computed from.
        by_row: the data as they are cut into rows, if a guide needs them whole all the same.
    """

    data: ArrayData
    plate: str
    num_rows: int
    subsamples: bool
    is_unobserved: bool
    held: dict[str, tuple[int, Any]]
    declares: Callable[[int], bool]
    picked: np.ndarray | None
    args: tuple
    kwargs: dict[str, Any]
    devices: Devices
    stored: StoredRows | None = None
    part_of: int | None = None
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)
    by_row: ArrayData | None = None

    @classmethod
    def read(
        cls,
        guide: AbstractGuide,
        static_kwargs: dict[str, Any],
        data: Any,
        batch_axes: Any,
        devices: Devices = ONE_DEVICE,
    ) -> Rows:
        """Read data as the model's arguments, and how its local plate takes them.

        Raises:
            ValueError: if the plate has another number of rows than the data, or an observation
                belongs to no known datum.
        """
        data = as_rows(data)
        if is_stored(data, batch_axes):
            return cls._read_stored(guide, static_kwargs, data, batch_axes, devices)
        arrays = read_for(guide.reader, data, batch_axes, static_kwargs)
        arrays = replace(arrays, arrays=devices.put(arrays.arrays))
        args, kwargs = arrays.whole()
        kwargs = {**kwargs, **static_kwargs}
        with HANDLERS:
            return cls._of_model(guide, arrays, static_kwargs, args, kwargs, devices)

    @classmethod
    def _read_stored(
        cls,
        guide: AbstractGuide,
        static_kwargs: dict[str, Any],
        data: Any,
        batch_axes: Any,
        devices: Devices,
    ) -> Rows:
        """Return rows that are read where they are wanted, or all if the guide knows its rows."""
        store = Store(data, batch_axes)
        read = partial(cls.read, guide, static_kwargs, batch_axes=batch_axes, devices=devices)
        some = store.read(slice(0, min(SOME, store.num_rows)))
        try:
            rows = read(data=some)
        except ValueError:  # which a guide raises that knows how many rows it was trained with
            if isinstance(guide, AmortizedGuide):
                raise
            return read(data=in_memory(data))
        if guide.not_amortized:
            return read(data=in_memory(data))
        stored = StoredRows(store, rows.data)
        return replace(rows, num_rows=store.num_rows, subsamples=False, stored=stored)

    @classmethod
    def _of_model(
        cls,
        guide: AbstractGuide,
        arrays: ArrayData,
        static_kwargs: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
        devices: Devices,
    ) -> Rows:
        """Return the rows of arrays, as the model takes them."""
        require_rows(guide.argument_shapes, *arrays.whole(), arrays.layout.every_axis)
        with explained(guide.argument_shapes, *arrays.whole(), arrays.layout.every_axis):
            held = held_rows(guide, arrays, args, kwargs)
            sites = guide.reader.sites(args, kwargs, held)
            require_same_events(guide, sites)
            if not arrays.is_whole:
                warn_of_batch_statistics(sites)
        guide.read_model(args, kwargs, held)
        name = guide.plate.name
        of_rows = [site.name for x in (name, *guide.segments) for site in sites.observed(x)]
        require_finite_observations(guide.reader, arrays, static_kwargs, held, of_rows)
        plate = sites.plates.get(name)
        num_rows = arrays.num_data if plate is None or not arrays.is_whole else plate.size
        if plate is None or plate.size != num_rows:
            found = "none" if plate is None else plate.size
            raise ValueError(
                f"The data have {num_rows} rows, but the model's plate {name!r} has {found}. "
                "Declare the plate with the length of the data that the model is given; if no "
                "argument has a row for each of the plate's, pass batch_axes=None."
            )
        check_observed(sites, plate, guide.segments)
        subsamples = plate.length < plate.size
        unobserved = guide.is_unobserved(sites)
        if unobserved:
            warn_of_forecast(guide, sites, plate)
        declares = cache(partial(declares_rows, guide.reader, arrays, static_kwargs, name))
        known = (arrays, name, plate.size, subsamples, unobserved, held, declares)
        return cls(*known, None, args, kwargs, devices)

    @property
    def chosen(self) -> np.ndarray:
        """The numbers of the rows that results are wanted of, in that order."""
        return np.arange(self.num_rows) if self.picked is None else self.picked

    @property
    def num_chosen(self) -> int:
        """How many rows results are wanted of."""
        return self.num_rows if self.picked is None else len(self.picked)

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers of rows, from their places among the chosen ones."""
        return places if self.picked is None else self.picked[places]

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Return the places of rows among the chosen ones."""
        if self.picked is None:
            return numbers
        order = np.argsort(self.picked, kind="stable")
        return order[np.searchsorted(self.picked, numbers, sorter=order).clip(0, len(order) - 1)]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """A number for each row, by which a result is known to be on it."""
        return np.concatenate(list(self._fingerprints()))

    @cached_property
    def fingerprint_of_all(self) -> str:
        """One fingerprint of all rows; see `of_all`."""
        return of_parts(self._fingerprints())

    @property
    def fingerprint_of_chosen(self) -> Fingerprint:
        """The fingerprint of the chosen rows."""
        if self.picked is None:
            return self.fingerprint
        if self.data.is_whole:
            return self.fingerprint[self.picked]
        size = max(1, self.num_chosen if self.stored is None else self.stored.store.read_rows)
        pieces = np.split(self.picked, range(size, self.num_chosen, size))
        return np.concatenate([fingerprint_rows(self.cut(x).data, len(x)) for x in pieces])

    def _fingerprints(self) -> Iterator[Fingerprint]:
        for data in self.blocks():
            number = self.num_rows if self.stored is None else data.num_data
            yield fingerprint_rows(data, number)

    def blocks(self) -> Iterator[ArrayData]:
        """Yield all rows in order: as many at once as are read at once, or else all."""
        return iter([self.data]) if self.stored is None else self.stored.blocks()

    def choose(self, rows: Any) -> Rows:
        """Return the same data, with results wanted of some rows only.

        Args:
            rows: their numbers, or a boolean for each row.

        Raises:
            ValueError: if there are no such rows.
        """
        given = np.asarray(rows)
        if given.dtype == bool and given.shape != (self.num_rows,):
            raise ValueError(
                f"The data have {self.num_rows} rows, and rows= has shape {given.shape}. Give a "
                "boolean for each row, or the rows' numbers."
            )
        chosen = np.flatnonzero(given) if given.dtype == bool else given.reshape(-1)
        if not np.issubdtype(chosen.dtype, np.integer) and chosen.size:
            raise ValueError(
                f"rows has values of type {chosen.dtype}, expected the numbers of the rows, from 0 "
                f"to {self.num_rows - 1}, a boolean for each row, or a Report. Names of rows have "
                "numbers by frame.index.get_indexer(names)."
            )
        wrong = chosen[(chosen < 0) | (chosen >= self.num_rows)]
        if wrong.size:
            raise ValueError(
                f"There is no row {wrong[0]}: the data have {self.num_rows} rows, 0 to "
                f"{self.num_rows - 1} ({wrong.size} of {chosen.size} do not exist)."
            )
        return replace(self, picked=chosen.astype(int), part_of=None)

    def part(self, start: int, stop: int, size: int) -> Rows:
        """Return some consecutive ones of the chosen rows, in batches as of ``size`` rows."""
        return replace(self, picked=self.numbers(np.arange(start, stop)), part_of=size)

    def parts(self, size: int) -> Iterator[Rows]:
        """Yield the chosen rows in parts of ``size``; of data that the model takes whole in one."""
        if self.data.is_whole or self.num_chosen <= size:
            yield self
            return
        for start in range(0, self.num_chosen, size):
            yield self.part(start, min(start + size, self.num_chosen), size)

    def cut(self, rows: np.ndarray) -> Rows:
        """Return data of some rows only, in memory; a model that selects rows itself needs all."""
        if self.stored is not None:
            return self.with_arrays(self.stored.read(rows).arrays)
        return self.with_arrays(self.data.layout.take(self.data.arrays, jnp.asarray(rows)))

    def in_memory(self) -> Rows:
        """Return the chosen rows as data of their own, if they are not in memory."""
        return self if self.stored is None else self.cut(self.chosen)

    def with_arrays(self, arrays: tuple[Array, ...]) -> Rows:
        """Return rows of other data for the same model, as many as the arrays have."""
        data = replace(self.data, arrays=arrays)
        args, kwargs = data.whole()
        static = {name: value for name, value in self.kwargs.items() if name not in kwargs}
        number = self.num_rows if data.is_whole else data.layout.num_data(arrays)
        data = replace(data, num_data=1 if data.is_whole else number)
        rows = replace(self, data=data, num_rows=number, picked=None, stored=None, part_of=None)
        return replace(rows, args=args, kwargs=kwargs | static)

    @property
    def some(self) -> Rows:
        """Those of the rows that are in memory, which stand for all where only shapes count."""
        if self.stored is None:
            return self
        return replace(self, num_rows=self.data.num_data, picked=None, stored=None)

    def batch(self, indices: Array | np.ndarray) -> Batch:
        """Return the rows of these numbers, as compiled functions take them."""
        cuts, arrays, numbers = not (self.data.is_whole or self.subsamples), self.data.arrays, None
        if self.stored is not None:
            numbers = np.asarray(indices)
            arrays = self.devices.put(self.stored.read(numbers).arrays)
            indices = self.devices.divide(np.arange(len(numbers)))
        return Batch(
            arrays,
            indices,
            None,
            layout=self.data.layout,
            plate=self.plate,
            num_data=self.num_rows,
            cuts=cuts,
            fills_plate=not self.data.is_whole and not (cuts and self.declares(len(indices))),
            numbers=numbers,
        )

    def whole(self) -> Batch:
        """Return all rows in one batch, or the first where one is enough for what all share."""
        return self.some.batch(jnp.arange(self.num_rows if self.data.is_whole else 1))

    def pool(self) -> tuple[Batch, np.ndarray]:
        """Return a batch out of whose arrays the chosen rows can be taken, and where they are."""
        if self.stored is None:
            return self.whole(), self.chosen
        return self.batch(self.chosen), np.arange(self.num_chosen)

    def everything(self) -> Batch:
        """Return all rows in one batch, or of those that are not in memory some."""
        return replace(self.some.batch(jnp.arange(self.some.num_rows)), cuts=False)

    def shapes(self) -> Batch:
        """Return `everything` of as many rows as there are, as shapes alone."""
        batch, number = self.everything(), self.num_rows

        def shape(array: Array, axis: int | None) -> jax.ShapeDtypeStruct:
            sizes = list(array.shape)
            if axis is not None:
                sizes[axis] = number
            return jax.ShapeDtypeStruct(tuple(sizes), array.dtype)

        pairs = zip(batch.arrays, batch.layout.axes, strict=True)
        arrays = tuple(shape(array, axis) for array, axis in pairs)
        indices = shape(jnp.asarray(batch.indices), 0)
        return replace(batch, arrays=arrays, indices=indices, num_data=number)

    def collect(self, fn: Callable[[Batch], Any], batch_size: int, row_axis: int = 0) -> Any:
        """Apply a compiled function to batches of the chosen rows, and join what it returns.

        While one batch is copied to the host the next is computed; padding is dropped. Data that
        the model takes whole are one batch.

        Args:
            fn: from a batch to a pytree of arrays.
            batch_size: rows at once.
            row_axis: the axis of the rows in every result.
        """
        if self.data.is_whole:
            found = jax.tree.map(np.asarray, fn(self.whole()))
            if self.num_chosen == self.num_rows:
                return found  # in which the rows of other plates are whole, too
            return jax.tree.map(partial(np.take, indices=self.chosen, axis=row_axis), found)
        num_rows = self.num_chosen
        results = prefetch(map(fn, self.batches(batch_size)))
        first = next(results)
        out = jax.tree.map(partial(room, num_rows, row_axis), first)
        starts = range(0, num_rows, self._at_once(batch_size))
        for start, found in zip(starts, itertools.chain([first], results), strict=True):
            jax.tree.map(partial(write, start, row_axis), out, found)
        return out

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of the chosen rows, the last filled up; data taken whole are one."""
        if self.data.is_whole:
            yield self.whole()
            return
        for places, _ in padded_batches(self.num_chosen, self._at_once(batch_size)):
            yield self.batch(self.devices.divide(self.numbers(places)))

    def num_batches(self, batch_size: int) -> int:
        """Return how many batches there are."""
        return 1 if self.data.is_whole else -(-self.num_chosen // self._at_once(batch_size))

    def _at_once(self, batch_size: int) -> int:
        """Return how many rows a batch has, if it may have so many, for the devices to divide."""
        number = self.num_chosen
        if self.part_of is not None:
            size = min(batch_size, self.part_of)
        else:
            size = min(batch_size, number if number == self.num_rows else rounded(number))
        return self.devices.rounded(size)


def rounded(number: int) -> int:
    """Return the next power of two, so that few sizes of batches are compiled for parts of data."""
    return 1 << max(number - 1, 0).bit_length()


def room(num_data: int, row_axis: int, like: Array) -> np.ndarray:
    """Return room for all rows; the rows are the slowest axis, so that writing is fast."""
    shape = [size for axis, size in enumerate(like.shape) if axis != row_axis]
    return np.moveaxis(np.empty((num_data, *shape), like.dtype), 0, row_axis)


def write(start: int, row_axis: int, out: np.ndarray, found: Array) -> None:
    """Copy a batch of rows to its place, without what fills it up."""
    out, rows = np.moveaxis(out, row_axis, 0), np.moveaxis(np.asarray(found), row_axis, 0)
    stop = min(start + len(rows), len(out))
    out[start:stop] = rows[: stop - start]
