"""A source of data on disk, larger than memory: chunks read ahead, shuffled in windows of a few."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arrays import ArrayData, take_rows
from numpyro_vae.data.batch import Batch, each_step, prefetch
from numpyro_vae.data.devices import ONE_DEVICE, Devices
from numpyro_vae.data.stores import READ_BYTES, Store
from numpyro_vae.model.missing import require_finite_observations
from numpyro_vae.training.guarded import guarded_steps
from numpyro_vae.training.sources import IterableSource
from numpyro_vae.training.step import Trainer
from numpyro_vae.training.taking import require_batch_size

READS = 8  # in a window, so that a batch has rows from as many places
THREAD = "numpyro_vae-read"

Spans = list[slice]


class ChunkSource:
    """Arrays on disk: contiguous spans of rows, read in a random order by a thread.

    A window holds the rows of a few spans. It is shuffled and trained on in one compiled scan,
    while the next one is read. Every row comes once an epoch. Where the batch size does not divide
    the data, consecutive rows from a random place fill the last batch up, so that every row has
    the same chance.

    Args:
        trainer: takes the steps.
        data: as for `ArrayData.read`; some leaves are on disk, others may be in memory.
        batch_size: rows in a batch.
        batch_axes: as in `ArrayData.read`.
        plate: the local plate's name, or None to read it off the model.
        read_bytes: how much is read at once; a whole number of the store's own chunks.
        devices: those among which the rows of a batch are divided.

    Raises:
        ValueError: if arrays disagree in length, or the batch size does not fit them or the
            model's plate or the devices, or hosts have different numbers of rows.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Any,
        batch_size: int,
        batch_axes: Any,
        plate: str | None,
        read_bytes: int = READ_BYTES,
        devices: Devices = ONE_DEVICE,
    ):
        self.trainer, self.batch_axes, self.devices = trainer, batch_axes, devices
        self.store = devices.together(partial(Store, data, batch_axes, read_bytes=read_bytes))
        self.num_data, hosts = self.store.num_rows, devices.num_hosts
        devices.require_same("rows", self.num_data)
        require_batch_size(batch_size, self.num_data * hosts)
        devices.require_divides(batch_size)
        self.batch_size = batch_size // hosts  # of which each host has as many
        self.read_rows = self.store.read_rows
        num_steps = -(-self.num_data // self.batch_size)
        most = max(1, READS * self.read_rows // self.batch_size)
        self.window_steps = -(-num_steps // -(-num_steps // most))  # of windows of like size
        # What else is asked of a source is that of an iterable which begins with these rows.
        devices.require_same("rows read at once", self.window_steps)
        sample, number = [devices.together(self._sample)], self.num_data * hosts
        self.like = IterableSource(trainer, sample, number, batch_axes, plate, devices)
        self.data, self.sites, self.num_steps = self.like.data, self.like.sites, num_steps
        self._run: Callable[..., Any] | None = None

    def _sample(self) -> Any:
        """Return rows to initialize with, from several places, as rows may be in an order."""
        (spans, order), *_ = self.plan(np.random.default_rng(0))
        return take_rows(self._read(spans), self.batch_axes, order[0])

    def first(self) -> Batch:
        """Return rows from several places, the same for data of the same length."""
        return self.like.first()

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        return self.like.batches(data)

    # -- an epoch ---------------------------------------------------------------------------------

    def plan(self, rng: np.random.Generator) -> list[tuple[Spans, np.ndarray]]:
        """Return the windows of an epoch: the spans to read, and the rows of them in each step."""
        if self.batch_size == self.num_data:  # they stay in order, as those in memory do
            return [([slice(0, self.num_data)], np.arange(self.num_data)[None])]
        starts = rng.permutation(np.arange(0, self.num_data, self.read_rows))
        spans = [slice(int(i), min(int(i) + self.read_rows, self.num_data)) for i in starts]
        missing = -self.num_data % self.batch_size
        if missing:
            start = int(rng.integers(self.num_data))
            end = start + missing
            spans.append(slice(start, min(end, self.num_data)))
            spans += [slice(0, end - self.num_data)] if end > self.num_data else []
        windows = _cut(spans, self.window_steps * self.batch_size)
        orders = (
            rng.permutation(_length(window)).reshape(-1, self.batch_size) for window in windows
        )
        return list(zip(windows, orders, strict=True))

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch; where a step is not finite, once more, with each step guarded."""
        self.store.require_length()
        new_state, losses, oks = state, [], []
        with closing(self._windows(rng_key, epoch)) as windows:
            for batch, order in windows:
                if oks and not oks[-1]:  # waits for the last window, now that this one is ready
                    break
                new_state, found, ok = self._steps(new_state, batch, order)
                losses.append(found)
                oks.append(ok)
        if all(oks):
            return new_state, np.concatenate(losses)
        with closing(self._windows(rng_key, epoch)) as windows:
            batches = (batch.at(rows) for batch, order in windows for rows in each_step(order))
            return guarded_steps(self.trainer, state, batches, epoch)

    def _steps(self, state: SVIState, batch: Batch, order: Array) -> tuple[SVIState, Array, Array]:
        trainer = self.trainer
        if self._run is None:
            self._run = trainer.loop if trainer.is_slow_in_scan(state, batch) else trainer.scan
        return self._run(state, batch, order)

    def _windows(self, rng_key: Array, epoch: int) -> Generator[tuple[Batch, Array]]:
        """Yield the windows of an epoch, and the rows of each of their steps.

        The thread only reads, as JAX's settings may be those of the main one; it ends with the
        iterator.
        """
        key = self.devices.own_key(jax.random.fold_in(rng_key, epoch))
        bits = jax.random.bits(key, (4,), "uint32")
        plan = self.plan(np.random.default_rng(np.asarray(bits)))
        with ThreadPoolExecutor(1, THREAD) as thread:
            reads = ((thread.submit(self._read, spans), spans, order) for spans, order in plan)
            for read, spans, order in prefetch(reads, 1):
                devices, number = self.devices, order.size
                numbers = devices.divide(devices.numbers(order, number), axis=1)
                yield self._window(read.result(), spans), numbers

    def _window(self, rows: Any, spans: Spans) -> Batch:
        data = ArrayData.read(rows, self.batch_axes)
        if data.not_finite:
            self._require_finite(data, spans)
        like = self.like.first()
        return replace(like, arrays=data.on(self.devices).arrays, weights=None, cuts=True)

    def _require_finite(self, data: ArrayData, spans: Spans) -> None:
        """Raise if the model observes what is not finite, naming the place in the store."""
        trainer, like = self.trainer, self.first()
        static = trainer.svi.static_kwargs
        try:
            require_finite_observations(trainer.reader, data, static, like.every(data.num_data))
        except ValueError:
            for span in spans:
                name = f"data[{span.start}:{span.stop}]"
                part = ArrayData.read(self.store.read(span), self.batch_axes, name)
                every = like.every(part.num_data)
                require_finite_observations(trainer.reader, part, static, every)
            raise

    def _read(self, spans: Spans) -> Any:
        """Return the rows of spans, in memory."""
        return self.store.join([self.store.read(span) for span in spans])


def _length(spans: Spans) -> int:
    return sum(span.stop - span.start for span in spans)


def _cut(spans: Spans, size: int) -> list[Spans]:
    """Return the spans in groups of ``size`` rows each, cut where they do not fit, and a last one.

    Example:
        >>> _cut([slice(6, 9), slice(0, 3)], 4)
        [[slice(6, 9, None), slice(0, 1, None)], [slice(1, 3, None)]]
    """
    groups, room = [[]], size
    for span in spans:
        start = span.start
        while start < span.stop:
            if not room:
                groups.append([])
                room = size
            stop = min(start + room, span.stop)
            groups[-1].append(slice(start, stop))
            room -= stop - start
            start = stop
    return groups
