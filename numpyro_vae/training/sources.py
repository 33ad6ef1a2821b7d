"""Where the batches of an epoch come from: arrays in memory, or any iterable of batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.batch import Batch, Order, Permutation, each_step, padded_batches, prefetch
from numpyro_vae.data.devices import ONE_DEVICE, Devices
from numpyro_vae.model.missing import require_finite_observations
from numpyro_vae.model.sites import ModelSites, choose_plate
from numpyro_vae.model.trace import Rows
from numpyro_vae.numpyro_internals import takes_row_weights
from numpyro_vae.training.guarded import guarded_steps
from numpyro_vae.training.step import Trainer
from numpyro_vae.training.taking import (
    Taking,
    as_tuple,
    plates_met,
    read_given,
    read_sites,
    require_batch_size,
    require_rowwise,
)


@runtime_checkable
class Source(Protocol):
    """What `fit` asks of a source of data: this, and no more.

    Attributes:
        data: data in memory, of which `validation` data have the layout; those of this host.
        sites: what the model holds, given a batch.
        num_steps: the steps of an epoch, of an iterable those that its rows make.
    """

    data: ArrayData
    sites: ModelSites
    num_steps: int

    def first(self) -> Batch:
        """Return a batch to initialize with."""
        ...

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch, with keys of its own, and return the state and the loss of every step.

        A step that is not finite is skipped, with a warning; its loss is NaN.

        Raises:
            FloatingPointError: if no step is finite.
        """
        ...

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        ...


class ArraySource:
    """Arrays in memory: every epoch is a fresh permutation, in one compiled scan.

    A batch of all rows has them in order.

    Where the batch size does not divide the data, the last batch of an epoch is filled up from
    the next permutation, so that every batch has the same shape and every row the same chance.

    Args:
        trainer: takes the steps.
        data: the training data.
        batch_size: rows in a batch, of all hosts.
        plate: the local plate's name, or None to read it off the model.
        devices: those among which the rows of a batch are divided.

    Raises:
        ValueError: if the batch size does not fit the data, the devices or the model's plate, or
            hosts have different numbers of rows.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: ArrayData,
        batch_size: int,
        plate: str | None,
        devices: Devices = ONE_DEVICE,
    ):
        devices.require_same("rows", data.num_data)
        require_batch_size(batch_size, data.num_data * devices.num_hosts)
        devices.require_divides(batch_size)
        self.trainer, self.data, self.devices = trainer, data, devices
        self.batch_size, self.part = batch_size, batch_size // devices.num_hosts
        self.num_steps = -(-data.num_data // self.part)
        self.held = data.on(devices)
        self.taking = self._read(plate)
        self.sites, self.plate = self.taking.sites, self.taking.plate.name
        # Not the first ones, as encoders take the scale of the data from them, and rows may be
        # in the order of their values; all are as they are in an epoch.
        chosen = np.random.default_rng(0).choice(data.num_data, self.part, replace=False)
        chosen = np.sort(chosen) if self.part == data.num_data else chosen
        self._first = self._batch(self.held, chosen, None)
        given = (trainer.reader, data, trainer.svi.static_kwargs, self._first.every(data.num_data))
        devices.together(partial(require_finite_observations, *given))
        self._run: Callable[..., Any] | None = None

    def _read(self, plate: str | None) -> Taking:
        """Return how the model takes the rows of a batch."""
        rows = self.held.rows(self._numbers(np.arange(self.part)))
        given = {True: rows, False: self.held.whole()}
        read = partial(read_given, self.trainer, given)
        met = partial(plates_met, self.trainer, *rows)
        sizes = (self.batch_size, self.held.num_data)
        taking = Taking.find(read, met, plate, sizes)
        require_rowwise(taking.sites, taking.plate, *sizes)
        return taking

    def _numbers(
        self, rows: np.ndarray | Array, num_rows: int | None = None, axis: int = 0
    ) -> Array:
        """Return the numbers of rows of this host, by default of the training data's."""
        num_rows = self.data.num_data if num_rows is None else num_rows
        return self.devices.divide(self.devices.numbers(rows, num_rows), axis)

    def _batch(self, data: ArrayData, rows: np.ndarray, weights: np.ndarray | None) -> Batch:
        own = data.num_data // self.devices.num_hosts
        return Batch(
            data.arrays,
            self._numbers(rows, own),
            None if weights is None else self.devices.divide(weights),
            layout=data.layout,
            plate=self.plate,
            num_data=self.held.num_data,
            cuts=self.taking.cuts,
            fills_plate=self.taking.fills_plate,
        )

    def first(self) -> Batch:
        """Return rows from all of the data, the same for data of the same length."""
        return self._first

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        self.devices.require_same("rows of validation data", data.num_data)
        held = data.on(self.devices)
        return [
            (self._batch(held, rows, weights), count)
            for rows, weights, count in _padded(data, self.part, self.trainer)
        ]

    def order(self, rng_key: Array, epoch: int) -> Order:
        """Return the rows of each step of an epoch."""
        key = self.devices.own_key(rng_key)
        order = Permutation(key, epoch, self.data.num_data, self.num_steps, self.part)
        return order if self.devices.mesh is None else self._numbers(order.rows(), axis=1)

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch; where a step is not finite, once more, with each step guarded."""
        order, batch, trainer = self.order(rng_key, epoch), self._first, self.trainer
        if self._run is None:
            self._run = trainer.loop if trainer.is_slow_in_scan(state, batch) else trainer.scan
        new_state, losses, ok = self._run(state, batch, order)
        if ok:
            return new_state, np.asarray(losses)
        return guarded_steps(self.trainer, state, map(batch.at, each_step(order)), epoch)


class WholeSource:
    """Arrays that the model takes whole, as no one has a datum axis: an epoch is one step.

    Args:
        trainer: takes the steps.
        data: the training data.
        plate: the local plate's name, or None to read it off the model.

    Raises:
        ValueError: if the model's plate takes fewer rows than it has.
    """

    num_steps = 1

    def __init__(self, trainer: Trainer, data: ArrayData, plate: str | None):
        self.sites = read_sites(trainer, *data.whole())
        seen = choose_plate(self.sites, plate)
        if seen.length < seen.size:
            raise ValueError(
                f"The model's plate {seen.name!r} subsamples {seen.length} of {seen.size} rows, "
                "but batch_axes=None gives it all data at once. Remove its subsample_size, or say "
                "with batch_axes= which axis of each argument counts the data."
            )
        require_finite_observations(trainer.reader, data, trainer.svi.static_kwargs, {})
        self.trainer, self.data, self.plate = trainer, data, seen

    def first(self) -> Batch:
        """Return the data."""
        return _whole_batch(self.data, self.plate.name, self.plate.size)

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return data like these, and how much they count."""
        return [(_whole_batch(data, self.plate.name, self.plate.size), 1)]

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Take the step; one that is not finite is an error."""
        del rng_key
        batch = self.first()
        new_state, losses, ok = self.trainer.scan(state, batch, batch.indices[None])
        if ok:
            return new_state, np.asarray(losses)
        return guarded_steps(self.trainer, state, [batch], epoch)


class IterableSource:
    """Any iterable of batches, each like in-memory data: an array, a tuple, or a dict.

    Args:
        trainer: takes the steps.
        batches: iterated over anew in every epoch.
        num_data: how many data there are in all.
        batch_axes: as in `ArrayData.read`.
        plate: the local plate's name, or None to read it off the model.
        devices: those among which the rows of a batch are divided.

    Raises:
        ValueError: if there is no batch, or the devices do not divide it, or hosts have different
            numbers of its rows.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Iterable,
        num_data: int,
        batch_axes: Any,
        plate: str | None,
        devices: Devices = ONE_DEVICE,
    ):
        self.trainer, self.num_data, self.batch_axes = trainer, num_data, batch_axes
        self.devices = devices
        self.iterable, self.num_seen = batches, 0
        self.data = devices.together(partial(self._begin, batches))
        self.part = self.data.num_data
        self.batch_size = self.part * devices.num_hosts
        devices.require_same("rows in a batch", self.part)
        devices.require_divides(self.batch_size, "the number of rows in the first batch")
        self.num_steps = -(-num_data // self.batch_size)
        self.taking = self._take(plate)
        self.sites, self.plate = self.taking.sites, self.taking.plate.name
        devices.together(partial(self._require_finite, self.data))

    def _begin(self, batches: Iterable) -> ArrayData:
        """Read the first batch."""
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("data yields no batch. Pass an iterable that can be iterated anew.")
        if isinstance(batches, Iterator):  # it does not yield the first one again
            self.iterable = chain([first], batches)
        return ArrayData.read(as_tuple(first), self.batch_axes, "the first batch")

    def _take(self, plate: str | None) -> Taking:
        """Return how the model takes the rows of a batch."""
        given = self.data.layout.whole(self._divided(self.data))
        read = partial(read_given, self.trainer, {True: given, False: given})
        sizes = (self.batch_size, self.num_data)
        taking = Taking.find(read, partial(plates_met, self.trainer, *given), plate, sizes)
        require_rowwise(taking.sites, taking.plate, *sizes)
        return taking

    def _require_finite(self, data: ArrayData) -> None:
        rows: Rows = {}
        if self.taking.fills_plate:
            rows = {self.plate: (data.num_data, jnp.arange(data.num_data))}
        static = self.trainer.svi.static_kwargs
        require_finite_observations(self.trainer.reader, data, static, rows)

    def first(self) -> Batch:
        """Return the first batch."""
        return self._pad(self.data)

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        found = []
        for indices, weights, count in _padded(data, self.part, self.trainer):
            arrays = data.layout.take(data.arrays, jnp.asarray(indices))
            rows = replace(data, arrays=arrays, num_data=len(indices))
            found.append((self._batch(rows, weights), count))
        return found

    def _batch(self, data: ArrayData, weights: np.ndarray | None) -> Batch:
        """Return the batch of these rows and those of other hosts."""
        devices, number = self.devices, data.num_data
        return Batch(
            self._divided(data),
            devices.divide(devices.numbers(np.arange(number), number)),
            None if weights is None else devices.divide(weights),
            layout=replace(data.layout, devices=devices),
            plate=self.plate,
            num_data=self.num_data,
            cuts=False,
            fills_plate=self.taking.fills_plate,
        )

    def _divided(self, data: ArrayData) -> tuple[Array, ...]:
        pairs = zip(data.arrays, data.layout.axes, strict=True)
        devices = self.devices
        return tuple(
            devices.put(x) if axis is None else devices.divide(x, axis) for x, axis in pairs
        )

    def _pad(self, data: ArrayData) -> Batch:
        """Fill a short batch up with copies of its first row, which weigh nothing."""
        if data.num_data > self.part or data.layout != self.data.layout:
            raise ValueError(
                f"A batch of {data.num_data} rows follows a first one of {self.part}. Yield "
                "batches of one size and structure; only the last may be shorter."
            )
        return self.batches(data)[0][0]

    def _epoch(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.iterable):
            data = self._read(batch, f"batch {number}")
            self.num_seen += data.num_data * self.devices.num_hosts
            yield self._pad(data)

    def _read(self, batch: Any, name: str) -> ArrayData:
        data = ArrayData.read(as_tuple(batch), self.batch_axes, name)
        self._require_finite(data)
        return data

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch, each step guarded, in the iterable's own order."""
        del rng_key
        self.num_seen = 0
        state, losses = guarded_steps(self.trainer, state, prefetch(self._epoch()), epoch)
        if not len(losses):
            raise ValueError(
                f"data yielded no batch in epoch {epoch}. Pass an iterable that can be iterated "
                "anew, such as a list or a data loader, not a generator."
            )
        if not epoch:
            self._compare_number()
        return state, losses

    def _compare_number(self) -> None:
        """Say if the first epoch had other rows than there are said to be.

        Fewer may be a sample of the data, or all but the last batch.

        Raises:
            ValueError: if there were more.
        """
        if self.data.is_whole:
            return
        found = f"data yielded {self.num_seen} rows in an epoch, and num_data is {self.num_data}"
        if self.num_seen > self.num_data:
            raise ValueError(f"{found}. Pass the number of rows that there are in all.")
        if self.num_seen <= self.num_data - self.batch_size:
            warnings.warn(
                f"{found}, so that each row counts for {self.num_data / self.num_seen:.3g}. That is"
                " right if an epoch is a sample of the data; else pass the number of its rows.",
                stacklevel=4,
            )


def _whole_batch(data: ArrayData, plate: str, size: int) -> Batch:
    return Batch(
        data.arrays,
        jnp.arange(size),
        None,
        layout=data.layout,
        plate=plate,
        num_data=size,
        cuts=False,
        fills_plate=False,
    )


def _padded(
    data: ArrayData, batch_size: int, trainer: Trainer
) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    """Yield the rows of each batch, their weights, and how many there are without the padding."""
    pads = takes_row_weights(trainer.svi.loss)
    for indices, weights in padded_batches(data.num_data, batch_size):
        count = int(np.count_nonzero(weights))
        yield (indices, weights, count) if pads else (indices[:count], None, count)
