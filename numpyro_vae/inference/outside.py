"""Which rows of a batch have observed values outside the support of their site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_vae.data.ragged import Segments
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.model.run import Run
from numpyro_vae.model.supports import Outside


@dataclass(frozen=True)
class Watched:
    """A quantity of a batch, and `outside_by_row`, rows along the same axis.

    Attributes:
        quantity: the function.
        row_axis: that of the rows in all that it returns.
    """

    quantity: Callable[..., Any]
    row_axis: int

    def __call__(
        self, batch: EncodedBatch, *args: Any, **static: Any
    ) -> tuple[Any, dict[str, Outside]]:
        """Return both."""
        before = tuple(range(self.row_axis))
        outside = jax.tree.map(lambda x: jnp.expand_dims(x, before), outside_by_row(batch))
        return self.quantity(batch, *args, **static), outside


def outside_by_row(batch: EncodedBatch) -> dict[str, Outside]:
    """Return by observed site in which rows it has values outside its support, rows in front.

    A support whose bounds are computed from what is sampled or learned is left out, as it is not
    known which values it holds; so is a site that belongs to no row.
    """
    run = batch.encoding.run
    found = {name: _by_row(outside, name, run) for name, outside in run.reading.outside.items()}
    return {name: outside for name, outside in found.items() if outside is not None}


def _by_row(outside: Outside, name: str, run: Run) -> Outside | None:
    sites, site = run.sites, run.sites.sites[name]
    known = (run.plate.name, *run.groups)
    plate = next((sites.plates[x] for x in known if x in site.plates), None)
    if plate is None or set(sites.reads.bounds.get(name, ())) - sites.plates.keys():
        return None
    values = jnp.moveaxis(outside.values, site.axis(plate), 0)
    by_row = values.reshape(len(values), -1)
    if plate.name != run.plate.name:
        segments = Segments(by_row, run.groups[plate.name], run.plate.length)
        number = segments.sum(by_row.sum(1))
        return replace(outside, values=number > 0, bounds=None)
    found = _found(site.rows(run.reading.values[name], plate), values)
    return replace(outside, values=by_row.any(1), bounds=None, found=found)


def _found(rows: Any, outside: Any) -> Any:
    """Return of each row one of its values that are outside; None if values are whole events."""
    if rows.shape != outside.shape:
        return None
    rows, outside = (x.reshape(len(x), -1) for x in (rows, outside))
    return jnp.take_along_axis(rows, outside.argmax(1)[:, None], axis=1)[:, 0]
