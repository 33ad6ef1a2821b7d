"""One run of a model as its guide sees it: plates, local sites and what is observed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.sites import ModelSites, Plate, Site, sites_of_trace, trace_model


@dataclass(frozen=True)
class Run:
    """A model's trace on given arguments, out of sight but for its plates.

    Attributes:
        plate: the local plate as it is in this run.
        sites: the model's sites as they are in this run.
        trace: the messages by name.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """

    plate: Plate
    sites: ModelSites
    trace: dict[str, Any]
    args: tuple
    kwargs: dict[str, Any]

    @property
    def indices(self) -> Array:
        """Which rows of the local plate this run holds."""
        return self.trace[self.plate.name]["value"]

    def support(self, site: Site) -> Any:
        """Return the support of a site in this run."""
        return self.trace[site.name]["fn"].support

    def enter_plates(self, site: Site) -> ExitStack:
        """Enter the plates of a site with the very indices that the model drew."""
        stack = ExitStack()
        for name in site.plates:
            size, indices = self.trace[name]["args"][0], self.trace[name]["value"]
            dim = self.sites.plates[name].dim
            with handlers.substitute(data={name: indices}):
                plate = numpyro.plate(name, size, subsample_size=len(indices), dim=dim)
            stack.enter_context(plate)
        return stack

    def same_sites(self, expected: tuple[Site, ...]) -> tuple[Site, ...]:
        """Return the local sites as they are in this run, of the same sizes as expected.

        Raises:
            ValueError: if one is missing or belongs to data of another shape.
        """
        return tuple(self._same_site(site) for site in expected)

    def _same_site(self, site: Site) -> Site:
        now = self.sites.sites.get(site.name)
        plate = self.plate
        if now is None or now.is_observed or plate.name not in now.plates:
            raise ValueError(
                f"Local site {site.name!r} of plate {plate.name!r} is not a latent site of the "
                "plate in this call. Call the model as when the guide was set up."
            )
        found, expected = now.datum_shape(plate), site.datum_shape(plate)
        if found != expected:
            raise ValueError(
                f"Local site {site.name!r} has shape {found} for each datum of plate "
                f"{plate.name!r}; the guide was set up with {expected}. Use a new guide for data "
                "of another shape."
            )
        return now

    def inputs(self, read: Callable[..., Any] | None) -> Any:
        """Return what the encoder reads: arrays with a row for each datum of this run.

        Args:
            read: a function of the model's arguments; None reads the observed sites of the local
                plate: an array if there is one, a dict of arrays by site name if several.

        Raises:
            ValueError: if nothing is observed, or ``read`` returns another number of rows.
        """
        if read is not None:
            return jax.tree.map(self._select_rows, read(*self.args, **self.kwargs))
        rows = {
            site.name: site.rows(self.trace[site.name]["value"], self.plate)
            for site in self.sites.observed(self.plate.name)
        }
        if not rows:
            raise ValueError(
                f"Nothing is observed in plate {self.plate.name!r}, so there is nothing to encode. "
                "Call the model with its data, or say with inputs= what the encoder reads."
            )
        return rows if len(rows) > 1 else next(iter(rows.values()))

    def _select_rows(self, x: Any) -> Array:
        x = jnp.asarray(x)
        size = self.trace[self.plate.name]["args"][0]
        if x.ndim and x.shape[0] == len(self.indices):
            return x
        if x.ndim and x.shape[0] == size:
            return x[self.indices]
        raise ValueError(
            f"inputs= returned an array of shape {x.shape}; plate {self.plate.name!r} has "
            f"{len(self.indices)} of {size} rows in this run. Return either number along axis 0."
        )


def run_model(model: Callable[..., Any], plate: str, args: tuple, kwargs: dict) -> Run:
    """Run a model once, to read it; the enclosing handlers see its plates and nothing else.

    Under ``jit`` what is not read, such as the likelihood's network, is never computed.

    Raises:
        ValueError: if the model has no site in the plate this time.
    """
    trace = trace_model(model, args, kwargs, expose=("plate",))
    sites = sites_of_trace(trace)
    if plate not in sites.plates:
        raise ValueError(
            f"The model has no site in plate {plate!r} in this call, found plates "
            f"{sorted(sites.plates)}. Call the model as when the guide was set up."
        )
    return Run(sites.plates[plate], sites, trace, args, kwargs)
