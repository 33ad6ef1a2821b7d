"""What a model holds: its latent and observed sites, their plates, shapes and supports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclass(frozen=True)
class Plate:
    """A plate as the model declares it: ``size`` data in all, of which a run holds ``length``.

    It ``is_short`` where the model would subsample more than there are.
    """

    name: str
    size: int
    length: int
    dim: int
    is_short: bool = field(default=False, repr=False, compare=False)


@dataclass(frozen=True)
class Site:
    """A sample site: its shapes, and the names of the plates around it.

    ``event_shape`` is the site's own, ``unconstrained_shape`` that of the values which
    ``biject_to(support)`` maps to it; the two are the same for a site that is not to be inferred.
    An ``is_broadcast`` site observes values of another event shape than its distribution's.
    ``is_enumerated`` marks a latent site that the objective sums over, not the guide; of an
    ``is_improper`` one nothing can be drawn, and of an ``is_censored`` one what is drawn is not
    censored as its values are. ``inner_plates`` are those of a model of one data set,
    whose axes lead the event, see `numpyro_vae.model.data_sets`.
    Values of an ``is_bounded`` one lie between two bounds, each by itself.
    """

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    plates: tuple[str, ...]
    is_observed: bool
    is_discrete: bool
    is_enumerated: bool
    is_improper: bool
    is_broadcast: bool = False
    is_censored: bool = False
    inner_plates: tuple[str, ...] = ()
    is_bounded: bool = False

    @property
    def size(self) -> int:
        """How many unconstrained values the site has in all."""
        return math.prod(self.batch_shape + self.unconstrained_shape)

    def axis(self, plate: Plate) -> int:
        """Return the plate's axis in ``batch_shape``, counted from the left."""
        return len(self.batch_shape) + plate.dim

    def datum_shape(self, plate: Plate) -> tuple[int, ...]:
        """Return the shape of the unconstrained values that belong to one datum of the plate."""
        axis = self.axis(plate)
        return self.batch_shape[:axis] + self.batch_shape[axis + 1 :] + self.unconstrained_shape

    def datum_size(self, plate: Plate) -> int:
        """Return how many unconstrained values belong to one datum of the plate."""
        return math.prod(self.datum_shape(plate))

    def unpack(
        self, packed: Shaped[Array, "*lead batch size"], plate: Plate
    ) -> Shaped[Array, "..."]:
        """Shape packed values, a row a datum, as the site's unconstrained value.

        Args:
            packed: ``(*lead, batch, datum_size)``.
            plate: the local plate.

        Returns:
            ``(*lead, *batch_shape, *unconstrained_shape)`` with ``batch`` at the plate's axis.
        """
        lead = packed.ndim - 2
        value = packed.reshape(*packed.shape[:-1], *self.datum_shape(plate))
        return jnp.moveaxis(value, lead, lead + self.axis(plate))

    def flat_rows(self, value: Any, plate: Plate) -> Shaped[Array, "batch datum_size"]:
        """Return an unconstrained value of the site, or a mask of it, flat by datum."""
        rows = jnp.moveaxis(value, self.axis(plate), 0)
        return rows.reshape(rows.shape[0], -1)

    def rows(self, value: Any, plate: Plate) -> Shaped[Array, "batch ..."]:
        """Return the site's value with the plate's axis in front: a row a datum."""
        shape = jnp.broadcast_shapes(self.batch_shape + self.event_shape, jnp.shape(value))
        return jnp.moveaxis(jnp.broadcast_to(value, shape), plate.dim - len(self.event_shape), 0)


@dataclass(frozen=True)
class Reads:
    """From which latent sites and parameters the values in a model are computed.

    Attributes:
        values: by observed site, what its value is computed from; of data, nothing.
        distributions: by observed site, what its distribution is made of.
        supports: by latent site, what its support is made of.
        states: by the name of a network's state, what a run of the model makes it of; nothing if
            the run leaves it as it was.
        densities: by any site of a model with enumerated ones, what its log-density is made of.
        bounds: by observed site, what its support is made of.
        deterministic: by deterministic site, what its value is computed from.
    """

    values: dict[str, Any] = field(default_factory=dict)
    distributions: dict[str, Any] = field(default_factory=dict)
    supports: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    densities: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, Any] = field(default_factory=dict)
    deterministic: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSites:
    """What a model holds: sites by name, in the order they are met, and plates by name.

    ``deterministic`` has the names of the plates around each deterministic site, and ``reads``
    what the values of sites are computed from.
    """

    sites: dict[str, Site]
    plates: dict[str, Plate]
    deterministic: dict[str, tuple[str, ...]]
    reads: Reads = field(default_factory=Reads)

    def __hash__(self) -> int:
        """Return a hash, so that compiled functions can depend on what a model holds."""
        return hash((*self.sites.values(), *self.plates.values(), *self.deterministic.items()))

    def latent(self) -> list[Site]:
        """Return the sites that a guide samples."""
        hidden = [site for site in self.sites.values() if not site.is_observed]
        return [site for site in hidden if not site.is_enumerated]

    def enumerated(self, plate: str) -> list[Site]:
        """Return the sites inside the plate that the objective sums over."""
        return [s for s in self.sites.values() if s.is_enumerated and plate in s.plates]

    def is_stacked(self, name: str) -> bool:
        """Return whether ``scan`` has put axes of steps in front of those of a site's plates."""
        site = self.sites[name]
        outermost = max((-self.plates[plate].dim for plate in site.plates), default=0)
        return len(site.batch_shape) > outermost

    def local(self, plate: str) -> list[Site]:
        """Return the latent sites inside the plate."""
        return [site for site in self.latent() if plate in site.plates]

    def globals(self, plate: str) -> list[Site]:
        """Return the latent sites outside the plate."""
        return [site for site in self.latent() if plate not in site.plates]

    def observed(self, plate: str) -> list[Site]:
        """Return the sites inside the plate that observe data.

        Of a ``numpyro.factor`` nothing is seen, and what is computed from latents is no data.
        """
        seen = [site for site in self.sites.values() if site.is_observed and site.size]
        return [site for site in seen if plate in site.plates and not self.is_computed(site.name)]

    def is_computed(self, name: str) -> bool:
        """Return whether the value of an observed site is computed from latent sites."""
        return bool(self.reads.values.get(name, frozenset()) & {s.name for s in self.latent()})


class PlateError(ValueError):
    """A model has no plate, or several, that could be the local one."""


def choose_plate(sites: ModelSites, plate: str | None) -> Plate:
    """Return the local plate: the one named, else the one that subsamples, else the only one.

    Args:
        sites: what `read_model` found.
        plate: the plate's name, or None to choose among those that hold latent sites.

    Raises:
        PlateError: if the named plate holds no latent site, no plate does, or several do.
    """
    hidden = [s for s in sites.sites.values() if not s.is_observed]
    candidates = {name: sites.plates[name] for s in hidden for name in s.plates}
    if plate is not None:
        if plate not in candidates:
            raise PlateError(
                f"No latent site lies in a plate named {plate!r}. "
                f"Plates with latent sites: {sorted(candidates) or 'none'}. Name one of them."
            )
        return candidates[plate]
    if not candidates:
        raise PlateError(
            f"No latent site lies in a plate: the model has latent sites "
            f"{[s.name for s in hidden]} and plates {sorted(sites.plates)}. An amortized "
            "guide needs latents of each datum: put numpyro.plate around them."
        )
    subsampled = {name: p for name, p in candidates.items() if p.length < p.size}
    remaining = subsampled or candidates
    if len(remaining) > 1:
        held = {name: [s.name for s in hidden if name in s.plates] for name in remaining}
        raise PlateError(
            f"Several plates hold latent sites: {held}. Say which one has a datum for each of "
            f"its entries, for instance plate={next(iter(remaining))!r}."
        )
    return next(iter(remaining.values()))
