"""A trained guide and any rows of data: runs quantities per batch of rows, or per row."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arguments import require_key, require_whole
from numpyro_vae.data.batch import Batch
from numpyro_vae.data.devices import ONE_DEVICE, Devices
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.inference.compiled import Compiled
from numpyro_vae.inference.encoded import EncodedBatch, Trained
from numpyro_vae.inference.faults import Faults
from numpyro_vae.inference.functions import (
    Quantity,
    draws_of_globals,
    encoded,
    globals_key,
    of_batch,
    of_rows,
)
from numpyro_vae.inference.memory import largest_of_row, require_memory, size_of
from numpyro_vae.inference.natural import Stepped, require_rows, take_steps
from numpyro_vae.inference.outside import Watched
from numpyro_vae.inference.rows import Rows, room, rounded, write
from numpyro_vae.inference.seen import Seen
from numpyro_vae.model.captured import signature
from numpyro_vae.numpyro_internals import HANDLERS

ROWS = 256  # rows at once
DRAWS = 2**22  # values drawn at once
KEPT = 2**26  # values of covariances that are kept
NUM_GLOBALS = 16  # draws of the global sites that the steps of rows are given
PARTS = 2**32 - 2  # of no row: what the keys of parts of the draws are folded with first


class Runner:
    """A trained guide, and quantities of its batches, compiled once for all runners of the guide.

    See `numpyro_vae.inference.quantities` for what a quantity is.

    Args:
        guide: the guide that was trained.
        params: its parameters and the model's, with the state of networks.
        static_kwargs: keyword arguments of the model that are the same in every call.
        batch_axes: the datum axis of each of the model's arguments.
        seen: what is known of the data that the guide was trained on.
        devices: those among which the rows of a batch are divided.
        natural_steps: that each row takes after the network, see `take_steps`.
    """

    def __init__(
        self,
        guide: AbstractGuide,
        params: dict[str, Any],
        static_kwargs: dict[str, Any],
        batch_axes: Any,
        seen: Seen | None = None,
        devices: Devices = ONE_DEVICE,
        natural_steps: int = 0,
    ):
        self.guide, self.params, self.devices = guide, devices.put(params), devices
        self.static_kwargs, self.batch_axes = static_kwargs, batch_axes
        self.seen, self.natural_steps = seen or Seen(), natural_steps
        self._has_features: bool | None = None
        self.faults: Faults | None = None  # of the rows, where they are to be told

    def watched(self, faults: Faults) -> Runner:
        """Return the same, telling of observed values that are outside their support."""
        other = copy(self)
        other.faults = faults
        return other

    @property
    def local_names(self) -> tuple[str, ...]:
        """The latent sites of the local plate, those that are enumerated too."""
        discrete = self.guide.sites.enumerated(self.guide.plate.name)
        return tuple(site.name for site in (*self.guide.local_sites, *discrete))

    def as_trained(self, data: Any) -> Any:
        """Return data in the form of those of the training; see `Seen.as_trained`."""
        return self.seen.as_trained(self.guide, self.batch_axes, data)

    def read(self, data: Any, *, of_prior: bool = False) -> Rows:
        """Return the rows of data; see `Rows.read`.

        Args:
            data: the data.
            of_prior: whether data without observations will do, as latents are of their prior then.

        Raises:
            ValueError: if there are no observations, and they will not do.
        """
        self.guide.renew()
        args = self.guide, self.static_kwargs, self.as_trained(data)
        read = partial(Rows.read, *args, devices=self.devices)
        rows = read(self.batch_axes)
        self.seen.require_sizes(self.guide.model, rows.data, self.static_kwargs)
        if not rows.data.is_whole:
            with HANDLERS:
                first = partial(rows.batch, np.arange(1))
                whole = self.guide.needs_all_rows(self.params, first, self.static_kwargs)
            rows = replace(read(None), by_row=rows.data) if whole else rows
        require_rows(self.guide, self.natural_steps)
        if rows.is_unobserved and not of_prior:
            raise ValueError(
                f"Nothing is observed in plate {rows.plate!r}, so there is no posterior. Pass the "
                "observations that the guide was trained with; predict and to_datatree can do "
                "without, and draw latents from their prior."
            )
        return rows

    def draw_globals(self, rng_key: Array, rows: Rows, num_samples: int) -> dict[str, Array]:
        """Draw the global sites, one set for all rows.

        Raises:
            ValueError: if ``num_samples`` is below 1.
            MemoryError: if the draws do not fit in memory.
            TypeError: if the key is none.
        """
        return self._of_globals("sample_globals", rng_key, rows, num_samples)

    def weigh_globals(
        self, rng_key: Array, rows: Rows, num_samples: int
    ) -> tuple[dict[str, Array], Array]:
        """Draw the global sites, each draw with its log-density; see `AmortizedGuide.draw_globals`.

        Raises:
            NoDensityError: if the guide of a global site has no density.
        """
        return self._of_globals("draw_globals", rng_key, rows, num_samples)

    def _of_globals(self, method: str, rng_key: Array, rows: Rows, num_samples: int) -> Any:
        require_key(rng_key)
        require_whole("num_samples", num_samples)
        with HANDLERS:
            self.guide.set_up_globals(self.params, rows.args, rows.kwargs, rows.held)
        fn = partial(draws_of_globals, getattr(self.guide, method), self.static_kwargs, num_samples)
        compiled = self._compiled((method, num_samples), fn)
        args = self._of_all(compiled, self.params, rows, globals_key(rng_key))
        if self.guide.global_names:
            require_memory(size_of(compiled.shapes(*args)))
        return compiled(*args)

    def require_like_scales(self) -> None:
        """Raise ValueError if the model's scales make no posterior."""
        if self.guide.plan is not None:
            self.guide.plan.require_like_scales()

    def require_density(self) -> None:
        """Raise ValueError if the guide is of points, or the model's scales make no posterior."""
        self.require_like_scales()
        if self.guide.no_density:
            raise ValueError(self.guide.no_density)

    def per_batch(
        self,
        quantity: Quantity,
        rows: Rows,
        *args: Any,
        by_row: Any = None,
        num_draws: int = 1,
        batch_size: int | None = None,
        row_axis: int = 0,
        times: int = 1,
        **static: Any,
    ) -> Any:
        """Run ``quantity(batch, *args, **static)`` on batches of rows, and join the results.

        Args:
            quantity: what to compute.
            rows: the rows.
            args: its further arguments.
            by_row: a pytree of arrays with a value for each row in front; what belongs to a batch
                becomes the first of the further arguments.
            num_draws: how many draws of each row are held at once, for the batch to fit in memory.
            batch_size: rows at once; by default as many as fit.
            row_axis: the axis of the rows in all that it returns.
            times: how many such results are kept.
            static: its keyword arguments.

        Raises:
            MemoryError: if the results do not fit in memory; nothing is computed then.
        """
        quantity = quantity if self.faults is None else Watched(quantity, row_axis)
        compiled, trained = self._compiled_quantity(of_batch, quantity, static), self.trained(rows)
        stepped = self.steps(rows)
        for_all = stepped is None or rows.data.is_whole

        def given(batch: Batch) -> tuple:
            mine = () if by_row is None else (_cut(by_row, rows, batch),)
            steps = stepped if for_all else _cut(stepped, rows, batch)
            return (trained, batch, steps, *mine, *args)

        values = max(num_draws * self.width(), largest_of_row(by_row))
        batch_size = batch_size or _batch_size(values)
        batches = rows.num_batches(batch_size) * times
        if batches > 1:
            first = next(rows.batches(batch_size))
            require_memory(batches * size_of(compiled.shapes(*given(first))))
        found = rows.collect(lambda batch: compiled(*given(batch)), batch_size, row_axis)
        return found if self.faults is None else self.faults.take(rows, *found)

    def per_draw(
        self,
        quantity: Quantity,
        rows: Rows,
        rng_key: Array,
        globals_: dict[str, Any],
        *,
        num_samples: int,
        by_row: np.ndarray | None = None,
        observed: bool = False,
        **static: Any,
    ) -> Any:
        """Run ``quantity(batch, rng_key, globals_, num_samples=, **static)`` on rows, and on draws.

        So many draws that those of a row do not fit the device are drawn in parts, each with a key
        of its own.

        Args:
            quantity: what to compute: a pytree of arrays ``(num_samples, batch, ...)``.
            rows: the rows.
            rng_key: the random key.
            globals_: as many draws of the global sites.
            num_samples: how many draws.
            by_row: an array with a row and a draw of it in front, which becomes the first of the
                further arguments.
            observed: whether what is observed is among them.
            static: its further keyword arguments.

        Raises:
            MemoryError: if the results do not fit in memory; nothing is computed then.
        """
        parts = -(-num_samples // self.draws_at_once(rows))
        size = -(-num_samples // parts)
        batch_size = self.rows_at_once(rows, num_samples, observed=observed)
        static |= {"batch_size": batch_size, "times": parts, "num_samples": size}
        run = partial(self.per_batch, quantity, rows, row_axis=1, **static)
        if parts == 1:
            return run(rng_key, globals_, by_row=by_row)
        out = None
        for number in range(parts):
            key = jax.random.fold_in(jax.random.fold_in(rng_key, PARTS), number)
            places = np.arange(number * size, (number + 1) * size)
            places = places.clip(max=num_samples - 1)  # all parts are of one size
            given = {name: x[places] for name, x in globals_.items()}
            mine = None if by_row is None else by_row[:, places]
            found = run(key, given, by_row=mine)
            out = jax.tree.map(partial(room, num_samples, 0), found) if out is None else out
            jax.tree.map(partial(write, number * size, 0), out, found)
        return out

    def trace(self, quantity: Quantity, rows: Rows, *args: Any) -> Any:
        """Return the shapes of a quantity of a batch, for which nothing is computed."""
        found = partial(of_batch, self.encode, quantity), self.trained(rows)
        with HANDLERS:
            return jax.eval_shape(*found, rows.whole(), None, *args)

    def has_features(self, rows: Rows) -> bool:
        """Return whether the guide says what it says of a row by features; see `refine`."""
        if self._has_features is None:  # it is the guide's, whatever the rows
            found: list[bool] = []
            self.trace(lambda batch: found.append(batch.encoding.has_features), rows)
            self._has_features = found[0]
        return self._has_features

    def once(self, quantity: Quantity, rows: Rows, *args: Any, **static: Any) -> Any:
        """Run a quantity of all rows at once; see `per_batch`."""
        compiled = self._compiled_quantity(of_batch, quantity, static)
        found = compiled(*self._of_all(compiled, self.trained(rows), rows, None, *args))
        return jax.tree.map(np.asarray, found)

    def _of_all(self, compiled: Compiled, trained: Any, rows: Rows, *args: Any) -> tuple:
        """Return the arguments of a quantity of all rows, read only if it depends on them.

        Of rows that are not in memory some stand for all, unless it reads them, or is another
        function where there are as many as there are, such as of ``len(x)``.
        """
        given = (trained, rows.everything(), *args)
        if rows.stored is None:
            return given
        program, used = compiled.program(*given)
        pairs = zip(used[1].arrays, rows.data.layout.axes, strict=True)
        reads = any(is_used for is_used, axis in pairs if axis is not None)
        if not reads and program == compiled.program(trained, rows.shapes(), *args)[0]:
            return given
        return (trained, replace(rows, picked=None).in_memory().everything(), *args)

    def per_row(
        self, quantity: Quantity, rows: Rows, by_row: Any, *args: Any, **static: Any
    ) -> Any:
        """Run ``quantity(batch, place, of_row, *args, **static)`` on each row, in parallel.

        For what goes on for as long as a row needs it. The batch is of this row alone, or of all
        if the model takes the data whole; the row is at ``place`` of it.

        Args:
            quantity: what to compute.
            rows: the rows.
            by_row: a pytree of arrays with the rows in front, of which ``of_row`` is one.
            args: its further arguments.
            static: its keyword arguments.
        """
        size, (pool, where), devices = rows.num_chosen, rows.pool(), self.devices
        places = np.minimum(np.arange(devices.rounded(rounded(size))), size - 1)
        by_row = jax.tree.map(lambda x: devices.divide(x[places]), by_row)
        chosen = devices.divide(where[places])
        compiled = self._compiled_quantity(of_rows, quantity, static)
        stepped = self.steps(rows)
        if not rows.data.is_whole:
            stepped = jax.tree.map(lambda x: devices.divide(x[places]), stepped)
        found = compiled(self.trained(rows), pool, stepped, chosen, by_row, *args)
        return jax.tree.map(lambda x: np.asarray(x)[:size], found)

    def width(self, *, observed: bool = False) -> int:
        """Return how many values are drawn of a row at once."""
        plate = self.guide.plate
        seen = self.guide.sites.observed(plate.name) if observed else ()
        return sum(site.datum_size(plate) for site in (*self.guide.local_sites, *seen))

    def rows_at_once(self, rows: Rows, num_samples: int, *, observed: bool) -> int:
        """Return how many rows are drawn at once, where each has so many draws: a power of two."""
        parts = -(-num_samples // self.draws_at_once(rows))
        return _batch_size(-(-num_samples // parts) * self.width(observed=observed))

    def draws_at_once(self, rows: Rows) -> int:
        """Return how many draws of a row fit the device, the same for all that is computed of them.

        Of data that the model takes whole, it is draws of all rows.
        """
        rows_at_once = rows.num_rows if rows.data.is_whole else 1
        return max(DRAWS // max(self.width(observed=True) * rows_at_once, 1), 1)

    def _compiled_quantity(self, of: Callable, quantity: Quantity, static: dict) -> Compiled:
        require_whole("num_particles", static.get("particles", 1))
        fn = partial(of, self.encode, partial(quantity, **static))
        return self._compiled((of, quantity, self.natural_steps, *sorted(static.items())), fn)

    @property
    def encode(self) -> Callable[..., EncodedBatch]:
        """What encodes a batch of rows, given what `trained` returns."""
        return partial(encoded, self.guide, self.static_kwargs)

    def trained(self, rows: Rows) -> Trained:
        """Return what is trained, and draws of the global sites if rows take steps given these."""
        drawn: dict[str, Array] = {}
        if self.natural_steps and self.guide.global_names:
            drawn = self.draw_globals(jax.random.key(0), rows, NUM_GLOBALS)
        return Trained(self.params, drawn, self.natural_steps)

    def steps(self, rows: Rows) -> Stepped | None:
        """Return what the steps of rows come to, which are taken once for all quantities of them.

        Returns:
            Arrays with the chosen rows in front, or all of data that the model takes whole; None if
            there are no steps, or too much to keep: each quantity takes them then.
        """
        if not self.natural_steps or rows.num_chosen * self.width() ** 2 > KEPT:
            return None
        rows = replace(rows, picked=None) if rows.data.is_whole else rows

        def take() -> Stepped | None:
            known = self.guide, self.params, self.static_kwargs, self.batch_axes
            network, given = Runner(*known, devices=self.devices), self.trained(rows).globals_
            sizes = {"num_draws": self.width(), "num_steps": self.natural_steps}
            return network.per_batch(take_steps, rows, given, **sizes)

        return rows.kept.get((self, rows.data), rows.chosen, take)

    def _compiled(self, key: tuple, fn: Callable[..., Any]) -> Compiled:
        """Return a compiled function, the same for all runners with these static arguments."""
        key += tuple((name, signature(value)) for name, value in self.static_kwargs.items())
        compiled: dict[Any, Any] = self.guide.compiled
        if key not in compiled:
            compiled.setdefault(key, Compiled(fn))
        return compiled[key]


def _batch_size(values: int) -> int:
    """Return how many rows fit in memory, with so many values of each: a power of two.

    So parts of the data, which are powers of two as well, are whole batches.
    """
    return 1 << (int(np.clip(DRAWS // max(values, 1), 1, ROWS)).bit_length() - 1)


def _cut(by_row: Any, rows: Rows, batch: Batch) -> Any:
    """Return what belongs to the rows of a batch, of arrays that have a value for chosen rows."""
    places = rows.places(np.asarray(batch.row_numbers))
    return jax.tree.map(lambda x: x[places], by_row)
