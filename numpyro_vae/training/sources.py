"""Where the batches of an epoch come from: arrays in memory, or any iterable of batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.batch import Batch, padded_batches, prefetch
from numpyro_vae.model.missing import require_finite_observations
from numpyro_vae.model.sites import ModelSites, choose_plate
from numpyro_vae.model.trace import Rows
from numpyro_vae.numpyro_internals import takes_row_weights
from numpyro_vae.training.guarded import guarded_steps
from numpyro_vae.training.step import Trainer
from numpyro_vae.training.taking import Taking, require_rowwise


@runtime_checkable
class Source(Protocol):
    """What `fit` asks of a source of data: this, and no more.

    Attributes:
        data: data in memory, of which `validation` data have the layout.
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

    Where the batch size does not divide the data, the last batch of an epoch is filled up from
    the next permutation, so that every batch has the same shape and every row the same chance.

    Args:
        trainer: takes the steps.
        data: the training data.
        batch_size: rows in a batch.
        plate: the local plate's name, or None to read it off the model.

    Raises:
        ValueError: if the batch size does not fit the data or the model's plate.
    """

    def __init__(self, trainer: Trainer, data: ArrayData, batch_size: int, plate: str | None):
        require_batch_size(batch_size, data.num_data)
        self.trainer, self.data, self.batch_size = trainer, data, batch_size
        self.num_steps = -(-data.num_data // batch_size)
        self.taking = self._read(plate)
        self.sites, self.plate = self.taking.sites, self.taking.plate.name
        # Not the first ones, as encoders take the scale of the data from them, and rows may be
        # in the order of their values.
        chosen = np.random.default_rng(0).choice(data.num_data, batch_size, replace=False)
        self._first = self._batch(data, jnp.asarray(chosen), None)
        rows = self._first.every(data.num_data)
        require_finite_observations(trainer.reader, data, trainer.svi.static_kwargs, rows)
        self._run: Callable[..., Any] | None = None

    def _read(self, plate: str | None) -> Taking:
        """Return how the model takes the rows of a batch."""
        rows = self.data.rows(jnp.arange(self.batch_size))
        given = {True: rows, False: self.data.whole()}
        read = partial(_read_given, self.trainer, given)
        met = partial(plates_met, self.trainer, *rows)
        sizes = (self.batch_size, self.data.num_data)
        taking = Taking.find(read, met, plate, sizes)
        require_rowwise(taking.sites, taking.plate, *sizes)
        return taking

    def _batch(self, data: ArrayData, indices: Array, weights: Array | None) -> Batch:
        return Batch(
            data.arrays,
            indices,
            weights,
            layout=data.layout,
            plate=self.plate,
            num_data=self.data.num_data,
            cuts=self.taking.cuts,
            fills_plate=self.taking.fills_plate,
        )

    def first(self) -> Batch:
        """Return rows from all of the data, the same for data of the same length."""
        return self._first

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        return [
            (self._batch(data, indices, weights), count)
            for indices, weights, count in _padded(data, self.batch_size, self.trainer)
        ]

    def order(self, rng_key: Array, epoch: int) -> Int[Array, "num_steps batch"]:
        """Return the rows of each step of an epoch."""
        return _permuted(rng_key, epoch, self.data.num_data, self.num_steps, self.batch_size)

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch; where a step is not finite, once more, with each step guarded."""
        order, batch, trainer = self.order(rng_key, epoch), self._first, self.trainer
        if self._run is None:
            self._run = trainer.loop if trainer.is_slow_in_scan(state, batch) else trainer.scan
        new_state, losses, ok = self._run(state, batch, order)
        if ok:
            return new_state, np.asarray(losses)
        return guarded_steps(self.trainer, state, map(batch.at, order), epoch)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _permuted(
    rng_key: Array, epoch: Array, num_data: int, num_steps: int, batch_size: int
) -> Int[Array, "num_steps batch"]:
    order = jax.random.permutation(jax.random.fold_in(rng_key, epoch), num_data)
    missing = num_steps * batch_size - num_data
    if missing:
        following = jax.random.permutation(jax.random.fold_in(rng_key, epoch + 1), num_data)
        order = jnp.concatenate([order, following[:missing]])
    return order.reshape(num_steps, batch_size)


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

    Raises:
        ValueError: if there is no batch.
    """

    def __init__(
        self, trainer: Trainer, batches: Iterable, num_data: int, batch_axes: Any, plate: str | None
    ):
        self.trainer, self.num_data, self.batch_axes = trainer, num_data, batch_axes
        self.iterable, self.num_seen = batches, 0
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("data yields no batch. Pass an iterable that can be iterated anew.")
        if isinstance(batches, Iterator):  # it does not yield the first one again
            self.iterable = chain([first], batches)
        self.data = ArrayData.read(_arguments(first), batch_axes, "the first batch")
        self.batch_size = self.data.num_data
        self.num_steps = -(-num_data // self.batch_size)
        self.taking = self._take(plate)
        self.sites, self.plate = self.taking.sites, self.taking.plate.name
        self._require_finite(self.data)

    def _take(self, plate: str | None) -> Taking:
        """Return how the model takes the rows of a batch."""
        given = self.data.whole()
        read = partial(_read_given, self.trainer, {True: given, False: given})
        sizes = (self.batch_size, self.num_data)
        taking = Taking.find(read, partial(plates_met, self.trainer, *given), plate, sizes)
        require_rowwise(taking.sites, taking.plate, *sizes)
        return taking

    def _require_finite(self, data: ArrayData) -> None:
        rows, static = self._pad(data).every(data.num_data), self.trainer.svi.static_kwargs
        require_finite_observations(self.trainer.reader, data, static, rows)

    def first(self) -> Batch:
        """Return the first batch."""
        return self._pad(self.data)

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        found = []
        for indices, weights, count in _padded(data, self.batch_size, self.trainer):
            rows = data.layout.take(data.arrays, indices)
            batch = _given_batch(rows, indices, weights, data.layout, self.plate, self.num_data)
            found.append((replace(batch, fills_plate=self.taking.fills_plate), count))
        return found

    def _pad(self, data: ArrayData) -> Batch:
        """Fill a short batch up with copies of its first row, which weigh nothing."""
        if data.num_data > self.batch_size or data.layout != self.data.layout:
            raise ValueError(
                f"A batch of {data.num_data} rows follows a first one of {self.batch_size}. Yield "
                "batches of one size and structure; only the last may be shorter."
            )
        return self.batches(data)[0][0]

    def _epoch(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.iterable):
            data = self._read(batch, f"batch {number}")
            self.num_seen += data.num_data
            yield self._pad(data)

    def _read(self, batch: Any, name: str) -> ArrayData:
        data = ArrayData.read(_arguments(batch), self.batch_axes, name)
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


def _arguments(batch: Any) -> Any:
    """Return a batch as a tuple of arguments, where a loader has made a list of one."""
    return tuple(batch) if isinstance(batch, list) else batch


def require_batch_size(batch_size: int, num_data: int) -> None:
    """Raise if there are no batches of this size.

    Raises:
        ValueError: if it is less than one row, or more than there are.
    """
    if not 1 <= batch_size <= num_data:
        raise ValueError(
            f"batch_size is {batch_size}, expected a number from 1 to the {num_data} rows of the "
            "data."
        )


def read_sites(
    trainer: Trainer, args: tuple, kwargs: dict[str, Any], rows: Rows | None = None
) -> ModelSites:
    """Return what the model of a trainer holds, without computing it."""
    return trainer.reader.sites(args, {**kwargs, **trainer.svi.static_kwargs}, rows)


def _read_given(
    trainer: Trainer, given: Mapping[bool, tuple[tuple, dict]], is_batch: bool, rows: Rows
) -> ModelSites:
    return read_sites(trainer, *given[is_batch], rows)


def plates_met(trainer: Trainer, args: tuple, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the plates that a model enters, before it fails."""
    return trainer.reader.plates_met(args, {**kwargs, **trainer.svi.static_kwargs})


def _whole_batch(data: ArrayData, plate: str, size: int) -> Batch:
    return _given_batch(data.arrays, jnp.arange(size), None, data.layout, plate, size)


def _given_batch(
    arrays: tuple, indices: Array, weights: Array | None, layout: Any, plate: str, num_data: int
) -> Batch:
    """Return a batch whose arrays have its rows, and no others."""
    return Batch(
        arrays,
        jnp.arange(len(indices)),
        weights,
        layout=layout,
        plate=plate,
        num_data=num_data,
        cuts=False,
        fills_plate=False,
    )


def _padded(
    data: ArrayData, batch_size: int, trainer: Trainer
) -> Iterator[tuple[Array, Array | None, int]]:
    """Yield the rows of each batch, their weights, and how many there are without the padding."""
    pads = takes_row_weights(trainer.svi.loss)
    for indices, weights in padded_batches(data.num_data, batch_size):
        count = int(np.count_nonzero(weights))
        yield (indices, weights, count) if pads else (indices[:count], None, count)
