"""What a guide has to serve: the local sites in the order of sampling, and the global ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
from jax.core import Tracer

from numpyro_vae.model.provenance import RANDOM
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.sites import ModelSites, Plate, PlateError, Site, choose_plate
from numpyro_vae.model.trace import Rows


@dataclass(frozen=True)
class GuidePlan:
    """A model as its guide divides it.

    Attributes:
        sites: all that the model holds.
        plate: the local plate.
        local: the latent sites in it, each after those that its head reads.
        globals: the names of all other latent sites.
        bounds: what the supports of these are made of, where they are computed: a guide of global
            sites keeps the values that it has seen.
        scaled: the names of the sites that the model scales.
        unlike: the factors of the local sites, where they are not all the same.
    """

    sites: ModelSites
    plate: Plate
    local: tuple[Site, ...]
    globals: tuple[str, ...]
    bounds: tuple[Any, ...] = ()
    scaled: tuple[str, ...] = ()
    unlike: str = ""

    def require_like_scales(self) -> None:
        """Raise ValueError if the model scales the local latents of a datum by unlike factors."""
        if self.unlike:
            raise ValueError(
                f"The model scales its local sites by unlike factors: {self.unlike}. Then there is "
                "no posterior that the ELBO leads to, nor weights, evidence or checks of it. Put "
                "all local sites into one handlers.scale, or scale the likelihood instead; with "
                "AutoAmortizedNormal you can train, encode and sample all the same."
            )


def plan_guide(
    reader: ModelReader,
    args: tuple,
    kwargs: dict[str, Any],
    rows: Rows,
    *,
    plate: str | None,
    condition_on: Sequence[str],
    dependencies: Mapping[str, Sequence[str]],
) -> GuidePlan:
    """Read a model, without computing it, and check what the guide was told about it.

    Args:
        reader: of the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        rows: by plate, the size and the rows that it is to hold.
        plate: the local plate's name, or None to choose it.
        condition_on: global sites that heads read.
        dependencies: by local site, local sites that its head reads.

    Raises:
        ValueError: if there is no such plate, a local site is discrete and not enumerated, the
            support of one depends on other values, or a site that is to be read does not exist or
            not in time.
    """
    reading = reader.abstract(args, kwargs, rows)
    sites = reading.sites
    local_plate = choose_plate(sites, plate)
    for site in sites.local(local_plate.name):
        _check_continuous(site, local_plate)
    _check_supports(sites, local_plate)
    local = _in_order(sites.local(local_plate.name), dependencies, local_plate)
    globals_ = tuple(site.name for site in sites.globals(local_plate.name))
    wrong = [name for name in condition_on if name not in globals_]
    if wrong:
        raise ValueError(
            f"condition_on= names {wrong}; the latent sites outside plate {local_plate.name!r} are "
            f"{list(globals_)}. Name these; local sites go into dependencies=."
        )
    bounds = reader.bounds(args, kwargs, rows, globals_)
    scaled, unlike = tuple(reading.scales), unlike_scales(reader, args, kwargs, rows, local)
    return GuidePlan(sites, local_plate, local, globals_, bounds, scaled, unlike)


def plan_any(
    reader: ModelReader, args: tuple, kwargs: dict[str, Any], rows: Rows, plate: str | None
) -> GuidePlan:
    """Return a model as any guide divides it, which need not have latent sites in a plate.

    Raises:
        ValueError: see `plan_guide`; or if no plate holds anything.
    """
    sites = reader.sites(args, kwargs, rows)
    chosen, latent = choose_any(sites, plate), sites.latent()
    if any(chosen.name in site.plates for site in latent) or plate is not None:
        none: dict[str, Any] = {"condition_on": (), "dependencies": {}}
        return plan_guide(reader, args, kwargs, rows, plate=chosen.name, **none)
    names = tuple(site.name for site in latent)
    return GuidePlan(sites, chosen, (), names, reader.bounds(args, kwargs, rows, names))


def choose_any(sites: ModelSites, plate: str | None) -> Plate:
    """Return the local plate; of a model without latent sites in one, the first with observations.

    Raises:
        PlateError: see `choose_plate`; or if no plate holds observations either.
    """
    latent = sites.latent()
    if plate is not None or not latent or any(site.plates for site in latent):
        return choose_plate(sites, plate)
    seen = [site for site in sites.sites.values() if site.is_observed and site.plates]
    if not seen:
        raise PlateError(
            f"The model has the plates {sorted(sites.plates)}, and none of them holds observations "
            "that could be told apart. Put numpyro.plate around the observed site."
        )
    return sites.plates[seen[0].plates[0]]


def outside(
    sites: ModelSites, plate: Plate, groups: Collection[str]
) -> Iterator[tuple[Site, list[str]]]:
    """Yield the observed sites outside some plates that read local sites, and which they read."""
    local = {site.name for site in (*sites.local(plate.name), *sites.enumerated(plate.name))}
    for site in sites.sites.values():
        reads = local & sites.reads.distributions.get(site.name, frozenset())
        if reads and not {plate.name, *groups} & set(site.plates):
            yield site, sorted(reads)


def check_observed(sites: ModelSites, plate: Plate, groups: Collection[str]) -> None:
    """Raise if an observation depends on local sites, and nothing says on which datum's.

    Args:
        sites: what the model holds.
        plate: the local plate.
        groups: the names of the plates whose rows are known to belong to data.

    Raises:
        ValueError: naming the observed site, its plates, and the local sites.
    """
    for site, reads in outside(sites, plate, groups):
        raise ValueError(
            f"The observed site {site.name!r} lies in the plates {list(site.plates)} and depends "
            f"on the local sites {reads} of plate {plate.name!r}, so it is unknown which "
            "datum it belongs to. Say so with segments={plate: function of the model's arguments "
            f"that returns a row of {plate.name!r} for each of that plate's rows}}."
        )


def _check_continuous(site: Site, plate: Plate) -> None:
    if site.is_discrete:
        raise ValueError(
            f"Site {site.name!r} in plate {plate.name!r} is discrete, and neither observed nor "
            "enumerated; a guide needs continuous latents. Mark it with "
            'infer={"enumerate": "parallel"}, or wrap the model in '
            "numpyro.contrib.funsor.config_enumerate for SVI and guide alike, and train with "
            "TraceEnum_ELBO. One with infinitely many values cannot be summed over: marginalize it "
            "in the model."
        )


def _check_supports(sites: ModelSites, plate: Plate) -> None:
    """Raise if the support of a local site depends on what is sampled or learned."""
    for site in sites.local(plate.name):
        moving = sorted(sites.reads.supports.get(site.name, frozenset()) - {RANDOM, *sites.plates})
        if moving:
            raise ValueError(
                f"The support of site {site.name!r} in plate {plate.name!r} depends on {moving}; "
                "that of a guide's site is fixed. Write the prior as a TransformedDistribution of "
                "one with a fixed support, and wrap the model in numpyro.handlers.reparam with "
                f"config={{{site.name!r}: TransformReparam()}}."
            )


def unlike_scales(
    reader: ModelReader, args: tuple, kwargs: dict[str, Any], rows: Rows, sites: tuple[Site, ...]
) -> str:
    """Return the factors of sites if they differ; those of compiled code are not known."""
    if not set(reader.abstract(args, kwargs, rows).scales) & {site.name for site in sites}:
        return ""
    scales = reader.read(args, kwargs, rows).scales
    found = {site.name: scales.get(site.name, 1.0) for site in sites}
    if any(isinstance(scale, Tracer) for scale in found.values()):
        return ""
    first, *others = (np.unique(np.asarray(scale, np.float32)) for scale in found.values())
    return "" if all(np.array_equal(first, other) for other in others) else str(found)


def why_tempered(
    reader: ModelReader,
    sites: ModelSites,
    plates: Iterable[str],
    args: tuple,
    kwargs: dict[str, Any],
    rows: Rows,
) -> str:
    """Return why latents of simulated data are not of the model's posteriors; empty if they are.

    Args:
        reader: of the model.
        sites: what it holds.
        plates: those whose sites are simulated.
        args: the model's arguments.
        kwargs: its keyword arguments.
        rows: by plate, the size and the rows that it is to hold.
    """
    simulated = tuple(site for site in sites.sites.values() if set(plates) & set(site.plates))
    if not unlike_scales(reader, args, kwargs, rows, simulated):
        return ""
    return (
        "The model scales its observed sites by other factors than its local ones, and the latents "
        "that data are simulated with are not of the posterior that this makes"
    )


def _in_order(
    sites: list[Site], dependencies: Mapping[str, Sequence[str]], plate: Plate
) -> tuple[Site, ...]:
    """Return the local sites, each after those that its head reads."""
    by_name = {site.name: site for site in sites}
    named = {*dependencies, *(name for read in dependencies.values() for name in read)}
    if not named <= set(by_name):
        raise ValueError(
            f"dependencies= names {sorted(named - set(by_name))}; plate {plate.name!r} has the "
            f"local sites {list(by_name)}. Name these; global sites go into condition_on=."
        )
    order = TopologicalSorter({name: dependencies.get(name, ()) for name in by_name})
    try:
        return tuple(by_name[name] for name in order.static_order())
    except CycleError as error:
        raise ValueError(
            f"dependencies= goes in a circle: {' <- '.join(error.args[1])}. A head can read only "
            "sites that are sampled before its own."
        ) from None
