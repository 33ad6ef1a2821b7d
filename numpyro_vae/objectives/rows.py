"""Which rows have importance weights of their own, and log densities by row."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.distributions.util import scale_and_mask

from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.model.densities import log_prob_of
from numpyro_vae.model.trace import is_point
from numpyro_vae.numpyro_internals import declared_scale, dependencies
from numpyro_vae.objectives.traces import (
    Call,
    Site,
    Trace,
    latents,
    samples,
    scaled_log_prob,
    total,
    values_of,
)


class Rows(NamedTuple):
    """The plates whose rows have importance weights of their own.

    Attributes:
        plates: their names; none if all sites together have one weight.
        dims: their axes in a log density.
    """

    plates: frozenset[str] = frozenset()
    dims: frozenset[int] = frozenset()

    def hold(self, site: Site) -> bool:
        """Return whether a site is inside all of these plates."""
        return self.plates <= {frame.name for frame in site["cond_indep_stack"]}

    def sum(self, log_prob: Array) -> Array:
        """Sum a log density over all axes but those of the rows, which stay where they are."""
        axes = tuple(axis for axis in range(-jnp.ndim(log_prob), 0) if axis not in self.dims)
        return jnp.sum(log_prob, axes, keepdims=True)


def amortized(guide: Any) -> AmortizedGuide | None:
    """Return the amortized guide inside the handlers that wrap it; None if it is no such guide."""
    while not isinstance(guide, AmortizedGuide) and hasattr(guide, "fn"):
        guide = guide.fn
    return guide if isinstance(guide, AmortizedGuide) else None


def plate_of(guide: Any) -> str | None:
    """Return the local plate of an amortized guide, whatever handlers wrap it, if it is one."""
    found = amortized(guide)
    if found is None:
        return None
    return found.plate.name if found.prototype_trace is not None else found.plate_name


def simulated_plates(guide: Any, model_trace: Trace) -> tuple[str, ...] | None:
    """Return the plates whose observed sites a simulation draws, as others are given.

    They are those of an amortized guide, of other guides all that the model has. None if it has
    none, and all is drawn.
    """
    found = amortized(guide)
    if found is not None:
        return (found.plate.name, *found.segments)
    stacks = (site["cond_indep_stack"] for site in samples(model_trace).values())
    return tuple({frame.name for stack in stacks for frame in stack}) or None


def find_rows(
    call: Call, key: Array, plate: str | None, *, shares_globals: bool
) -> tuple[Rows, dict[str, int]]:
    """Return which rows have weights of their own, and the latents in them; nothing is computed.

    Args:
        call: model and guide.
        key: for any run of them.
        plate: the plate of the local sites; None if these are the sites in any plate.
        shares_globals: whether latents outside the rows may have one value for all particles;
            if not, models that have such get one weight for all sites together.

    Returns:
        The rows, and by latent of the guide inside them the number of its event dimensions.

    Raises:
        ValueError: if a plate inside a row subsamples, as the logarithm of an estimate is biased.
    """
    guide_trace, model_trace = _abstract_traces(call, key)
    plate = plate or plate_of(call.guide)  # which may have been read only now
    rows = _common(model_trace, plate)
    outside = {
        name: site
        for trace in (guide_trace, model_trace)
        for name, site in samples(trace).items()
        if not rows.hold(site)
    }
    local = {k: v for k, v in latents(guide_trace).items() if rows.hold(v)}
    shares = shares_globals or all(site["is_observed"] for site in outside.values())
    if not shares or (outside and _depend(call, key, outside, local)):
        rows = Rows()
    _require_whole_plates(model_trace, rows)
    inside = {name: site for name, site in latents(guide_trace).items() if rows.hold(site)}
    return rows, {name: site["fn"].event_dim for name, site in inside.items()}


def _abstract_traces(call: Call, key: Array) -> tuple[Trace, Trace]:
    """Return traces of guide and model that have names, plates and distributions, but no values."""
    found: list[Trace] = []

    def run(key: Array) -> Any:
        guide_trace = call.trace_guide(key)
        model_trace = call.trace_model(guide_trace, key)
        found.extend((guide_trace, model_trace))
        return values_of(latents(guide_trace))

    shapes = jax.eval_shape(run, key)
    guide_trace, model_trace = found
    for name, shape in shapes.items():
        guide_trace[name] = {**guide_trace[name], "value": shape}
    return guide_trace, model_trace


def _common(model_trace: Trace, plate: str | None) -> Rows:
    """Return the plates that all local sites share."""
    stacks = [
        {frame.name: frame for frame in site["cond_indep_stack"]}
        for site in samples(model_trace).values()
    ]
    if plate is not None and not any(plate in stack for stack in stacks):
        names = sorted({name for stack in stacks for name in stack})
        raise ValueError(
            f"No site of the model is in plate {plate!r}; its sites are in the plates {names}. "
            "Pass one of these as plate=."
        )
    local = [stack for stack in stacks if (plate in stack if plate else stack)]
    shared = set.intersection(*map(set, local)) if local else set()
    return Rows(frozenset(shared), frozenset(local[0][name].dim for name in shared))


def _depend(call: Call, key: Array, outside: Trace, local: Trace) -> bool:
    """Return whether the density of a site outside the rows depends on latents inside them."""

    def densities(**values: Array) -> dict[str, Array]:
        guide_trace = call.trace_guide(key, values)
        traces = (guide_trace, call.trace_model(guide_trace, key))
        return {
            f"{name} {number}": log_prob_of(trace[name])
            for number, trace in enumerate(traces)
            for name in outside
            if name in trace
        }

    return any(dependencies(densities, values_of(local)).values())


def _require_whole_plates(model_trace: Trace, rows: Rows) -> None:
    for name, site in samples(model_trace).items():
        for frame in site["cond_indep_stack"] if rows.hold(site) else ():
            plate = model_trace.get(frame.name)
            if frame.name in rows.plates or plate is None or plate["args"][0] <= frame.size:
                continue
            where = f"the rows of {sorted(rows.plates)} have" if rows.plates else "all sites share"
            raise ValueError(
                f"Plate {frame.name!r} of site {name!r} holds {frame.size} of {plate['args'][0]} "
                f"rows, but {where} one importance weight, and the logarithm of an estimate is "
                "biased. Let this plate hold all its rows (in fit: batch_size=), name with plate= "
                "the plate whose rows have weights of their own, or train with an objective that "
                "has no weights, such as TraceMeanField_ELBO."
            )


# -- log densities by row --------------------------------------------------------------------------


class Densities(NamedTuple):
    """Log densities of one particle, or of several along a leading axis.

    Attributes:
        model: of latent and observed sites in the rows, ``(*rows,)``.
        guide: of the latents in the rows, likewise.
        shared: of all outside the rows, the model's minus the guide's, a scalar.
        scale: what a row counts in the objective, of a shape that broadcasts with ``(*rows,)``.
    """

    model: Any
    guide: Any
    shared: Any
    scale: Any

    @property
    def log_weights(self) -> Array:
        """The log importance weights, ``(num_particles, *rows)``."""
        return self.model - self.guide

    def loss(self, by_row: Array) -> Array:
        """Return minus the sum of rows as they count, and of what is outside of them."""
        return -(self.scale[0] * by_row).sum() - self.shared.mean()


def densities_of(rows: Rows, guide_trace: Trace, model_trace: Trace) -> Densities:
    """Return the log densities of one particle."""
    parts: dict[str, list[Array]] = {"model": [], "guide": []}
    shared = []
    sites = {
        "model": list(samples(model_trace).values()),
        "guide": [_at_own_point(site) for site in samples(guide_trace).values()],
    }
    for part, sign in (("model", 1.0), ("guide", -1.0)):
        for site in sites[part]:
            if rows.hold(site):
                parts[part].append(rows.sum(_inner_log_prob(site, rows)))
            else:
                shared.append(sign * scaled_log_prob(site).sum())
    first = next(filter(rows.hold, sites["model"]), None)
    model, guide = (total(found) for found in parts.values())
    return Densities(model, guide, total(shared), _row_scale(first, rows))


def _at_own_point(site: Site) -> Site:
    """Return a site that is a point at just that point: its value may be rounded otherwise."""
    if site["is_observed"] or not is_point(site["fn"]):
        return site
    return {**site, "value": site["fn"].sample(jax.random.key(0)), "intermediates": []}


def _inner_log_prob(site: Site, rows: Rows) -> Array:
    """Return a log density with all scales but those that a row has as a whole."""
    scale = declared_scale(site) if rows.plates else site["scale"]
    return scale_and_mask(log_prob_of(site), scale)


def _row_scale(site: Site | None, rows: Rows) -> Array:
    """Return what a row counts: as its plates subsample, and as `minibatch` weighs it."""
    if site is None or site["scale"] is None or not rows.plates:
        return jnp.ones(())
    declared = declared_scale(site)
    return jnp.asarray(site["scale"] if declared is None else site["scale"] / declared)
