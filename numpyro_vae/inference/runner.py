"""A trained guide and any rows of data: runs functions of a `View` on batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arrays import Layout
from numpyro_vae.data.shapes import explained
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.inference.quantities import View
from numpyro_vae.inference.rows import Rows, rounded

ROWS = 256  # rows at once
DRAWS = 2**22  # unconstrained values drawn at once


class Rowwise:
    """A trained guide, and functions of its views compiled once.

    Args:
        guide: the guide that was trained.
        params: its parameters and the model's, with the state of networks.
        static_kwargs: keyword arguments of the model that are the same in every call.
    """

    def __init__(
        self, guide: AmortizedGuide, params: dict[str, Any], static_kwargs: dict[str, Any]
    ):
        self.guide, self.params, self.static_kwargs = guide, params, static_kwargs
        self._compiled: dict[Any, Callable] = {}

    @property
    def local_names(self) -> tuple[str, ...]:
        """The latent sites of the local plate, those that are enumerated too."""
        discrete = self.guide.sites.enumerated(self.guide.plate.name)
        return tuple(site.name for site in (*self.guide.local_sites, *discrete))

    def read(self, data: Any, batch_axes: Any) -> Rows:
        """Return the rows of data; see `Rows.read`."""
        return Rows.read(self.guide, self.static_kwargs, data, batch_axes)

    def draw_globals(self, rng_key: Array, rows: Rows, num_samples: int) -> dict[str, Array]:
        """Draw the global sites, one set for all rows.

        Raises:
            ValueError: if ``num_samples`` is below 1.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1.")
        key = jax.random.fold_in(rng_key, 2**32 - 1)  # of no row
        return self.guide.sample_globals(key, self.params, (num_samples,), rows.args, rows.kwargs)

    def require_density(self) -> None:
        """Raise ValueError if the guide is of points."""
        if not self.guide.family.has_density:
            raise ValueError(
                f"{type(self.guide.family).__name__} has no density, so there are no importance "
                "weights, evidence, divergences, checks or repairs of it. Use AutoAmortizedNormal "
                "for these."
            )

    def apply(
        self,
        fn: Callable[..., Any],
        rows: Rows,
        *dynamic: Any,
        num_draws: int = 1,
        row_axis: int = 0,
        **static: Any,
    ) -> Any:
        """Apply ``fn(view, *dynamic, **static)``, compiled, to batches of rows, and join them.

        Args:
            fn: a function of a `View`.
            rows: the rows.
            dynamic: arguments that are traced.
            num_draws: how many draws of each row are held at once, for the batch to fit in memory.
            row_axis: the axis of the rows in all that it returns.
            static: arguments that are not traced.
        """
        fn = partial(self.run, fn, *dynamic, **static)
        return rows.collect(fn, self.rows_at_once(num_draws), row_axis)

    def apply_with(
        self, fn: Callable[..., Any], rows: Rows, by_row: Any, *dynamic: Any, row_axis: int = 0
    ) -> Any:
        """Apply ``fn(view, of_batch, *dynamic)`` as `apply` does, with arrays that go by row.

        Args:
            fn: a function of a `View`.
            rows: the rows, in order.
            by_row: a pytree of arrays with the rows in front, of which ``of_batch`` is cut.
            dynamic: arguments that are traced.
            row_axis: the axis of the rows in all that it returns.
        """

        def of_batch(arrays: Any, indices: Array, **how: Any) -> Any:
            places = np.searchsorted(rows.chosen, indices).clip(0, len(rows.chosen) - 1)
            part = jax.tree.map(lambda x: x[places], by_row)
            return self.run(fn, part, *dynamic, arrays, indices, **how)

        size = max(leaf[0].size for leaf in jax.tree.leaves(by_row))
        return rows.collect(of_batch, int(np.clip(DRAWS // size, 1, ROWS)), row_axis)

    def rows_at_once(self, num_draws: int) -> int:
        """Return how many rows fit in memory with so many draws of each."""
        size = sum(site.datum_size(self.guide.plate) for site in self.guide.local_sites)
        return int(np.clip(DRAWS // (num_draws * max(size, 1)), 1, ROWS))

    def run(
        self, fn: Callable[..., Any], *arguments: Any, layout: Any, subsamples: bool, **static: Any
    ) -> Any:
        """Call a function of a `View` on the last two arguments, arrays and indices, compiled."""
        *dynamic, arrays, indices = arguments

        def on_view(params: dict, arrays: tuple, indices: Array, *dynamic: Any, **kw: Any) -> Any:
            layout, subsamples = kw.pop("layout"), kw.pop("subsamples")
            return fn(self._view(params, arrays, indices, layout, subsamples), *dynamic, **kw)

        static |= {"layout": layout, "subsamples": subsamples}
        compiled = self._compile(fn, on_view, static)
        return compiled(self.params, arrays, indices, *dynamic, **static)

    def apply_each(
        self, fn: Callable[..., Any], rows: Rows, by_row: Any, *dynamic: Any, **static: Any
    ) -> Any:
        """Apply ``fn(view, place, of_row, *dynamic, **static)`` to rows one by one, in parallel.

        For what goes on for as long as a row needs it. The view is of this row alone, or of all if
        the model takes the data whole; the row is at ``place``.

        Args:
            fn: a function of a `View`.
            rows: the rows.
            by_row: a pytree of arrays with the rows in front, of which ``of_row`` is one.
            dynamic: arguments that are traced.
            static: arguments that are not traced.
        """
        layout, subsamples, whole = rows.data.layout, rows.subsamples, rows.data.is_whole
        number = rows.num_rows

        def on_rows(
            params: dict, arrays: tuple, rows: Array, by_row: Any, *dynamic: Any, **kw: Any
        ) -> Any:
            def one(row: Array, of_row: Any) -> Any:
                indices = jnp.arange(number) if whole else row[None]
                view = self._view(params, arrays, indices, layout, subsamples)
                return fn(view, row if whole else jnp.zeros_like(row), of_row, *dynamic, **kw)

            return jax.vmap(one)(rows, by_row)

        compiled = self._compile((fn, layout, subsamples, number), on_rows, static)
        size = len(rows.chosen)
        places = np.minimum(np.arange(rounded(size)), size - 1)
        by_row = jax.tree.map(lambda x: x[places], by_row)
        chosen = jnp.asarray(rows.chosen[places])
        found = compiled(self.params, rows.data.arrays, chosen, by_row, *dynamic, **static)
        return jax.tree.map(lambda x: np.asarray(x)[:size], found)

    def _view(
        self, params: dict, arrays: tuple, indices: Array, layout: Layout, subsamples: bool
    ) -> View:
        how = {"layout": layout, "subsamples": subsamples, "static_kwargs": self.static_kwargs}
        with explained(self.guide.argument_shapes, *layout.whole(arrays), layout.axes):
            return View.build(self.guide, params, arrays, indices, **how)

    def _compile(self, key: Any, fn: Callable[..., Any], static: dict[str, Any]) -> Callable:
        """Return a compiled function, the same as the last time."""
        if key not in self._compiled:
            self._compiled[key] = jax.jit(fn, static_argnames=tuple(static))
        return self._compiled[key]


def choose_names(var_names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names of the sites wanted, by default all that are known.

    Raises:
        ValueError: if a site does not exist.
    """
    names = list(known if var_names is None else var_names)
    missing = sorted(set(names) - set(known))
    if missing:
        raise ValueError(f"There are no sites {missing} here, choose from {sorted(known)}.")
    return names
