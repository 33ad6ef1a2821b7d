"""One run of a model as its guide sees it: plates, local sites and what is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Bool, Float, Int
from numpyro import handlers

from numpyro_vae.data.ragged import Masked, Segments
from numpyro_vae.model.contents import Reading
from numpyro_vae.model.covariates import WithCovariates
from numpyro_vae.model.plates import given_rows
from numpyro_vae.model.provenance import Names
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.signatures import call_with
from numpyro_vae.model.sites import ModelSites, Plate, Site
from numpyro_vae.numpyro_internals import declare_plate

Groups = Mapping[str, Callable[..., Any]]

UNOBSERVED = (
    "inputs= was called with data that have no observations. Let it return what the encoder reads "
    "of such data; or leave it out of the guide, whose latents are then drawn from the prior."
)


@dataclass(frozen=True)
class Run:
    """A model's reading on given arguments, with the rows that the enclosing handlers choose.

    Attributes:
        plate: the local plate as it is in this run.
        reading: what the model holds.
        whole: the same, and all rows of those other plates by which it subsamples what is in the
            local plate: the network reads and serves as much as it will without subsampling.
        groups: for other plates that hold the plate's data, which datum each of their rows
            belongs to.
        args: the model's arguments.
        kwargs: its keyword arguments.
        reader: of the model.
    """

    plate: Plate
    reading: Reading
    whole: Reading
    groups: dict[str, Int[Array, "elements"]]
    args: tuple
    kwargs: dict[str, Any]
    reader: ModelReader

    @property
    def mixed(self) -> Names:
        """The plates in which elements depend on enumerated values in each other."""
        held = {name: (len(rows), rows) for name, rows in self.reading.indices.items()}
        return self.reader.mixed(self.args, self.kwargs, held)

    @property
    def sites(self) -> ModelSites:
        """The model's sites as they are in this run."""
        return self.reading.sites

    @property
    def indices(self) -> Array:
        """Which rows of the local plate this run holds."""
        return self.reading.rows(self.plate)

    def support(self, site: Site) -> Any:
        """Return the support of a site in this run."""
        return self.reading.support(site.name)

    def mask(self, site: Site) -> Bool[Array, "..."] | None:
        """Return which entries of a site count in this run; None if all do."""
        return self.reading.masks.get(site.name)

    def scale(self, site: Site) -> Any:
        """Return the factor of a site's log-density in this run; None if it has none."""
        return self.reading.scales.get(site.name)

    def row_scale(self, sites: Iterable[Site]) -> Float[Array, "rows"] | None:
        """Return the factor that the log-densities of sites of the plate share, by row."""
        first = next((site for site in sites if self.scale(site) is not None), None)
        if first is None:
            return None
        by_entry = jnp.broadcast_to(self.scale(first), first.batch_shape)
        rows = jnp.moveaxis(by_entry, first.axis(self.plate), 0)
        return rows.reshape(rows.shape[0], -1)[:, 0]

    def enter_plates(self, names: tuple[str, ...]) -> ExitStack:
        """Enter plates with the very indices that the model drew."""
        stack = ExitStack()
        for name in names:
            plate = self.sites.plates[name]
            indices, seen = self.reading.rows(plate), name in self.reading.indices
            # A plate inside a scan is not declared in the model's trace, nor may it be here.
            hidden = handlers.block(hide_fn=lambda msg, seen=seen: not seen)
            with hidden, handlers.substitute(data={name: indices}):
                entered = numpyro.plate(
                    name, plate.size, subsample_size=len(indices), dim=plate.dim
                )
            stack.enter_context(entered)
        return stack

    def same_sites(self, expected: tuple[Site, ...]) -> tuple[Site, ...]:
        """Return the local sites as the network serves them: with all rows of other plates.

        Raises:
            ValueError: if one is missing, or its values have another shape than expected.
        """
        return tuple(self._same_site(site) for site in expected)

    def held(self, site: Site, value: Array) -> Array:
        """Return those entries of a value of a local site that are of rows which this run holds."""
        for plate in self._cut_plates(site.name):
            value = jnp.take(value, self.reading.rows(plate), axis=site.axis(plate))
        return value

    def require_whole(self, names: Iterable[str], whose: str, remedy: str = "") -> None:
        """Raise ValueError if sites lie in other plates of which this run holds a part.

        Args:
            names: of the sites.
            whose: what they are, for the message.
            remedy: another one than to hold all rows.
        """
        for name in names:
            for plate in self._cut_plates(name):
                raise ValueError(
                    f"{whose} {name!r} lies in plate {plate.name!r}, which subsamples "
                    f"{plate.length} of {plate.size} rows, and the network is of all of them. "
                    f"Remove the subsample_size of plate {plate.name!r}{remedy}."
                )

    def _cut_plates(self, name: str) -> list[Plate]:
        """Return the plates of a site, other than the local one, of which the run holds a part."""
        plates = map(self.sites.plates.__getitem__, self.sites.sites[name].plates)
        return [x for x in plates if x.length < x.size and x.name != self.plate.name]

    def _same_site(self, site: Site) -> Site:
        now = self.whole.sites.sites.get(site.name)
        plate = self.plate
        if now is None or now.is_observed or plate.name not in now.plates:
            raise ValueError(
                f"Local site {site.name!r} of plate {plate.name!r} is not a latent site of the "
                "plate in this call. Call the model as when the guide was set up."
            )
        found, expected = now.datum_shape(plate), site.datum_shape(plate)
        same = now.unconstrained_shape == site.unconstrained_shape or bool(now.inner_plates)
        if not same or len(found) != len(expected):  # steps and inner plates may be longer
            raise ValueError(
                f"Local site {site.name!r} has shape {found} for each datum of plate "
                f"{plate.name!r}; the guide was set up with {expected}. Use a new guide for data "
                "of another shape."
            )
        return now

    def inputs(self, read: Callable[..., Any] | None) -> Any:
        """Return what the encoder reads: arrays with a row for each datum of this run.

        Args:
            read: a function of the model's arguments; None reads what is observed of the local
                plate's data, also where other plates subsample it: an array, or `Masked` values
                where the model masks them, or `Segments` if it lies in another plate; a dict by
                site name if there are several. `WithCovariates` reads this too.

        Raises:
            ValueError: if nothing is observed, or ``read`` returns another number of rows.
        """
        if read is not None:
            try:
                found = call_with(read, self.reader.model, self.args, self.kwargs)
            except Exception as error:  # of any kind, as the user's own code raises it
                if not any(self.whole.sites.observed(self.plate.name)):
                    error.add_note(UNOBSERVED)
                raise
            found = jax.tree.map(self._select_rows, found, is_leaf=_is_segments)
            return (self.inputs(None), found) if isinstance(read, WithCovariates) else found
        rows = {
            site.name: self._observed(site, self.plate)
            for site in self.whole.sites.observed(self.plate.name)
        }
        rows |= {name: self._segments(name) for name in self.groups}
        if not rows:
            raise ValueError(
                f"Nothing is observed in plate {self.plate.name!r}, so there is nothing to encode. "
                "Call the model with its data, say with inputs= what the encoder reads, or with "
                "segments= which other plate holds its data."
            )
        return rows if len(rows) > 1 else next(iter(rows.values()))

    def _observed(self, site: Site, plate: Plate) -> Any:
        """Return a site's values, a row for each datum of a plate."""
        values = site.rows(self.whole.values[site.name], plate)
        mask = self.whole.masks.get(site.name)
        if mask is None:
            return values
        rows = jnp.moveaxis(mask, site.axis(plate), 0)
        return Masked(values, rows)

    def _segments(self, name: str) -> Segments:
        """Return what is observed in another plate, by the datum that it belongs to."""
        plate = self.sites.plates[name]
        values = {
            site.name: self._observed(site, plate)
            for site in self.sites.observed(name)
            if self.plate.name not in site.plates
        }
        return Segments(values, self.groups[name], self.plate.length)

    def _select_rows(self, x: Any) -> Any:
        size, length = self.plate.size, self.plate.length
        if isinstance(x, Segments):
            return self._check_segments(x)
        x = jnp.asarray(x)
        if x.ndim and x.shape[0] == length:
            return x
        if x.ndim and x.shape[0] == size:
            return x[self.indices]
        raise ValueError(
            f"inputs= returned an array of shape {x.shape}; plate {self.plate.name!r} has "
            f"{length} of {size} rows in this run. Return either number along axis 0."
        )

    def _check_segments(self, segments: Segments) -> Segments:
        if segments.num_segments != self.plate.length:
            raise ValueError(
                f"inputs= returned {segments.num_segments} segments; plate {self.plate.name!r} has "
                f"{self.plate.length} of {self.plate.size} rows in this run. Segments need a group "
                "for each of the plate's rows, and all rows at once."
            )
        return segments


def _is_segments(x: Any) -> bool:
    return isinstance(x, Segments)


def run_model(
    reader: ModelReader, plate: str, groups: Groups, args: tuple, kwargs: dict[str, Any]
) -> Run:
    """Read a model as the enclosing handlers let it run; they see its plates and nothing else.

    Under ``jit`` what is not read, such as the likelihood's network, is never computed.

    Args:
        reader: of the model.
        plate: the local plate's name.
        groups: by the name of another plate, a function from the model's arguments to the datum
            that each row of that plate belongs to.
        args: the model's arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: if the model has no site in one of the plates this time, or a group is not one
            of the local plate's rows.
    """
    reading, whole = _with_rows(reader, plate, groups, args, kwargs)
    plates = reading.sites.plates
    for name in (plate, *groups):
        if name not in plates:
            raise ValueError(
                f"The model has no site in plate {name!r} in this call, found plates "
                f"{sorted(plates)}. Call the model as when the guide was set up."
            )
    found = {
        name: _ids(call_with(read, reader.model, args, kwargs), plates[name], plates[plate])
        for name, read in groups.items()
    }
    return Run(plates[plate], reading, whole, found, args, kwargs, reader)


def _with_rows(
    reader: ModelReader, local: str, groups: Groups, args: tuple, kwargs: dict[str, Any]
) -> tuple[Reading, Reading]:
    """Read a model whose plates hold the rows that the enclosing handlers give them.

    It is read again where a handler gives a plate other rows than it has by itself. Those of the
    local plate are asked for first, as the model may not run with another number of them. The
    second result has all rows of other plates by which the model subsamples what is in the local
    one.
    """
    given = given_rows(local)
    reading, rows = reader.read(args, kwargs, given), dict(given)
    sizes = {name: size for name, (size, _) in given.items()}
    for name in reading.indices.keys() - given.keys():
        plate = reading.sites.plates.get(name)
        if plate is None:  # it holds no site
            continue
        sizes[name], indices, is_given = declare_plate(name, plate.size, plate.length)
        if is_given:
            rows[name] = (sizes[name], indices)
    reading = reader.read(args, kwargs, rows) if rows != given else reading
    cut = _cut(reading.sites, local) - groups.keys()
    every = {name: (sizes[name], jnp.arange(sizes[name])) for name in cut}
    seen = sizes.keys() & reading.indices.keys()
    held = {name: (sizes[name], reading.indices[name]) for name in seen}
    whole = reader.read(args, kwargs, held | every) if cut else reading
    return reading.with_sizes(sizes), whole.with_sizes(sizes)


def _cut(sites: ModelSites, local: str) -> set[str]:
    """Return the plates by whose rows a model takes parts of the local plate's sites."""
    short = {name for name, plate in sites.plates.items() if plate.length < plate.size} - {local}
    reads = (sites.reads.values.get(site.name, ()) for site in sites.observed(local))
    holds = (site.plates for site in sites.latent() if local in site.plates)
    return short & set().union(*reads, *holds)


def _ids(ids: Any, elements: Plate, plate: Plate) -> Array:
    """Check which datum each row of another plate belongs to."""
    ids = jnp.asarray(ids)
    if ids.shape != (elements.length,):
        raise ValueError(
            f"segments= gives plate {elements.name!r} ids of shape {ids.shape}, expected "
            f"({elements.length},): for each of its rows the row of plate {plate.name!r} that it "
            "belongs to."
        )
    if plate.length < plate.size:
        raise ValueError(
            f"Plate {plate.name!r} subsamples {plate.length} of {plate.size} rows, and segments= "
            "needs all of them at once. Remove its subsample_size."
        )
    return Segments(ids, ids, plate.length).ids
