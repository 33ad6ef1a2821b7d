"""How an epoch runs: over arrays in memory in one compiled scan, or over an iterable."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import batched
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arrays import ArrayData, Batch, padded_batches, prefetch
from numpyro_vae.model.missing import FiniteObservations
from numpyro_vae.model.sites import Plate, choose_plate, read_model
from numpyro_vae.training.step import Trainer

CHUNK = 32  # steps between two looks at the losses where steps are taken one by one


class ArraySource:
    """Arrays in memory: every epoch is a fresh permutation, in one compiled scan.

    Where the batch size does not divide the data, the last batch of an epoch is filled up from
    the next permutation, so that every batch has the same shape and every row the same chance.

    Args:
        svi: the inference to run.
        data: the training data.
        batch_size: rows in a batch.
        plate: the local plate's name, or None to read it off the model.

    Raises:
        ValueError: if the batch size does not fit the data or the model's plate.
    """

    def __init__(self, svi: SVI, data: ArrayData, batch_size: int, plate: str | None):
        if not 1 <= batch_size <= data.num_data:
            raise ValueError(
                f"batch_size is {batch_size}, expected a number from 1 to the {data.num_data} rows "
                "of the data."
            )
        FiniteObservations(svi.model, svi.static_kwargs).require(data)
        self.data, self.batch_size = data, batch_size
        self.num_steps = -(-data.num_data // batch_size)
        declared = self._plate(svi, plate, data.whole())
        self.plate = declared.name
        self.subsamples = declared.length < declared.size
        if self.subsamples:
            self._check(declared.length, "subsamples", batch_size)
            self._check(declared.size, "has", data.num_data)
            seen, read = declared, lambda batch: data.layout.whole(batch.arrays)
        else:
            seen = self._plate(svi, self.plate, data.rows(jnp.arange(batch_size)))
            self._check(seen.length, "keeps, whatever the data,", batch_size)
            read = lambda batch: data.layout.rows(batch.arrays, batch.indices)  # noqa: E731
        self.trainer = Trainer(svi, self.plate, data.num_data, read, seen.length < seen.size)

    def _plate(self, svi: SVI, plate: str | None, arguments: tuple[tuple, dict]) -> Plate:
        args, kwargs = arguments
        return choose_plate(read_model(svi.model, args, {**kwargs, **svi.static_kwargs}), plate)

    def _check(self, found: int, verb: str, expected: int) -> None:
        if found != expected:
            raise ValueError(
                f"The model's plate {self.plate!r} {verb} {found} rows, but the data say "
                f"{expected} (batch_size={self.batch_size}, {self.data.num_data} rows in all). "
                "Declare the plate with the length of the data that the model is given, or with "
                "subsample_size equal to batch_size."
            )

    def first(self) -> Batch:
        """Return a batch to initialize with."""
        return Batch(self.data.arrays, jnp.arange(self.batch_size), None)

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        return [
            (Batch(data.arrays, indices, weights), count)
            for indices, weights, count in _batches(data, self.batch_size, self.trainer)
        ]

    def order(self, rng_key: Array, epoch: int | Array) -> Array:
        """Return the rows of each step of an epoch, ``(num_steps, batch_size)``."""
        num_data = self.data.num_data
        order = jax.random.permutation(jax.random.fold_in(rng_key, epoch), num_data)
        missing = self.num_steps * self.batch_size - num_data
        if missing:
            following = jax.random.permutation(jax.random.fold_in(rng_key, epoch + 1), num_data)
            order = jnp.concatenate([order, following[:missing]])
        return order.reshape(self.num_steps, self.batch_size)

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch; steps that are not finite are skipped, with a warning."""
        new_state, losses, ok = self.trainer.epoch(
            state, self.data.arrays, rng_key, epoch, order=self.order
        )
        if ok:
            return new_state, np.asarray(losses)
        batches = (Batch(self.data.arrays, rows, None) for rows in self.order(rng_key, epoch))
        return guarded_steps(self.trainer, state, batches, epoch)


class WholeSource:
    """Arrays that the model takes whole, as no one has a datum axis: an epoch is one step.

    Args:
        svi: the inference to run.
        data: the training data.
        plate: the local plate's name, or None to read it off the model.

    Raises:
        ValueError: if the model's plate takes fewer rows than it has.
    """

    def __init__(self, svi: SVI, data: ArrayData, plate: str | None):
        args, kwargs = data.whole()
        seen = choose_plate(read_model(svi.model, args, {**kwargs, **svi.static_kwargs}), plate)
        if seen.length < seen.size:
            raise ValueError(
                f"The model's plate {seen.name!r} subsamples {seen.length} of {seen.size} rows, "
                "but batch_axes=None gives it all data at once. Remove its subsample_size, or say "
                "with batch_axes= which axis of each argument counts the data."
            )
        FiniteObservations(svi.model, svi.static_kwargs).require(data)
        self.data, self.batch_size = data, seen.size
        self.trainer = Trainer(
            svi, seen.name, seen.size, lambda batch: data.layout.whole(batch.arrays), False
        )

    def first(self) -> Batch:
        """Return the data, to initialize with."""
        return Batch(self.data.arrays, jnp.arange(self.batch_size), None)

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return data like these, and how much they count."""
        return [(Batch(data.arrays, jnp.arange(self.batch_size), None), 1)]

    def order(self, rng_key: Array, epoch: int | Array) -> Array:
        """Return the rows of the only step."""
        del rng_key, epoch
        return jnp.arange(self.batch_size)[None]

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Take the step; one that is not finite is an error."""
        new_state, losses, ok = self.trainer.epoch(
            state, self.data.arrays, rng_key, epoch, order=self.order
        )
        if ok:
            return new_state, np.asarray(losses)
        return guarded_steps(self.trainer, state, [self.first()], epoch)


class IterableSource:
    """Any iterable of batches, each like in-memory data: an array, a tuple, or a dict.

    Args:
        svi: the inference to run.
        batches: iterated over anew in every epoch.
        num_data: how many data there are in all.
        batch_axes: as in `ArrayData.read`.
        plate: the local plate's name, or None to read it off the model.

    Raises:
        ValueError: if there is no batch.
    """

    def __init__(
        self, svi: SVI, batches: Iterable, num_data: int, batch_axes: Any, plate: str | None
    ):
        self.iterable, self.num_data, self.batch_axes = batches, num_data, batch_axes
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("data yields no batch. Pass an iterable that can be iterated anew.")
        self.finite = FiniteObservations(svi.model, svi.static_kwargs)
        self.data = self._read(first, "the first batch")
        self.batch_size = self.data.num_data
        args, kwargs = self.data.whole()
        seen = choose_plate(read_model(svi.model, args, {**kwargs, **svi.static_kwargs}), plate)
        self.plate = seen.name
        self.trainer = Trainer(
            svi, self.plate, num_data, lambda batch: self.data.layout.whole(batch.arrays), False
        )

    def first(self) -> Batch:
        """Return a batch to initialize with."""
        return self._pad(self.data)

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        return [
            (self._take(data, indices, weights), count)
            for indices, weights, count in _batches(data, self.batch_size, self.trainer)
        ]

    def _take(self, data: ArrayData, indices: Array, weights: Array | None) -> Batch:
        return Batch(data.layout.take(data.arrays, indices), indices, weights)

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
            yield self._pad(self._read(batch, f"batch {number}"))

    def _read(self, batch: Any, name: str) -> ArrayData:
        data = ArrayData.read(batch, self.batch_axes, name)
        self.finite.require(data)
        return data

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch; steps that are not finite are skipped, with a warning."""
        del rng_key  # the iterable has its own order
        state, losses = guarded_steps(self.trainer, state, prefetch(self._epoch()), epoch)
        if not len(losses):
            raise ValueError(
                f"data yielded no batch in epoch {epoch}. Pass an iterable that can be iterated "
                "anew, such as a list or a data loader, not a generator."
            )
        return state, losses


def _batches(
    data: ArrayData, batch_size: int, trainer: Trainer
) -> Iterator[tuple[Array, Array | None, int]]:
    """Yield the rows of each batch, their weights, and how many there are without the padding."""
    for indices, weights in padded_batches(data.num_data, batch_size):
        count = int(np.count_nonzero(weights))
        yield (indices, weights, count) if trainer.pads else (indices[:count], None, count)


def guarded_steps(
    trainer: Trainer, state: SVIState, batches: Iterable[Batch], epoch: int
) -> tuple[SVIState, np.ndarray]:
    """Take steps one by one; one that is not finite changes nothing, and is warned about.

    Raises:
        FloatingPointError: if no step of the epoch is finite.
    """
    losses, where = [np.zeros(0, np.float32)], ""
    for chunk in batched(batches, CHUNK):
        before, found = state, []
        for batch in chunk:
            state, loss = trainer.guarded_update(state, batch)
            found.append(loss)
        found = np.asarray(jax.device_get(found))
        if np.isnan(found).any() and not where:
            bad = int(np.isnan(found).argmax())
            step = sum(map(len, losses)) + bad
            where = f"step {step} of epoch {epoch}, at {trainer.culprit(before, chunk[bad])}"
        losses.append(found)
    losses = np.concatenate(losses)
    _report(losses, where)
    return state, losses


def _report(losses: np.ndarray, where: str) -> None:
    skipped = int(np.isnan(losses).sum())
    if not skipped:
        return
    found = f"the ELBO or its gradient was not finite in {skipped} of {len(losses)} steps"
    advice = "Look at the data and the priors there; a smaller learning rate may help."
    if skipped == len(losses):
        raise FloatingPointError(f"No step could be taken: {found}, first at {where}. {advice}")
    warnings.warn(f"Steps were skipped: {found}, first at {where}. {advice}", stacklevel=5)
