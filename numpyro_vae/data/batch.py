"""A batch of rows: the one form in which data reach compiled code, in training and after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from numpyro_vae.data.arrays import Layout


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays", "indices", "weights", "latents", "numbers"),
    meta_fields=("layout", "plate", "num_data", "cuts", "fills_plate"),
)
@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of data; a pytree whose layout is static.

    A function compiled for one batch serves every other of the same shapes and layout:
    ``jit(fn)(params, batch, *args)``.

    Attributes:
        arrays: the arrays among the model's arguments, a tuple, of all rows or of these.
        indices: where in the arrays the rows are, integers ``(batch,)``.
        weights: a factor for each row in the objective, ``(batch,)``; None if all count once.
        layout: how the arrays become the model's arguments.
        plate: the name of the local plate.
        num_data: how many rows there are in all.
        cuts: whether the rows are still to be taken out of the arrays.
        fills_plate: whether the model's plate is told which rows it holds, as it selects some, or
            declares another number of them than there are.
        latents: the values of latent sites that the rows were simulated with; None of real data.
        numbers: those of the arrays' rows among all, where the arrays have some of them; None where
            they have all.
    """

    arrays: Any  # unchecked, as JAX puts what it likes into the place of arrays
    indices: Any
    weights: Any
    layout: Layout
    plate: str
    num_data: int
    cuts: bool
    fills_plate: bool
    latents: Any = None
    numbers: Any = None

    def at(self, indices: Int[Array, "batch"]) -> Batch:
        """Return the batch of other rows of the same data."""
        return replace(self, indices=indices)

    @property
    def row_numbers(self) -> Any:
        """The numbers of the rows among all, of which their random keys are made."""
        return self.indices if self.numbers is None else self.numbers[self.indices]

    @property
    def held(self) -> Int[Array, "batch"] | None:
        """The rows that the model's plate is told to hold, of those that its arguments have."""
        if not self.fills_plate:
            return None
        return jnp.arange(len(self.indices)) if self.cuts else self.indices

    @property
    def rows(self) -> dict[str, tuple[int, Any]]:
        """By plate its size and the rows that it is told to hold; empty if it holds its own."""
        return {} if self.held is None else {self.plate: (self.num_data, self.held)}

    def every(self, num_rows: int) -> dict[str, tuple[int, Any]]:
        """Return what `rows` is for all of ``num_rows`` rows of data like these."""
        return {self.plate: (num_rows, jnp.arange(num_rows))} if self.fills_plate else {}

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """Return the model's positional and keyword arguments for these rows."""
        if self.cuts:
            return self.layout.rows(self.arrays, self.indices)
        return self.layout.whole(self.arrays)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rng_key", "epoch"),
    meta_fields=("num_data", "num_steps", "batch_size"),
)
@dataclass(frozen=True, eq=False)
class Permutation:
    """The rows of each step of an epoch, filled up with those of the next permutation.

    All rows at once stay in order, as a guide or a model may have parameters for each of them.

    A pytree, so that they are drawn in the program that takes the steps: a call of its own would
    cost a short epoch a twentieth of its time.

    Attributes:
        rng_key: of all epochs.
        epoch: the number of this one.
        num_data: how many rows there are.
        num_steps: how many steps.
        batch_size: how many rows in each.
    """

    rng_key: Any  # unchecked, as those of `Batch`
    epoch: Any
    num_data: int
    num_steps: int
    batch_size: int

    @jax.jit
    def rows(self) -> Int[Array, "num_steps batch"]:
        """Return the rows of each step."""
        if self.batch_size == self.num_data:
            return jnp.arange(self.num_data)[None]
        epoch_key = partial(jax.random.fold_in, self.rng_key)
        order = jax.random.permutation(epoch_key(self.epoch), self.num_data)
        missing = self.num_steps * self.batch_size - self.num_data
        if missing:
            following = jax.random.permutation(epoch_key(self.epoch + 1), self.num_data)
            order = jnp.concatenate([order, following[:missing]])
        return order.reshape(self.num_steps, self.batch_size)


Order = Permutation | Int[Array, "num_steps batch"]


def rows_of(order: Order) -> Int[Array, "num_steps batch"]:
    """Return the rows of each step of an order."""
    return order.rows() if isinstance(order, Permutation) else order


def padded_batches(num_data: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``(indices, weights)`` of every row in order, the last batch filled up.

    The weights of a batch add up to ``batch_size``; those of rows that fill up are zero.

    Example:
        >>> [weights.tolist() for _, weights in padded_batches(3, 2)]
        [[1.0, 1.0], [2.0, 0.0]]
    """
    for start in range(0, num_data, batch_size):
        indices = np.arange(start, start + batch_size)
        real = indices < num_data
        weights = real * np.float32(batch_size / real.sum())
        yield np.where(real, indices, start), weights


def each_step(order: Order) -> Iterator[Int[Array, "batch"]]:
    """Yield the rows of each step, also if they are divided among hosts, as no loop does."""
    rows = rows_of(order)
    return (rows[step] for step in range(len(rows)))


def prefetch(batches: Iterable[Any], size: int = 2) -> Iterator[Any]:
    """Yield batches, keeping ``size`` of them ahead on their way to the device.

    Example:
        >>> list(prefetch([1, 2, 3]))
        [1, 2, 3]
    """
    queue: deque = deque()
    for batch in batches:
        queue.append(batch)
        if len(queue) > size:
            yield queue.popleft()
    yield from queue
