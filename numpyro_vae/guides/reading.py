"""What a guide that is not ours says in its trace: its sites, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.data.arrays import Layout
from numpyro_vae.model.plates import all_rows
from numpyro_vae.model.provenance import PREFIX, sources
from numpyro_vae.model.trace import Rows, is_point, own_trace, trace_model
from numpyro_vae.numpyro_internals import evaluation

DATA = "/data"  # no site, parameter or plate has this name


class MissingParamsError(ValueError):
    """A guide asks for parameters that are not given."""


@dataclass(frozen=True)
class GuideSite:
    """A site of a guide.

    Attributes:
        plates: the names of those around it.
        reads: the names of sites, parameters and plates that its distribution is computed from,
            ``DATA`` if it is computed from the model's arguments, and ``LOOKED_UP`` with the name
            of a parameter in which rows are looked up.
        is_auxiliary: whether the model has no such site.
        is_point: whether its distribution is a point.
        shape: of its value.
    """

    plates: tuple[str, ...]
    reads: frozenset[str]
    is_auxiliary: bool
    is_point: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GuideReading:
    """What a guide holds on given arguments.

    Attributes:
        sites: by name.
        params: the shapes of its parameters that are arrays.
        plates: the sizes of its plates, as it declares them or is told.
    """

    sites: dict[str, GuideSite]
    params: dict[str, tuple[int, ...]]
    plates: dict[str, int]

    def is_point(self, name: str) -> bool:
        """Return whether a site is a point, and not a function of an auxiliary one."""
        origins = self.origins(name) & self.sites.keys()
        return self.sites[name].is_point and not any(self.sites[x].is_auxiliary for x in origins)

    def origins(self, name: str) -> frozenset[str]:
        """Return all that a site is computed from, the sites that it reads included."""
        found: set[str] = set()
        left = [name]
        while left:
            reads = self.sites[left.pop()].reads - found
            found |= reads
            left += reads & self.sites.keys()
        return frozenset(found)


def read_guide(
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
    rows: Rows,
) -> GuideReading:
    """Read a guide with trained parameters, without computing anything.

    Args:
        guide: any guide.
        params: its parameters, with the networks' state.
        args: the model's arguments.
        kwargs: its keyword arguments.
        rows: by plate its size and the rows that it is told to hold.

    Raises:
        MissingParamsError: if parameters are missing, of which the guide would make new ones.
    """
    given = handlers.substitute(guide, data=dict(params))
    trace: dict[str, Any] = {}

    arrays, layout = Layout.of(args, kwargs)

    def leaves(rng_key: Array) -> dict[str, list[Any]]:
        args, kwargs = layout.whole([checkpoint_name(x, PREFIX + DATA) for x in arrays])
        trace.update(trace_model(given, args, kwargs, rng_key, rows))
        sites = {name: msg["fn"] for name, msg in trace.items() if msg["type"] == "sample"}
        return {name: jax.tree.leaves(fn) for name, fn in sites.items()}

    jaxpr, shapes = jax.make_jaxpr(leaves, return_shape=True)(jax.random.key(0))
    _require_params(trace, params)
    names = iter(sources(jaxpr, lookups=True))
    reads = {name: _united(next(names) for _ in found) for name, found in shapes.items()}
    sites = {name: _site(trace[name], found) for name, found in reads.items()}
    plates = {name: msg["args"][0] for name, msg in trace.items() if msg["type"] == "plate"}
    return GuideReading(sites, _array_params(trace), plates)


def trace_guide(
    guide: Callable[..., Any],
    values: Mapping[str, Any],
    rows: Rows,
    rng_key: Array,
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the trace of a guide on rows of data.

    Args:
        guide: the guide.
        values: of its parameters and state, and of sites that are not to be drawn.
        rows: by plate its size and the rows that it is told to hold; others hold all.
        rng_key: for what is drawn.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """
    guide = handlers.substitute(guide, data=dict(values))
    with handlers.block(), all_rows(rows=rows), evaluation(), own_trace() as trace:
        handlers.seed(guide, rng_key)(*args, **kwargs)
    return trace


def _site(msg: dict[str, Any], reads: frozenset[str]) -> GuideSite:
    plates = tuple(dict.fromkeys(frame.name for frame in msg["cond_indep_stack"]))
    auxiliary = bool(msg["infer"].get("is_auxiliary")) or msg["is_observed"]
    return GuideSite(plates, reads, auxiliary, is_point(msg["fn"]), jnp.shape(msg["value"]))


def _united(names: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*names)


def _array_params(trace: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    params = {name: msg["value"] for name, msg in trace.items() if msg["type"] == "param"}
    return {name: value.shape for name, value in params.items() if hasattr(value, "shape")}


def _require_params(trace: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Raise ValueError if a guide asks for parameters or state that are not given."""
    kinds = ("param", "mutable")
    missing = [name for name, msg in trace.items() if msg["type"] in kinds and name not in params]
    if missing:
        raise MissingParamsError(
            f"The guide asks for {missing}, and the parameters have {sorted(params)}. Pass what "
            "fit or svi.run returned for this guide; after svi.run, a network's state is in "
            "result.state.mutable_state and is found there."
        )
