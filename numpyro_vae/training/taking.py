"""How a model takes the rows of a batch: as its arguments, or by its plate's own selection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from numpyro_vae.model.plan import outside
from numpyro_vae.model.sites import ModelSites, Plate, PlateError, choose_plate
from numpyro_vae.model.trace import Rows
from numpyro_vae.training.step import Trainer

Read = Callable[[bool, Rows], ModelSites]


@dataclass(frozen=True)
class Taking:
    """How a model takes the rows of a batch.

    Attributes:
        sites: what it holds, given a batch.
        plate: the local plate.
        cuts: whether its arguments have the rows of the batch alone.
        fills_plate: whether its plate is to be told which rows it holds.
    """

    sites: ModelSites
    plate: Plate
    cuts: bool
    fills_plate: bool

    @classmethod
    def find(
        cls, read: Read, met: Callable[[], Iterable[str]], plate: str | None, sizes: tuple[int, int]
    ) -> Taking:
        """Try the ways in which a model may take a batch.

        Most take the rows of a batch, and declare a plate of their number. Some take all the data
        and subsample in their plate. And some declare a number that is not the batch's, as
        ``plate("batch", 64)``: their plate is told how many rows it has.

        Args:
            read: reads the model, given the rows of a batch or else all the data, with the rows
                that plates are to hold.
            met: returns the names of the plates that the model enters before it fails.
            plate: the local plate's name, or None to choose it.
            sizes: how many rows a batch has, and how many there are in all.

        Raises:
            Exception: whatever the model raises, if it can take the data in no way.
        """
        batch_size, _ = sizes
        rows = _attempt(read, True, {}, plate)
        # A model whose plate is short of rows selects them itself, from all data.
        if isinstance(rows, tuple) and _holds(rows[1], batch_size) and not rows[1].is_short:
            return cls(*rows, cuts=True, fills_plate=False)
        whole = _attempt(read, False, {}, plate)
        if isinstance(whole, tuple) and whole[1].length < whole[1].size:
            held = _attempt(read, False, _held(whole[1].name, *sizes), whole[1].name)
            if isinstance(held, tuple):
                return cls(*held, cuts=False, fills_plate=True)
        tried = [found for found in (rows, whole) if isinstance(found, Exception)]
        for error in tried:
            if isinstance(error, PlateError):  # the model runs, and it is for the user to choose
                raise error
        known = next((found[1].name for found in (whole, rows) if isinstance(found, tuple)), plate)
        for name in met() if known is None else (known,):
            held = _attempt(read, True, _held(name, *sizes), name)
            if isinstance(held, tuple):
                return cls(*held, cuts=True, fills_plate=True)
            tried.append(held)
        raise tried[0]


def _holds(plate: Plate, number: int) -> bool:
    return plate.length == plate.size == number


def _held(name: str, batch_size: int, num_data: int) -> Rows:
    return {name: (num_data, jnp.arange(batch_size))}


def _attempt(
    read: Read, is_batch: bool, rows: Rows, plate: str | None
) -> tuple[ModelSites, Plate] | Exception:
    """Return what a model holds and its local plate, or what it raised."""
    try:
        sites = read(is_batch, rows)
        return sites, choose_plate(sites, plate)
    except Exception as error:  # of any kind, as the model's own code raises it
        return error


def require_rowwise(sites: ModelSites, plate: Plate, batch_size: int, num_data: int) -> None:
    """Raise if a minibatch would not do: what reads local latents outside their plate.

    Of such a likelihood or factor a batch's value is no estimate of that of all rows.

    Raises:
        ValueError: naming the site.
    """
    if batch_size == num_data:
        return
    for site, reads in outside(sites, plate, ()):
        raise ValueError(
            f"Site {site.name!r} lies outside plate {plate.name!r} and depends on its local sites "
            f"{reads}, so that its density on {batch_size} of {num_data} rows is no estimate of "
            f"that on all. Put it into the plate, or train with batch_size={num_data}; where "
            "another plate holds the data's observations, see segments= and batch_axes=None."
        )


def read_sites(
    trainer: Trainer, args: tuple, kwargs: dict[str, Any], rows: Rows | None = None
) -> ModelSites:
    """Return what the model of a trainer holds, without computing it."""
    return trainer.reader.sites(args, {**kwargs, **trainer.svi.static_kwargs}, rows)


def read_given(
    trainer: Trainer, given: Mapping[bool, tuple[tuple, dict]], is_batch: bool, rows: Rows
) -> ModelSites:
    """Return what a model holds, given the rows of a batch or else all data; see `Taking.find`."""
    return read_sites(trainer, *given[is_batch], rows)


def plates_met(trainer: Trainer, args: tuple, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the plates that a model enters, before it fails."""
    return trainer.reader.plates_met(args, {**kwargs, **trainer.svi.static_kwargs})


def require_batch_size(batch_size: int, num_data: int) -> None:
    """Raise if there are no batches of this size.

    Raises:
        ValueError: if it is less than one row, or more than there are.
    """
    if not 1 <= batch_size <= num_data:
        raise ValueError(
            f"batch_size is {batch_size}, expected a number from 1 to the {num_data} rows of the "
            "data, or of Simulations(like=...), whose rows may be repeated as by np.resize."
        )


def as_tuple(batch: Any) -> Any:
    """Return a batch as a tuple of arguments, where a loader has made a list of one."""
    return tuple(batch) if isinstance(batch, list) else batch
