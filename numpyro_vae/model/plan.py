"""What a guide has to serve: the local sites in the order of sampling, and the global ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import jax
from numpyro import handlers
from numpyro.infer.inspect import get_dependencies
from numpyro.ops.provenance import eval_provenance

from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.sites import ModelSites, Plate, Site, choose_plate
from numpyro_vae.model.trace import trace_model


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
    """

    sites: ModelSites
    plate: Plate
    local: tuple[Site, ...]
    globals: tuple[str, ...]
    bounds: tuple[Any, ...] = ()


def plan_guide(
    reader: ModelReader,
    args: tuple,
    kwargs: dict[str, Any],
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
        plate: the local plate's name, or None to choose it.
        condition_on: global sites that heads read.
        dependencies: by local site, local sites that its head reads.

    Raises:
        ValueError: if there is no such plate, a local site is discrete and not enumerated, the
            support of one depends on other values, or a site that is to be read does not exist or
            not in time.
    """
    sites = reader.sites(args, kwargs)
    local_plate = choose_plate(sites, plate)
    for site in sites.local(local_plate.name):
        _check_continuous(site, local_plate)
    _check_supports(reader, sites, local_plate, args, kwargs)
    local = _in_order(sites.local(local_plate.name), dependencies, local_plate)
    globals_ = tuple(site.name for site in sites.globals(local_plate.name))
    wrong = [name for name in condition_on if name not in globals_]
    if wrong:
        raise ValueError(
            f"condition_on= names {wrong}; the latent sites outside plate {local_plate.name!r} are "
            f"{list(globals_)}. Name these; local sites go into dependencies=."
        )
    bounds = reader.bounds(args, kwargs, globals_)
    return GuidePlan(sites, local_plate, local, globals_, bounds)


def check_observed(
    model: Callable[..., Any],
    sites: ModelSites,
    plate: Plate,
    groups: Collection[str],
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Raise if an observation depends on local sites, and nothing says on which datum's.

    Args:
        model: a NumPyro model.
        sites: what it holds.
        plate: the local plate.
        groups: the names of the plates whose rows are known to belong to data.
        args: the model's arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: naming the observed site, its plates, and the local sites.
    """
    known = {plate.name, *groups}
    apart = [s for s in sites.sites.values() if s.is_observed and not known & set(s.plates)]
    if not apart:
        return
    local = {s.name for s in sites.sites.values() if not s.is_observed and plate.name in s.plates}
    with handlers.block(), handlers.seed(rng_seed=0):
        found: Any = get_dependencies(model, args, kwargs)
    reads = found["prior_dependencies"]
    for site in apart:
        if local & set(reads[site.name]):
            raise ValueError(
                f"The observed site {site.name!r} lies in the plates {list(site.plates)} and "
                f"depends on the local sites {sorted(local & set(reads[site.name]))} of plate "
                f"{plate.name!r}, so it is unknown which datum it belongs to. Say so with "
                "segments={plate: function of the model's arguments that returns a row of "
                f"{plate.name!r} for each of that plate's rows}}."
            )


def _check_continuous(site: Site, plate: Plate) -> None:
    if site.is_discrete:
        raise ValueError(
            f"Site {site.name!r} in plate {plate.name!r} is discrete, and neither observed nor "
            "enumerated; a guide needs continuous latents. Mark it with "
            'infer={"enumerate": "parallel"}, or wrap the model in '
            "numpyro.contrib.funsor.config_enumerate for SVI and guide alike, and train with "
            "TraceEnum_ELBO."
        )


def _check_supports(
    reader: ModelReader, sites: ModelSites, plate: Plate, args: tuple, kwargs: dict
) -> None:
    """Raise if the support of a local site depends on what is sampled or learned."""
    local = [site.name for site in sites.local(plate.name)]
    if not set(local) & set(reader.supports(args, kwargs)):
        return
    found: dict[str, Any] = {}

    def supports(**values: Any) -> dict[str, Any]:
        """Trace the model, and return the bounds of the local sites, given values of all sites."""
        given = handlers.substitute(reader.model, data=values)
        trace = trace_model(given, args, kwargs, jax.random.key(0), {})
        found.update(
            {
                name: jax.eval_shape(lambda msg=msg: msg["value"])
                for name, msg in trace.items()
                if msg["type"] == "param" or (msg["type"] == "sample" and not msg["is_observed"])
            }
        )
        return {name: jax.tree.leaves(trace[name]["fn"].support) for name in local}

    jax.eval_shape(supports)
    for name, reads in eval_provenance(supports, **found).items():
        moving = sorted(frozenset().union(*reads))
        if moving:
            raise ValueError(
                f"The support of site {name!r} in plate {plate.name!r} depends on {moving}; that "
                "of a guide's site is fixed. Write the prior as a TransformedDistribution of one "
                "with a fixed support, and wrap the model in numpyro.handlers.reparam with "
                f"config={{{name!r}: TransformReparam()}}."
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
