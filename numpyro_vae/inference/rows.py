"""Rows of data for a trained guide: read, cut into batches, and put together again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.inference.fingerprint import Fingerprint, fingerprint_rows
from numpyro_vae.model.missing import require_finite_observations
from numpyro_vae.model.plan import check_observed
from numpyro_vae.model.reading import ModelReader, read_for
from numpyro_vae.model.sites import ModelSites
from numpyro_vae.numpyro_internals import HANDLERS


@dataclass(frozen=True)
class Rows:
    """Data, how many rows they are, and how these are taken out of them.

    Attributes:
        data: the data.
        plate: the name of the local plate.
        num_rows: how many rows it has.
        subsamples: whether the model selects rows in its own plate.
        is_unobserved: whether the model is given none of the observations that the guide reads.
        held: by plate its size and the rows that it is told to hold, where the model declares
            another number of them than the data have.
        declares: whether the model declares a plate of as many rows as it is given, so many.
        chosen: the numbers of the rows that results are wanted of, in that order.
        args: the model's arguments with all rows.
        kwargs: its keyword arguments, those that never change among them.
        devices: those among which the rows of a batch are divided; all have a copy of the data.
    """

    data: ArrayData
    plate: str
    num_rows: int
    subsamples: bool
    is_unobserved: bool
    held: dict[str, tuple[int, Any]]
    declares: Callable[[int], bool]
    chosen: np.ndarray
    args: tuple
    kwargs: dict[str, Any]
    devices: Devices

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
        arrays = read_for(guide.reader, data, batch_axes, static_kwargs)
        arrays = replace(arrays, arrays=devices.put(arrays.arrays))
        args, kwargs = arrays.whole()
        kwargs = {**kwargs, **static_kwargs}
        with HANDLERS:
            return cls._of_model(guide, arrays, static_kwargs, args, kwargs, devices)

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
            held = _held(guide, arrays, args, kwargs)
            sites = guide.reader.sites(args, kwargs, held)
            _require_same_events(guide, sites)
            require_finite_observations(guide.reader, arrays, static_kwargs, held)
        guide.read_model(args, kwargs, held)
        name = guide.plate.name
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
        subsamples, chosen = plate.length < plate.size, np.arange(plate.size)
        unobserved = guide.is_unobserved(sites)
        declares = cache(partial(_declares, guide.reader, arrays, static_kwargs, name))
        known = (arrays, name, plate.size, subsamples, unobserved, held, declares)
        return cls(*known, chosen, args, kwargs, devices)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """A number for each row, by which a result is known to be on it."""
        return fingerprint_rows(self.data, self.num_rows)

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
            raise ValueError(f"Rows are chosen by their numbers, found {chosen.dtype}.")
        wrong = chosen[(chosen < 0) | (chosen >= self.num_rows)]
        if wrong.size:
            raise ValueError(
                f"There is no row {wrong[0]}: the data have {self.num_rows} rows, 0 to "
                f"{self.num_rows - 1} ({wrong.size} of {chosen.size} do not exist)."
            )
        return replace(self, chosen=chosen.astype(int))

    def cut(self, rows: np.ndarray) -> Rows:
        """Return data of some rows only; a model that selects rows itself needs all."""
        return self.with_arrays(self.data.layout.take(self.data.arrays, jnp.asarray(rows)))

    def with_arrays(self, arrays: tuple[Array, ...]) -> Rows:
        """Return rows of other data for the same model, as many as the arrays have."""
        data = replace(self.data, arrays=arrays)
        args, kwargs = data.whole()
        static = {name: value for name, value in self.kwargs.items() if name not in kwargs}
        number = self.num_rows if data.is_whole else data.layout.num_data(arrays)
        data = replace(data, num_data=1 if data.is_whole else number)
        chosen = np.arange(number)
        return replace(
            self, data=data, num_rows=number, chosen=chosen, args=args, kwargs=kwargs | static
        )

    def batch(self, indices: Array) -> Batch:
        """Return the rows of these numbers, as compiled functions take them."""
        cuts = not (self.data.is_whole or self.subsamples)
        return Batch(
            self.data.arrays,
            indices,
            None,
            layout=self.data.layout,
            plate=self.plate,
            num_data=self.num_rows,
            cuts=cuts,
            fills_plate=not self.data.is_whole and not (cuts and self.declares(len(indices))),
        )

    def whole(self) -> Batch:
        """Return all rows in one batch, or the first where one is enough for what all share."""
        return self.batch(jnp.arange(self.num_rows if self.data.is_whole else 1))

    def everything(self) -> Batch:
        """Return all rows in one batch."""
        return replace(self.batch(jnp.arange(self.num_rows)), cuts=False)

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
            if len(self.chosen) == self.num_rows:
                return found  # in which the rows of other plates are whole, too
            return jax.tree.map(partial(np.take, indices=self.chosen, axis=row_axis), found)
        num_rows = len(self.chosen)
        results = prefetch(map(fn, self.batches(batch_size)))
        first = next(results)
        out = jax.tree.map(partial(_room, num_rows, row_axis), first)
        starts = range(0, num_rows, self._at_once(batch_size))
        for start, found in zip(starts, itertools.chain([first], results), strict=True):
            jax.tree.map(partial(_write, start, row_axis), out, found)
        return out

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of the chosen rows, the last filled up; data taken whole are one."""
        if self.data.is_whole:
            yield self.whole()
            return
        for places, _ in padded_batches(len(self.chosen), self._at_once(batch_size)):
            yield self.batch(self.devices.divide(self.chosen[places]))

    def num_batches(self, batch_size: int) -> int:
        """Return how many batches there are."""
        return 1 if self.data.is_whole else -(-len(self.chosen) // self._at_once(batch_size))

    def _at_once(self, batch_size: int) -> int:
        """Return how many rows a batch has, if it may have so many, for the devices to divide."""
        number = len(self.chosen)
        size = min(batch_size, number if number == self.num_rows else rounded(number))
        return self.devices.rounded(size)


def _require_same_events(guide: AbstractGuide, sites: ModelSites) -> None:
    """Raise ValueError if data would be broadcast to a distribution that they once fitted."""
    known = {} if guide.plan is None else guide.plan.sites.sites
    for name, site in sites.sites.items():
        if site.is_broadcast and name in known and not known[name].is_broadcast:
            raise ValueError(
                f"Site {name!r} observes values of event shape {site.event_shape}, to which its "
                "distribution would be broadcast."
            )


def _held(guide: AbstractGuide, data: ArrayData, args: tuple, kwargs: dict) -> dict:
    """Return the rows that the local plate must be told to hold, as it declares another number.

    Raises:
        Exception: whatever the model raises, if it can take the data in no way.
    """
    failed: Exception | None = None
    name = guide.plate_name if guide.plan is None else guide.plan.plate.name
    try:
        sites = guide.reader.sites(args, kwargs)
        name = name or guide.choose_plate(sites).name
        plate = sites.plates.get(name)
        if data.is_whole or plate is None or plate.size == data.num_data:
            return {}
    except Exception as error:  # of any kind, as the model's own code raises it
        if name is None or data.is_whole:
            raise
        failed = error
    held = {name: (data.num_data, jnp.arange(data.num_data))}
    try:
        guide.reader.sites(args, kwargs, held)
    except Exception:
        if failed is None:
            return {}
        raise failed from None
    return held


def _declares(
    reader: ModelReader, data: ArrayData, static_kwargs: dict[str, Any], plate: str, number: int
) -> bool:
    """Return whether the model, given so many rows of data, declares a plate of that number.

    Compiled functions read the model for the same shapes, so that it is run no more often.
    """
    args, kwargs = data.layout.whole(
        jax.eval_shape(data.layout.take, data.arrays, jnp.arange(number))
    )
    try:
        with HANDLERS:
            found = reader.sites(args, {**kwargs, **static_kwargs}).plates[plate]
    except Exception:  # of any kind, as the model's own code raises it
        return False
    return found.length == found.size == number


def rounded(number: int) -> int:
    """Return the next power of two, so that few sizes of batches are compiled for parts of data."""
    return 1 << max(number - 1, 0).bit_length()


def _room(num_data: int, row_axis: int, like: Array) -> np.ndarray:
    """Return room for all rows; the rows are the slowest axis, so that writing is fast."""
    shape = [size for axis, size in enumerate(like.shape) if axis != row_axis]
    return np.moveaxis(np.empty((num_data, *shape), like.dtype), 0, row_axis)


def _write(start: int, row_axis: int, room: np.ndarray, found: Array) -> None:
    """Copy a batch of rows to its place, without what fills it up."""
    room, rows = np.moveaxis(room, row_axis, 0), np.moveaxis(np.asarray(found), row_axis, 0)
    stop = min(start + len(rows), len(room))
    room[start:stop] = rows[: stop - start]
