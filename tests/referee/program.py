"""Models as data: a program is a list of steps, each of which declares a site or a few."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import linen, nnx
from jax import Array
from kinds import ENUMERATED, OBSERVED, with_event
from numpyro import handlers
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.distributions import constraints

DATA = "data"  # the local plate
NUM_DATA, BATCH = 6, 3  # its rows, and those of a batch
NUM_GROUPS = 5  # of rows, which have a value in common


@dataclass(frozen=True)
class PlateSpec:
    """A plate: ``subsample`` of its rows are seen in a run, None if all are."""

    name: str
    size: int
    dim: int | None
    subsample: int | None = None

    @property
    def axis(self) -> int:
        return -1 if self.dim is None else self.dim


@dataclass(frozen=True)
class Program:
    """All that a model does, in order; the first observed site and argument is ``x0``."""

    plates: tuple[PlateSpec, ...]
    steps: tuple[Step, ...]
    axis: int = -1  # of the data in the first argument, counted from the right
    scale_all: float | None = None
    uses_subsample: bool = False  # numpyro.subsample in place of indexing
    declares_size: bool = False  # the size of the local plate is an argument

    def run(self, arguments: dict[str, Any]) -> None:
        state = State(self, arguments)
        with ExitStack() as stack:
            if self.scale_all is not None:
                stack.enter_context(handlers.scale(scale=self.scale_all))
            for step in self.steps:
                step(state)


class State:
    """What a run has seen so far."""

    def __init__(self, program: Program, arguments: dict[str, Any]):
        self.program, self.arguments = program, arguments
        self.specs = {spec.name: spec for spec in program.plates}
        self.plates = {spec.name: self._declare(spec) for spec in program.plates}
        self.values: dict[str, Array] = {}
        self.event_dims: dict[str, int] = {}
        self.around: dict[str, tuple[str, ...]] = {}

    def _declare(self, spec: PlateSpec) -> Any:
        size, length = spec.size, spec.subsample
        if spec.name == DATA:
            size = self.arguments["x0"].shape[self.program.axis]
            if self.program.declares_size:
                size, length = self.arguments["num_data"], size
        options = {} if spec.dim is None else {"dim": spec.dim}
        return numpyro.plate(spec.name, size, subsample_size=length, **options)

    def depth(self, plates: tuple[str, ...]) -> int:
        return max((-self.specs[name].axis for name in plates), default=0)

    def put(self, name: str, plates: tuple[str, ...], value: Array, event_dim: int) -> None:
        self.values[name], self.event_dims[name], self.around[name] = value, event_dim, plates

    def summary(self, name: str, plates: tuple[str, ...]) -> Array:
        """Return a number for each entry of the batch of a site in ``plates``, of another site."""
        value, event_dim = jnp.tanh(self.values[name]), self.event_dims[name]
        value = value.mean(tuple(range(value.ndim - event_dim, value.ndim)))
        for plate in set(self.around[name]) - set(plates):
            axis = self.specs[plate].axis
            if value.ndim >= -axis:
                value = value.mean(axis, keepdims=True)
        leading = max(value.ndim - self.depth(plates), 0)
        return value.mean(tuple(range(leading)))

    def rows(self, name: str, plates: tuple[str, ...]) -> Array:
        """Return an argument with a value for each datum, for a site in ``plates``."""
        value = jnp.asarray(self.arguments[name])
        value = value.reshape(-1, *[1] * (-self.specs[DATA].axis - 1))
        return self._select(value, (DATA,), 0)

    def batch(self, name: str, plates: tuple[str, ...], event_dim: int) -> Array:
        """Return an argument laid out as a site in ``plates`` is."""
        value = jnp.asarray(self.arguments[name])
        if self.program.uses_subsample:
            return numpyro.subsample(value, event_dim=event_dim)
        return self._select(value, plates, event_dim)

    def _select(self, value: Array, plates: tuple[str, ...], event_dim: int) -> Array:
        for name in plates:
            if self.specs[name].subsample is not None:
                axis = self.specs[name].axis - event_dim
                value = jnp.take(value, self.plates[name]._indices, axis=axis)
        return value


Step = Callable[[State], None]


@dataclass(frozen=True)
class Modifiers:
    """Handlers around a site.

    ``scale`` is a number, or "rows" for one of each datum; ``mask`` is "rows" for a boolean of each
    datum, "cells" for one of each entry of the batch, or "false".
    """

    scale: float | str | None = None
    mask: str | None = None
    masks_fn: bool = False  # the distribution, and no handler

    def enter(self, stack: ExitStack, state: State, plates: tuple[str, ...], name: str) -> None:
        if self.scale == "rows":
            stack.enter_context(handlers.scale(scale=state.rows("row_scale", plates)))
        elif self.scale is not None:
            stack.enter_context(handlers.scale(scale=self.scale))
        if self.mask is not None and not self.masks_fn:
            stack.enter_context(handlers.mask(mask=self._mask(state, plates, name)))

    def masked(
        self, fn: dist.Distribution, state: State, plates: tuple[str, ...], name: str
    ) -> dist.Distribution:
        """Return the distribution of a site, masked if no handler masks it."""
        return fn.mask(self._mask(state, plates, name)) if self.masks_fn else fn

    def _mask(self, state: State, plates: tuple[str, ...], name: str) -> Any:
        if self.mask == "false":
            return False
        if self.mask == "rows":
            return state.rows("row_mask", plates)
        return state.batch(f"{name}_mask", plates, 0)


@dataclass(frozen=True)
class Predictor:
    """What a site's parameters are made of: other sites, parameters, networks and arguments."""

    reads: tuple[str, ...] = ()
    param: str | None = None
    network: str | None = None
    covariate: bool = False
    constant: bool = False
    static: bool = False
    group: str | None = None  # a site with a value for each group, of which a row has one

    def __call__(self, state: State, plates: tuple[str, ...]) -> Array:
        m = jnp.asarray(0.1)
        for place, name in enumerate(self.reads):
            m = m + (0.8 - 0.3 * place) * state.summary(name, plates)
        if self.covariate and state.arguments.get("covariate") is not None:
            m = m + 0.5 * state.rows("covariate", plates)
        if self.group is not None:
            m = m + 0.7 * jnp.tanh(state.values[self.group])[state.rows("group", plates)]
        if self.constant:
            m = m + 0.1 * jnp.asarray(state.arguments["constant"]).sum()
        if self.static:
            m = m * state.arguments["power"] / 2
        if self.param is not None:
            m = m * jnp.tanh(state.values[self.param])
        return m if self.network is None else NETWORKS[self.network](m)


def _nnx(m: Array) -> Array:
    network = nnx_module("network", nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    return jnp.tanh(network(m[..., None])[..., 0])


def _linen(m: Array) -> Array:
    network = flax_module("network", linen.Dense(1), input_shape=(1,))
    return jnp.tanh(network(m[..., None])[..., 0])


NETWORKS = {"nnx": _nnx, "linen": _linen}


def entered(
    state: State, plates: tuple[str, ...], modifiers: Modifiers, name: str
) -> AbstractContextManager:
    stack = ExitStack()
    for plate in plates:
        stack.enter_context(state.plates[plate])
    modifiers.enter(stack, state, plates, name)
    return stack


@dataclass(frozen=True)
class Latent:
    """A latent site, or one that is observed at what the model has made of latents."""

    name: str
    kind: str
    plates: tuple[str, ...] = ()
    event: tuple[int, ...] = ()
    predictor: Predictor = Predictor()
    modifiers: Modifiers = Modifiers()
    mask_entries: bool = False
    extra: int | None = None  # the size of a batch dimension that belongs to no plate
    is_bounded: bool = False  # by a number of each datum
    scope: str | None = None  # in front of its name

    def distribution(self, state: State) -> dist.Distribution:
        m = self.predictor(state, self.plates)
        if self.is_bounded:
            high = 0.5 + state.rows("row_scale", self.plates)
            m, high = jnp.broadcast_arrays(m, high)  # NumPyro wants bounds of the same shape
            return dist.TruncatedNormal(m, 1.0, low=jnp.full_like(m, -1.0), high=high)
        if self.extra is not None:
            shape = (self.extra, *(1,) * state.depth(tuple(state.specs)))
            m = m + 0.3 * jnp.arange(float(self.extra)).reshape(shape)
        if not self.mask_entries:
            return with_event(self.kind, m, self.event)
        mask = state.batch(f"{self.name}_entries", self.plates, 1)
        return dist.Normal(m[..., None], 0.8).expand((*m.shape, 3)).mask(mask).to_event(1)

    def __call__(self, state: State) -> None:
        with entered(state, self.plates, self.modifiers, self.name):
            fn = self.distribution(state)
            fn = self.modifiers.masked(fn, state, self.plates, self.name)
            infer = {"enumerate": "parallel"} if self.kind == ENUMERATED else None
            value = jnp.asarray(self._sample(fn, infer))
        if self.kind == ENUMERATED:
            value = value.astype(float)
        state.put(self.name, self.plates, value, fn.event_dim)

    def _sample(self, fn: dist.Distribution, infer: dict | None) -> Any:
        if self.scope is None:
            return numpyro.sample(self.name, fn, infer=infer)
        with handlers.scope(prefix=self.scope, hide_types=["plate"]):
            return numpyro.sample(self.name.removeprefix(f"{self.scope}/"), fn, infer=infer)


@dataclass(frozen=True)
class Data:
    """An observed site."""

    name: str
    kind: str
    plates: tuple[str, ...]
    predictor: Predictor = Predictor()
    modifiers: Modifiers = Modifiers()
    mask_entries: bool = False
    obs_mask: bool = False
    fills: bool = False  # what is masked is missing, and the model puts a zero in its place

    def distribution(self, m: Array, arguments: dict[str, Any]) -> dist.Distribution:
        return OBSERVED[self.kind].make(m, arguments.get("noise", 1.0))

    def __call__(self, state: State) -> None:
        with entered(state, self.plates, self.modifiers, self.name):
            fn = self.distribution(self.predictor(state, self.plates), state.arguments)
            fn = self.modifiers.masked(fn, state, self.plates, self.name)
            options = {}
            if self.mask_entries:
                mask = state.batch(f"{self.name}_entries", self.plates, fn.event_dim)
                fn = fn.base_dist.mask(mask).to_event(fn.event_dim)
            if self.obs_mask:
                options["obs_mask"] = state.batch(f"{self.name}_obs_mask", self.plates, 0)
            obs = state.batch(self.name, self.plates, fn.event_dim)
            if self.fills:
                obs = jnp.where(jnp.isnan(obs), 0.0, obs)
            value = numpyro.sample(self.name, fn, obs=obs, **options)
        state.put(self.name, self.plates, jnp.asarray(value), fn.event_dim)


@dataclass(frozen=True)
class Auxiliary:
    """A site that is observed at the value of a latent, as in NumPyro's examples of guides."""

    name: str
    of: str

    def __call__(self, state: State) -> None:
        plates, event_dim = state.around[self.of], state.event_dims[self.of]
        with entered(state, plates, Modifiers(), self.name):
            value = state.values[self.of]
            shape = value.shape[value.ndim - event_dim :]
            fn = dist.Normal(0.0, 1.5).expand(shape).to_event(event_dim)
            numpyro.sample(self.name, fn, obs=value)


@dataclass(frozen=True)
class Factor:
    """A ``numpyro.factor`` of latents."""

    name: str
    plates: tuple[str, ...]
    reads: tuple[str, ...]
    modifiers: Modifiers = Modifiers()

    def __call__(self, state: State) -> None:
        with entered(state, self.plates, self.modifiers, self.name):
            m = Predictor(self.reads)(state, self.plates)
            numpyro.factor(self.name, -0.3 * m**2)


@dataclass(frozen=True)
class Deterministic:
    """A deterministic site.

    ``form`` is "summary" of a number for each entry of the batch, "value" of a site's value itself,
    "event" of a vector for each entry, "scalar" of a constant, or "total" of one number.
    """

    name: str
    plates: tuple[str, ...]
    reads: tuple[str, ...]
    form: str = "summary"
    inside: bool = True  # the plates

    def __call__(self, state: State) -> None:
        with entered(state, self.plates if self.inside else (), Modifiers(), self.name):
            numpyro.deterministic(self.name, self._value(state))

    def _value(self, state: State) -> Array:
        if self.form == "scalar":
            return jnp.asarray(2.5)
        if self.form == "total":
            return sum((state.values[name].sum() for name in self.reads), jnp.asarray(0.0))
        if self.form == "value":
            return 2.0 * state.values[self.reads[0]]
        m = Predictor(self.reads)(state, self.plates)
        return m if self.form == "summary" else m[..., None] * jnp.arange(1.0, 4.0)


@dataclass(frozen=True)
class Param:
    """A ``numpyro.param``, by itself or in a plate."""

    name: str
    plates: tuple[str, ...] = ()
    is_positive: bool = False

    def __call__(self, state: State) -> None:
        constraint = constraints.positive if self.is_positive else constraints.real
        sizes = {state.specs[name].axis: state.specs[name].size for name in self.plates}
        shape = tuple(sizes.get(axis, 1) for axis in range(-state.depth(self.plates), 0))
        with entered(state, self.plates, Modifiers(), self.name):
            value = numpyro.param(
                self.name, jnp.full(shape, 0.7), constraint=constraint, event_dim=0
            )
        state.put(self.name, self.plates, jnp.asarray(value), 0)
