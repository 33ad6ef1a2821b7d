"""Runs a model, and says what its trace holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import SigmoidTransform
from numpyro.primitives import Messenger

from numpyro_vae.model.provenance import named_values
from numpyro_vae.model.sites import ModelSites, Plate, Site
from numpyro_vae.model.stacked import Stacked, StackedConstraint, peeled
from numpyro_vae.numpyro_internals import (
    draw_improper,
    is_improper,
    is_switched_off,
    mask_of_masked,
)

Model = Callable[..., Any]
Rows = dict[str, tuple[int, Any]]  # by plate its size, and the rows that it holds


CENSORED = (
    dist.IntervalCensoredDistribution,
    dist.LeftCensoredDistribution,
    dist.RightCensoredDistribution,
)
# What JAX raises when a model asks for the values of an abstract array.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def trace_model(
    model: Model, args: tuple, kwargs: dict[str, Any], rng_key: Array, rows: Rows
) -> dict[str, Any]:
    """Run a model out of sight of the enclosing handlers, and return its trace.

    No log-density is computed, and a prior that cannot be sampled is drawn from uniformly.

    Args:
        model: a NumPyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        rng_key: what its sites draw from, and its parameters, as under ``SVI.init``.
        rows: by the name of a plate, its size and the rows that it holds.

    Returns:
        The messages by site name.
    """
    draw = handlers.substitute(substitute_fn=draw_improper)
    with handlers.block(), hold_rows(rows), named_values(), own_trace() as trace, draw:
        handlers.seed(model, rng_key)(*args, **kwargs)
    return trace


class hold_rows(Messenger):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """Let plates hold given rows, whatever they would draw themselves.

    A plate that is to subsample more rows than it has holds all of them in order, as it does where
    densities are computed; by itself it would shuffle them.

    Args:
        rows: by the name of a plate, its size and the rows that it holds.
        fn: a model.
    """

    def __init__(self, rows: Rows, fn: Model | None = None):
        self.rows = rows
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        """Give a plate its rows."""
        if msg["type"] != "plate":
            return
        size, length = msg["args"]
        if msg["name"] in self.rows:
            size, indices = self.rows[msg["name"]]
            msg["value"], msg["args"] = indices, (size, len(indices))
        elif length is not None and length > size:
            msg["value"], msg["args"], msg["is_short"] = jnp.arange(size), (size, size), True


class own_trace(handlers.trace):  # noqa: N801
    """A trace by the names that a model gives, whatever a ``scope`` around it makes of them."""

    def process_message(self, msg: Any) -> None:
        """Remember the name."""
        if "name" in msg:
            msg["_own_name"] = msg["name"]

    def postprocess_message(self, msg: Any) -> None:
        """Record the message."""
        own = {"name": msg["_own_name"]} if "_own_name" in msg else {}
        super().postprocess_message({**msg, **own})


def _is_broadcast(msg: dict) -> bool:
    """Return whether the event of an observed site has another shape than that of its values."""
    fn, shape = msg["fn"], jnp.shape(msg["value"])
    return msg["is_observed"] and shape[max(len(shape) - fn.event_dim, 0) :] != fn.event_shape


def is_censored(fn: Any) -> bool:
    """Return whether a distribution scores censored values; those that it draws are not."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, CENSORED):
            return True
        fn = fn.base_dist
    return False


def with_event(fn: dist.Distribution, event_shape: tuple[int, ...]) -> dist.Distribution:
    """Return a distribution of independent values with a larger event."""
    if fn.event_shape == event_shape:
        return fn
    if isinstance(fn, dist.MaskedDistribution):
        return with_event(fn.base_dist, event_shape).mask(mask_of_masked(fn))
    if isinstance(fn, dist.ExpandedDistribution):
        return with_event(fn.base_dist, event_shape).expand(fn.batch_shape)
    if not isinstance(fn, dist.Independent):
        return fn
    count = fn.reinterpreted_batch_ndims
    return fn.base_dist.expand(fn.batch_shape + event_shape[:count]).to_event(count)


def sites_of_trace(trace: dict) -> ModelSites:
    """Describe the sites and plates of a trace; nothing in the result is an array."""
    sites, plates, deterministic = {}, {}, {}
    for name, msg in trace.items():
        # A site that `handlers.do` intervenes on comes with its plates twice.
        frames = tuple(dict.fromkeys(msg.get("cond_indep_stack", ())))
        if msg["type"] not in ("sample", "deterministic"):
            continue
        for frame in frames:
            plate = trace.get(frame.name, {})
            size, short = plate.get("args", (frame.size,))[0], plate.get("is_short", False)
            plates[frame.name] = Plate(frame.name, size, frame.size, frame.dim, short)
        if msg["type"] == "deterministic":
            deterministic[name] = tuple(frame.name for frame in frames)
            continue
        _check_observation(name, msg, frames)
        _check_latent(name, msg, frames)
        sites[name] = Site(
            name,
            tuple(msg["fn"].batch_shape),
            event_shape_of(msg),
            _unconstrained_shape(msg),
            tuple(frame.name for frame in frames),
            msg["is_observed"],
            _is_discrete(msg["fn"]),
            is_enumerated(msg),
            is_improper(msg["fn"]) or is_switched_off(msg["fn"]),
            _is_broadcast(msg),
            is_censored(msg["fn"]),
            msg["fn"].plates if isinstance(msg["fn"], Stacked) else (),
            _is_bounded(msg["fn"]),
        )
    return ModelSites(sites, plates, deterministic)


def _check_observation(name: str, msg: dict, frames: tuple) -> None:
    """Raise if values would be compared with a distribution of other rows.

    NumPyro broadcasts one against the other, so that ``x`` of shape ``(n, 1)`` in a plate of ``n``
    scalars makes ``n * n`` comparisons.
    """
    if not (msg["is_observed"] and frames):
        return
    fn, shape = msg["fn"], jnp.shape(msg["value"])
    try:
        fits = jnp.broadcast_shapes(shape, fn.batch_shape + event_shape_of(msg))
    except ValueError:
        fits = None
    if fits != fn.batch_shape + event_shape_of(msg):
        raise ValueError(
            f"Site {name!r} in plate {frames[0].name!r} observes values of shape {shape}, and its "
            f"distribution has shape {fn.batch_shape + fn.event_shape}: batch {fn.batch_shape}, "
            f"event {fn.event_shape}. Give values of this shape, or a distribution of theirs; "
            "NumPyro would broadcast them."
        )


def event_shape_of(msg: dict) -> tuple[int, ...]:
    """Return the event shape of a site: that of its values too, if they are observed.

    One may be broadcast to the other: ``Normal(z[:, None], 1.0).to_event(1)`` is a distribution of
    any number of values.
    """
    fn, shape = msg["fn"], jnp.shape(msg["value"])
    if not msg["is_observed"]:
        return tuple(fn.event_shape)
    try:
        return jnp.broadcast_shapes(fn.event_shape, shape[max(len(shape) - fn.event_dim, 0) :])
    except ValueError:
        return tuple(fn.event_shape)


def _check_latent(name: str, msg: dict, frames: tuple) -> None:
    """Raise if a latent site in a plate is a function of others, and not sampled at all."""
    if frames and not msg["is_observed"] and is_point(msg["fn"]):
        raise ValueError(
            f"The latent site {name!r} in plate {frames[0].name!r} has a Delta distribution, so "
            "that no other value has a density. Declare what is a function of other sites with "
            f"numpyro.deterministic({name!r}, value)."
        )


def is_point(fn: Any) -> bool:
    """Return whether a distribution is of a single point."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _is_discrete(fn: Any) -> bool:
    return fn.support is None or fn.support.is_discrete


def _is_bounded(fn: Any) -> bool:
    """Return whether NumPyro maps single values to the support by a sigmoid."""
    if _is_discrete(fn):
        return False
    support, _ = peeled(fn.support)
    try:
        transform = biject_to(support.base if isinstance(support, StackedConstraint) else support)
    except NotImplementedError:
        return False
    first, *_ = getattr(transform, "parts", [transform])
    return isinstance(first, SigmoidTransform)


def is_enumerated(msg: dict) -> bool:
    """Return whether a latent site is summed over instead of sampled."""
    marked = msg.get("infer", {}).get("enumerate") == "parallel"
    return marked and not msg["is_observed"] and _is_discrete(msg["fn"])


def _unconstrained_shape(msg: dict) -> tuple[int, ...]:
    """Return the shape, batch apart, of the values that map to the site's support."""
    fn = msg["fn"]
    if msg["is_observed"] or _is_discrete(fn):
        return event_shape_of(msg)
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        raise ValueError(
            f"The latent site {msg['name']!r} has the support {fn.support}, onto which NumPyro has "
            "no map from the real numbers. Reparameterize it, a ProjectedNormal as in "
            "numpyro.handlers.reparam(model, config="
            f"{{{msg['name']!r}: numpyro.infer.reparam.ProjectedNormalReparam()}})."
        ) from None
    shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
    return tuple(shape[len(fn.batch_shape) :])


def is_real(support: Any) -> bool:
    """Return whether the support is all of the reals, so that no transform is needed."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def scoring(trace: dict, name: str) -> dist.Distribution | None:
    """Return the distribution that scores a latent site: its own, or that of another site.

    ``z ~ prior.mask(False)`` with ``sample("z_aux", prior, obs=z)`` scores a latent elsewhere. None
    if nothing scores it, so that its prior is flat.
    """
    msg = trace[name]
    if not is_switched_off(msg["fn"]):
        return msg["fn"]
    sites = (site for site in trace.values() if site["type"] == "sample" and site["is_observed"])
    return next((site["fn"] for site in sites if site["value"] is msg["value"]), None)


def counts(trace: dict, name: str) -> Array | None:
    """Return which entries of a site count, or None if all do; see `mask_of`."""
    if trace[name]["is_observed"]:
        return mask_of(trace[name]["fn"])
    scored_by = scoring(trace, name)
    if scored_by is None:
        return mask_of(trace[name]["fn"], as_a_whole=False)
    return mask_of(scored_by)


def mask_of(fn: dist.Distribution, *, as_a_whole: bool = True) -> Array | None:
    """Return the mask of a site's distribution, or None if all of it counts.

    Args:
        fn: the distribution.
        as_a_whole: whether a ``False`` for all of it counts, which of a latent site says that it
            is scored elsewhere.

    Returns:
        Booleans of shape ``batch_shape``, or that and the leading part of ``event_shape``.
    """
    if isinstance(fn, Stacked):
        return fn.mask_by_set
    if isinstance(fn, dist.Independent):
        return mask_of(fn.base_dist, as_a_whole=as_a_whole)
    if isinstance(fn, dist.ExpandedDistribution):
        mask = mask_of(fn.base_dist, as_a_whole=as_a_whole)
        ours = 0 if mask is None else len(fn.base_dist.batch_shape)
        return None if mask is None else jnp.broadcast_to(mask, fn.batch_shape + mask.shape[ours:])
    if not isinstance(fn, dist.MaskedDistribution):
        return None
    outer, inner = mask_of_masked(fn), mask_of(fn.base_dist, as_a_whole=as_a_whole)
    if outer is True or (outer is False and not as_a_whole):
        return inner
    outer = jnp.broadcast_to(outer, fn.batch_shape)
    if inner is None:
        return outer
    return inner & outer.reshape(outer.shape + (1,) * (inner.ndim - outer.ndim))
