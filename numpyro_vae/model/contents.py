"""What a model holds on given arguments, its latents apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Int
from numpyro.distributions import constraints

from numpyro_vae.data.arrays import is_array
from numpyro_vae.model.sites import ModelSites, Plate, Reads, Site
from numpyro_vae.model.supports import outside_support
from numpyro_vae.model.trace import counts, sites_of_trace
from numpyro_vae.numpyro_internals import declared_scale

Values = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Param:
    """A parameter as the model declares it: its first value, its constraint, and the rest."""

    value: Any
    constraint: Any
    kwargs: tuple[tuple[str, Any], ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "indices",
        "values",
        "masks",
        "scales",
        "supports",
        "outside",
        "choices",
        "params",
    ),
    meta_fields=("sites", "fixed_supports", "has_state"),
)
@dataclass(frozen=True, eq=False)
class Reading:
    """What a model holds on given arguments; a pytree of arrays, the rest static.

    Attributes:
        indices: by plate the rows that it holds. A plate inside a ``scan`` is not seen.
        values: by observed site its values.
        masks: by site the mask of its distribution, where it has one.
        scales: by site the factor of its log-density, where the model has one.
        supports: by latent site its support, where it is made of values.
        outside: by observed site where its values are outside their support, if that can be.
        choices: by enumerated site the values that it can take.
        params: by name the parameters that the model declares.
        sites: its sites and plates.
        fixed_supports: by latent site its support, where it is made of none.
        has_state: whether the model has mutable state.
    """

    indices: dict[str, Any]  # unchecked, as JAX puts what it likes into the place of arrays
    values: dict[str, Any]
    masks: dict[str, Any]
    scales: dict[str, Any]
    supports: dict[str, Any]
    outside: dict[str, Any]
    choices: dict[str, Any]
    params: dict[str, Any]
    sites: ModelSites
    fixed_supports: Fixed
    has_state: bool

    def support(self, name: str) -> Any:
        """Return the support of a latent site."""
        return self.supports[name] if name in self.supports else self.fixed_supports.value[name]

    def rows(self, plate: Plate) -> Int[Array, "rows"]:
        """Return the rows that a plate holds: all of them if it stands in a ``scan``."""
        return self.indices[plate.name] if plate.name in self.indices else jnp.arange(plate.length)

    def with_reads(self, reads: Reads) -> Reading:
        """Return the reading with what is known of what reads what."""
        return replace(self, sites=replace(self.sites, reads=reads))

    def with_sizes(self, sizes: Mapping[str, int]) -> Reading:
        """Return the reading with other sizes of plates; the rows that they hold are the same."""
        plates = {
            name: replace(plate, size=sizes.get(name, plate.size))
            for name, plate in self.sites.plates.items()
        }
        return replace(self, sites=replace(self.sites, plates=plates))


@dataclass(frozen=True, eq=False)
class Fixed:
    """Holds what cannot be hashed, in the static part of a pytree."""

    value: Any


def reading_of(trace: dict[str, Any]) -> Reading:
    """Return what a trace holds of a model beside its latents."""
    sites = sites_of_trace(trace)
    latent = [site.name for site in sites.latent() if not site.is_discrete]
    supports = {name: trace[name]["fn"].support for name in latent}
    computed = {name: support for name, support in supports.items() if jax.tree.leaves(support)}
    masks = {name: counts(trace, name) for name in sites.sites}
    scales = {name: declared_scale(trace[name]) for name in sites.sites}
    seen = [name for name, site in sites.sites.items() if site.is_observed]
    seen = [name for name in seen if trace[name]["value"] is not None]
    outside = {name: outside_support(trace[name]) for name in seen}
    return Reading(
        indices={name: msg["value"] for name, msg in _of_type(trace, "plate")},
        values={name: jnp.asarray(trace[name]["value"]) for name in seen},
        masks={name: mask for name, mask in masks.items() if mask is not None},
        scales={name: scale for name, scale in scales.items() if scale is not None},
        supports=computed,
        outside={name: found for name, found in outside.items() if found is not None},
        choices={
            site.name: _choices(site, trace[site.name]["fn"])
            for site in sites.sites.values()
            if site.is_enumerated
        },
        params={name: _param(msg) for name, msg in _of_type(trace, "param")},
        sites=sites,
        fixed_supports=Fixed({name: x for name, x in supports.items() if name not in computed}),
        has_state=any(True for _ in _of_type(trace, "mutable")),
    )


def _choices(site: Site, fn: dist.Distribution) -> Array:
    """Return the values of an enumerated site."""
    if not fn.has_enumerate_support:
        raise ValueError(
            f"Site {site.name!r} in the plates {list(site.plates)} is marked for enumeration, and "
            "its distribution has no finite number of values to sum over. Marginalize it in the "
            "model, or take a distribution of finitely many values, such as Categorical."
        )
    return fn.enumerate_support(expand=False)


def values_of(trace: dict[str, Any]) -> Values:
    """Return the values of which `Reads` says, field by field, what they come from."""
    sites = [(name, msg) for name, msg in _of_type(trace, "sample") if msg["fn"] is not None]
    observed = {name: msg for name, msg in sites if msg["is_observed"]}
    latent = {name: msg["fn"] for name, msg in sites if not msg["is_observed"]}
    return (
        {name: msg["value"] for name, msg in observed.items()},
        {name: _log_prob_inputs(msg) for name, msg in observed.items()},
        {name: jax.tree.leaves(fn.support) for name, fn in latent.items()},
        {name: jax.tree.leaves(msg["value"]) for name, msg in _of_type(trace, "mutable")},
        _densities(dict(sites)),
        {name: jax.tree.leaves(msg["fn"].support) for name, msg in observed.items()},
        {name: msg["value"] for name, msg in _of_type(trace, "deterministic")},
    )


def _log_prob_inputs(msg: dict[str, Any]) -> list[Any]:
    """Return what the log-density of an observed site is computed from, but its value."""
    leaves = jax.tree.leaves(msg["fn"])
    return leaves if all(map(is_array, leaves)) else [msg["fn"].log_prob(msg["value"])]


def _densities(sites: dict[str, Any]) -> dict[str, Any]:
    """Return the log-densities of sites and their factors, if there are values to sum over."""
    if not any(msg["infer"].get("enumerate") for msg in sites.values()):
        return {}
    known = {name: msg for name, msg in sites.items() if msg["value"] is not None}
    return {
        name: [msg["fn"].log_prob(msg["value"]), *jax.tree.leaves(msg["scale"])]
        for name, msg in known.items()
    }


def _of_type(trace: dict[str, Any], kind: str) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((name, msg) for name, msg in trace.items() if msg["type"] == kind)


def _param(msg: dict[str, Any]) -> Param:
    kwargs = dict(msg["kwargs"])
    constraint = kwargs.pop("constraint", constraints.real)
    return Param(msg["value"], constraint, tuple(sorted(kwargs.items())))


jax.tree_util.register_dataclass(Param, ("value", "constraint"), ("kwargs",))
