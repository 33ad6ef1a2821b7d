"""How a model's local plate takes rows of data: as many as there are, or those it is told."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.sites import ModelSites, Plate
from numpyro_vae.numpyro_internals import HANDLERS


def held_rows(guide: AbstractGuide, data: ArrayData, args: tuple, kwargs: dict) -> dict:
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


def declares_rows(
    reader: ModelReader, data: ArrayData, static_kwargs: dict[str, Any], plate: str, number: int
) -> bool:
    """Return whether the model, given so many rows of data, declares a plate of that number.

    Compiled functions read the model for the same shapes, so that it is run no more often.
    """
    args, kwargs = data.layout.whole(
        jax.eval_shape(data.layout.take, data.arrays, np.arange(number))
    )
    try:
        with HANDLERS:
            found = reader.sites(args, {**kwargs, **static_kwargs}).plates[plate]
    except Exception:  # of any kind, as the model's own code raises it
        return False
    return found.length == found.size == number


def require_same_events(guide: AbstractGuide, sites: ModelSites) -> None:
    """Raise ValueError if data would be broadcast to a distribution that they once fitted."""
    known = {} if guide.plan is None else guide.plan.sites.sites
    for name, site in sites.sites.items():
        if site.is_broadcast and name in known and not known[name].is_broadcast:
            raise ValueError(
                f"Site {name!r} observes values of event shape {site.event_shape}, to which its "
                "distribution would be broadcast."
            )


def warn_of_batch_statistics(sites: ModelSites) -> None:
    """Warn if a network of the model takes statistics of a batch, in which rows are not alone."""
    states = [name for name, reads in sites.reads.states.items() if reads]
    if states:
        names = [name.removesuffix("$state") for name in states]
        warnings.warn(
            f"The model's networks {names} take statistics of a batch, as nnx.BatchNorm does in "
            "training mode: what is computed of a row depends on the other rows of its batch, and "
            "a repair, of one row alone, is of another posterior. Let them use their running "
            "averages after training: call eval() on an nnx.Module, or let an argument of the "
            "model set use_running_average, and pass Posterior(..., static_kwargs=).",
            UserWarning,
            stacklevel=2,
        )


def warn_of_forecast(guide: AbstractGuide, sites: ModelSites, plate: Plate) -> None:
    """Warn if a site has lost its observations because it has other steps than these."""
    for known in guide.sites.observed(plate.name):
        now = sites.sites.get(known.name)
        steps = known.datum_shape(guide.plate)
        if now and plate.name in now.plates and now.datum_shape(plate) != steps:
            warnings.warn(
                f"Site {known.name!r} is observed, of shape {steps} for each datum, where the guide"
                f" was made, and not in this call, of shape {now.datum_shape(plate)}: a scan is "
                "observed at all its steps or at none. So latents are drawn from their prior. For a"
                " forecast pass what sample draws, given the data alone, to "
                "numpyro.infer.Predictive.",
                stacklevel=2,
            )
