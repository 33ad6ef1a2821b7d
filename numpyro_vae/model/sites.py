"""Reads a model: its latent and observed sites, their plates, shapes and supports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Shaped
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import init_to_sample

Model = Callable[..., Any]

# What JAX raises when a model asks for the values of an abstract array.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclass(frozen=True)
class Plate:
    """A plate as the model declares it: ``size`` data in all, of which a run holds ``length``."""

    name: str
    size: int
    length: int
    dim: int


@dataclass(frozen=True)
class Site:
    """A sample site: its shapes, and the names of the plates around it.

    ``event_shape`` is the site's own, ``unconstrained_shape`` that of the values which
    ``biject_to(support)`` maps to it; the two are the same for a site that is not to be inferred.
    ``is_enumerated`` marks a latent site that the objective sums over, not the guide.
    """

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    plates: tuple[str, ...]
    is_observed: bool
    is_discrete: bool
    is_enumerated: bool

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

    def rows(self, value: Any, plate: Plate) -> Shaped[Array, "batch ..."]:
        """Return the site's value with the plate's axis in front: a row a datum."""
        shape = jnp.broadcast_shapes(self.batch_shape + self.event_shape, jnp.shape(value))
        return jnp.moveaxis(jnp.broadcast_to(value, shape), plate.dim - len(self.event_shape), 0)


@dataclass(frozen=True)
class ModelSites:
    """What a model holds: sites by name, in the order they are met, and plates by name.

    ``deterministic`` has the names of the plates around each deterministic site.
    """

    sites: dict[str, Site]
    plates: dict[str, Plate]
    deterministic: dict[str, tuple[str, ...]]

    def latent(self) -> list[Site]:
        """Return the sites that a guide samples."""
        hidden = [site for site in self.sites.values() if not site.is_observed]
        return [site for site in hidden if not site.is_enumerated]

    def enumerated(self, plate: str) -> list[Site]:
        """Return the sites inside the plate that the objective sums over."""
        return [s for s in self.sites.values() if s.is_enumerated and plate in s.plates]

    def local(self, plate: str) -> list[Site]:
        """Return the latent sites inside the plate."""
        return [site for site in self.latent() if plate in site.plates]

    def globals(self, plate: str) -> list[Site]:
        """Return the latent sites outside the plate."""
        return [site for site in self.latent() if plate not in site.plates]

    def derived(self, plates: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the deterministic sites outside all of the plates."""
        found = self.deterministic.items()
        return tuple(name for name, around in found if not set(plates) & set(around))

    def observed(self, plate: str) -> list[Site]:
        """Return the observed sites inside the plate; of a ``numpyro.factor`` nothing is seen."""
        seen = [site for site in self.sites.values() if site.is_observed and site.size]
        return [site for site in seen if plate in site.plates]


def trace_model(model: Model, args: tuple, kwargs: dict, expose: Iterable[str] = ()) -> dict:
    """Run a model out of sight of the enclosing handlers and return its trace.

    No log-density is computed; a prior that cannot be sampled is drawn from uniformly. Hidden
    sites take fixed random keys, so that they cost nothing where they are not read; plates draw
    their rows, and ``numpyro.prng_key`` its keys, from the enclosing ``seed`` handler.

    Args:
        model: a NumPyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        expose: the types of message that the enclosing handlers do see.

    Returns:
        The trace, a dict of messages by site name.
    """
    hidden = handlers.block(hide_fn=lambda msg: msg["type"] not in expose)
    keys = handlers.seed(rng_seed=0, hide_types=["plate", "prng_key"])
    draw = handlers.substitute(substitute_fn=draw_improper)
    with hidden, keys, own_trace() as trace, draw:
        model(*args, **kwargs)
    return trace


class own_trace(handlers.trace):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """A trace by the names that a model gives, whatever a ``scope`` around it makes of them."""

    def process_message(self, msg: Any) -> None:
        """Remember the name."""
        if "name" in msg:
            msg["_own_name"] = msg["name"]

    def postprocess_message(self, msg: Any) -> None:
        """Record the message."""
        own = {"name": msg["_own_name"]} if "_own_name" in msg else {}
        super().postprocess_message({**msg, **own})


def draw_improper(msg: dict) -> Any:
    """Draw from an improper prior, which has no sampler of its own; of other messages be None."""
    if msg["type"] != "sample" or msg["value"] is not None:
        return None
    if not msg["is_observed"] and is_improper(msg["fn"]):
        return init_to_sample({**msg, "kwargs": {**msg["kwargs"], "rng_key": numpyro.prng_key()}})
    return None


def is_improper(fn: Any) -> bool:
    """Whether a distribution has no density that could be normalized."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)


def read_model(model: Model, args: tuple, kwargs: dict) -> ModelSites:
    """Read a model's structure without computing anything.

    The model is traced abstractly (`jax.eval_shape`), so the cost does not depend on the size of
    the data. A model whose Python code asks for the *values* of its arguments, as
    ``plate("groups", len(np.unique(group)))`` does, is traced with the values it needs.

    Args:
        model: a NumPyro model.
        args: its positional arguments; arrays may be replaced by `jax.ShapeDtypeStruct`.
        kwargs: its keyword arguments.

    Returns:
        The model's sites and plates.

    Example:
        >>> import numpyro.distributions as dist
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Gamma(2.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> sites = read_model(model, (np.zeros(1_000_000),), {})
        >>> sites.plates["data"]
        Plate(name='data', size=1000000, length=1000000, dim=-1)
        >>> [site.name for site in sites.local("data")]
        ['z']
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    found: list[ModelSites] = []

    def run(arrays: list) -> None:
        rest = iter(arrays)
        filled = [
            next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        with handlers.seed(rng_seed=0):
            found.append(sites_of_trace(trace_model(model, args, kwargs)))

    try:
        jax.eval_shape(run, arrays)
    except NEEDS_VALUES:
        jax.eval_shape(lambda: run(arrays))
    return found[-1]


def sites_of_trace(trace: dict) -> ModelSites:
    """Describe the sites and plates of a trace; nothing in the result is an array."""
    sites, plates, deterministic = {}, {}, {}
    for name, msg in trace.items():
        # A site that `handlers.do` intervenes on comes with its plates twice.
        frames = tuple(dict.fromkeys(msg.get("cond_indep_stack", ())))
        if msg["type"] == "deterministic":
            deterministic[name] = tuple(frame.name for frame in frames)
        if msg["type"] != "sample":
            continue
        for frame in frames:
            size = trace[frame.name]["args"][0] if frame.name in trace else frame.size
            plates[frame.name] = Plate(frame.name, size, frame.size, frame.dim)
        _check_observation(name, msg, frames)
        sites[name] = Site(
            name,
            tuple(msg["fn"].batch_shape),
            tuple(msg["fn"].event_shape),
            _unconstrained_shape(msg),
            tuple(frame.name for frame in frames),
            msg["is_observed"],
            _is_discrete(msg["fn"]),
            _is_enumerated(msg),
        )
    return ModelSites(sites, plates, deterministic)


def _check_observation(name: str, msg: dict, frames: tuple) -> None:
    """Raise if values would be compared with a distribution that is not of their shape.

    NumPyro broadcasts one against the other, so that ``x`` of shape ``(n, 1)`` in a plate of ``n``
    scalars makes ``n * n`` comparisons.
    """
    if not (msg["is_observed"] and frames):
        return
    fn, shape = msg["fn"], jnp.shape(msg["value"])
    expected = fn.batch_shape + fn.event_shape
    try:
        fits = jnp.broadcast_shapes(shape, expected) == expected
    except ValueError:
        fits = False
    if not fits or shape[len(shape) - fn.event_dim :] != fn.event_shape:
        raise ValueError(
            f"Site {name!r} in plate {frames[0].name!r} observes values of shape {shape}, and its "
            f"distribution has shape {expected}: batch {fn.batch_shape}, event {fn.event_shape}. "
            "Give values of this shape, or a distribution of theirs; NumPyro would broadcast them."
        )


def _is_discrete(fn: Any) -> bool:
    return fn.support is None or fn.support.is_discrete


def _is_enumerated(msg: dict) -> bool:
    marked = msg.get("infer", {}).get("enumerate") == "parallel"
    return marked and not msg["is_observed"] and _is_discrete(msg["fn"])


def _unconstrained_shape(msg: dict) -> tuple[int, ...]:
    """Return the shape, batch apart, of the values that map to the site's support."""
    fn = msg["fn"]
    if msg["is_observed"] or _is_discrete(fn):
        return tuple(fn.event_shape)
    shape = biject_to(fn.support).inverse_shape(fn.batch_shape + fn.event_shape)
    return tuple(shape[len(fn.batch_shape) :])


def is_real(support: Any) -> bool:
    """Return whether the support is all of the reals, so that no transform is needed."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def mask_of(fn: dist.Distribution) -> Array | None:
    """Return the mask of a site's distribution, or None if all of it counts.

    Returns:
        Booleans of shape ``batch_shape``, or that and the leading part of ``event_shape``.
    """
    if isinstance(fn, dist.Independent):
        return mask_of(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution):
        mask = mask_of(fn.base_dist)
        ours = 0 if mask is None else len(fn.base_dist.batch_shape)
        return None if mask is None else jnp.broadcast_to(mask, fn.batch_shape + mask.shape[ours:])
    if not isinstance(fn, dist.MaskedDistribution):
        return None
    outer, inner = fn._mask, mask_of(fn.base_dist)
    if outer is True:
        return inner
    outer = jnp.broadcast_to(outer, fn.batch_shape)
    if inner is None:
        return outer
    return inner & outer.reshape(outer.shape + (1,) * (inner.ndim - outer.ndim))


def choose_plate(sites: ModelSites, plate: str | None) -> Plate:
    """Return the local plate: the one named, else the one that subsamples, else the only one.

    Args:
        sites: what `read_model` found.
        plate: the plate's name, or None to choose among those that hold latent sites.

    Raises:
        ValueError: if the named plate holds no latent site, no plate does, or several do.
    """
    hidden = [s for s in sites.sites.values() if not s.is_observed]
    candidates = {name: sites.plates[name] for s in hidden for name in s.plates}
    if plate is not None:
        if plate not in candidates:
            raise ValueError(
                f"No latent site lies in a plate named {plate!r}. "
                f"Plates with latent sites: {sorted(candidates) or 'none'}. Name one of them."
            )
        return candidates[plate]
    if not candidates:
        raise ValueError(
            f"No latent site lies in a plate: the model has latent sites "
            f"{[s.name for s in hidden]} and plates {sorted(sites.plates)}. An amortized "
            "guide needs latents of each datum: put numpyro.plate around them."
        )
    subsampled = {name: p for name, p in candidates.items() if p.length < p.size}
    remaining = subsampled or candidates
    if len(remaining) > 1:
        held = {name: [s.name for s in hidden if name in s.plates] for name in remaining}
        raise ValueError(
            f"Several plates hold latent sites: {held}. Say which one has a datum for each of "
            f"its entries, for instance plate={next(iter(remaining))!r}."
        )
    return next(iter(remaining.values()))
