"""The compiled pieces of a fit: its start, a step, a scan of steps, and an evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpyro
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Bool, Float, Int
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.batch import Batch, Order, each_step, rows_of
from numpyro_vae.data.whole_numbers import telling_of_floats
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.model.captured import captured, signature
from numpyro_vae.model.contents import Reading
from numpyro_vae.model.plates import at_step, minibatch
from numpyro_vae.model.provenance import inner_jaxprs
from numpyro_vae.model.reading import ModelReader, read_for
from numpyro_vae.model.simulate import simulated
from numpyro_vae.numpyro_internals import (
    HANDLERS,
    in_one_thread,
    in_order,
    init_model_key,
    param_transforms,
    particle_keys,
    returns_mutable_state,
    stop_gradients,
    with_hidden_state,
    with_param_transforms,
)
from numpyro_vae.objectives.base import AbstractObjective
from numpyro_vae.training.ahead import scan_steps
from numpyro_vae.training.finite import all_finite, stays_finite
from numpyro_vae.training.freezing import Freeze, frozen_names, keep, parts_of
from numpyro_vae.training.simulating import Simulation, draw_batch

Step = tuple[SVIState, Float[Array, ""]]


class Trainer:
    """An `SVI` that sees minibatches as samples of all the data, and losses per datum.

    All that is compiled takes a `Batch`, and depends on model, guide, optimizer and objective
    alone. The objective is any `numpyro.infer.elbo.ELBO`.

    Args:
        svi: the inference to run.
        freeze: names of parameters that stay as they are; see `fit`.
    """

    def __init__(self, svi: SVI, freeze: Freeze = ()):
        self.svi = copy.copy(svi)  # whose parts may be replaced; see `serves`
        self.freeze, self.frozen = freeze, frozenset[str]()
        self.held = _held(svi)
        shared = isinstance(svi.guide, AmortizedGuide) and svi.guide.model is svi.model
        self.reader = svi.guide.reader if shared else ModelReader(svi.model)
        self.parts: dict[str, frozenset[str]] = {}  # the names of parameters
        self.transforms: dict[str, Any] = {}
        self.fresh: Any = None  # the shapes of a first state, once there was one
        self._compile()

    def _compile(self) -> None:
        """Forget what was compiled before."""
        # Of functions made here, as JAX knows a method that it has traced before.
        self._init_compiled = in_one_thread(jax.jit(telling_of_floats(self._init)))
        self._draw_compiled = in_one_thread(jax.jit(partial(self._draw), static_argnums=0))
        self._step_compiled = in_one_thread(jax.jit(telling_of_floats(self._step)))
        self._guarded_compiled = in_one_thread(jax.jit(partial(self._guarded_step)))
        self._scan_compiled = in_one_thread(jax.jit(partial(self._scan)))
        self._scan_batches_compiled = in_one_thread(jax.jit(partial(self._scan_batches)))
        self._evaluate_compiled = in_one_thread(jax.jit(telling_of_floats(self._evaluate)))

    def serves(self, svi: SVI, freeze: Freeze) -> bool:
        """Return whether an SVI has the parts that this trainer was made with, as they were."""
        mine, theirs = vars(self.svi), vars(svi)
        same = all(mine[part] is theirs[part] for part in ("model", "guide", "optim", "loss"))
        return same and self.freeze == freeze and self.held == _held(svi)

    def _bind(self, batch: Batch, transforms: dict[str, Any], *, evaluate: bool = False) -> SVI:
        """Return the SVI whose model and guide see the batch as part of all the data."""
        svi = with_param_transforms(self.svi, transforms)
        svi.loss = in_order(svi.loss)
        stop_gradients(svi, self.frozen)
        wrap = partial(
            minibatch,
            plate=batch.plate,
            num_data=batch.num_data,
            indices=batch.held,
            weights=batch.weights,
        )
        guide = svi.guide
        if evaluate and isinstance(guide, AmortizedGuide):
            guide = guide.eval()
        svi.model, svi.guide = wrap(svi.model), wrap(guide)
        return svi

    def read(self, data: Any, batch_axes: Any, name: str = "data") -> ArrayData:
        """Read data in memory, as the model's arguments."""
        return read_for(self.reader, data, batch_axes, self.svi.static_kwargs, name)

    # -- the start --------------------------------------------------------------------------------

    def init(self, rng_key: Array, batch: Batch, init_params: dict | None) -> SVIState:
        """Return the first state.

        It is computed in one compiled function, unless a guide of NumPyro's is to be set up.
        """
        guide, compiled = self.svi.guide, False
        if isinstance(guide, AmortizedGuide):
            guide.reset()  # or the result would depend on what the guide was used for
            (args, kwargs), known = batch.arguments(), guide.plan
            guide.read_model(args, {**kwargs, **self.svi.static_kwargs}, batch.rows)
            compiled = guide.globals is None
            if guide.plan != known:
                self._compile()
        init = self._init_compiled if compiled else self._init
        state, self.transforms = init(rng_key, batch, init_params)
        if state.mutable_state:  # in which the networks have seen the batch
            held = state.mutable_state
            given = {name: (init_params or {}).get(name, held[name]) for name in held}
            state = state._replace(mutable_state=jax.tree.map(jnp.asarray, given))
        self.fresh = jax.eval_shape(lambda: state)
        self._freeze(batch)
        return state

    def _freeze(self, batch: Batch) -> None:
        """Find out which parameters belong to what, and which of them stay as they are."""
        args, kwargs = batch.arguments()
        kwargs = {**kwargs, **self.svi.static_kwargs}
        of_model = self.reader.abstract(args, kwargs, batch.rows).params
        network = f"{getattr(self.svi.guide, 'prefix', '')}$params"
        self.parts = parts_of(self.transforms, of_model, network)
        frozen = frozen_names(self.freeze, self.parts) if self.freeze else frozenset[str]()
        if frozen != self.frozen:
            self.frozen = frozen
            self._compile()

    def _init(
        self, rng_key: Array, batch: Batch, init_params: dict | None
    ) -> tuple[SVIState, dict[str, Any]]:
        args, kwargs = batch.arguments()
        svi, reading = self._bind(batch, {}), self._read(rng_key, batch)
        if not reading.has_state:  # then only its parameters matter, which are known by now
            svi.model = partial(_declare_params, reading)
        state = svi.init(rng_key, *args, init_params=init_params, **kwargs)
        return state, param_transforms(svi) or {}

    def _read(self, rng_key: Array, batch: Batch) -> Reading:
        """Read the model, with the parameters that ``SVI.init`` would give it."""
        args, kwargs = batch.arguments()
        kwargs = {**kwargs, **self.svi.static_kwargs}
        return self.reader.read(args, kwargs, batch.rows, init_model_key(rng_key))

    # -- steps ------------------------------------------------------------------------------------

    def step(self, state: SVIState, batch: Batch) -> Step:
        """Take a step, compiled; the loss is the negative ELBO per datum."""
        return self._step_compiled(self.transforms, state, batch)

    def guarded_step(self, state: SVIState, batch: Batch) -> Step:
        """Take a step that changes nothing but the key, and returns NaN, where it fails."""
        return self._guarded_compiled(self.transforms, state, batch)

    def scan(
        self, state: SVIState, batch: Batch, order: Order
    ) -> tuple[SVIState, Float[Array, "num_steps"], Bool[Array, ""]]:
        """Take a step for each row of an order, on the rows of the data that it names.

        Returns:
            The last state, the losses, and whether all that was computed is finite.
        """
        return self._scan_compiled(self.transforms, state, batch, order)

    def scan_batches(
        self, state: SVIState, table: Batch, order: Int[Array, "num_steps"]
    ) -> tuple[SVIState, Float[Array, "num_steps"], Bool[Array, ""]]:
        """Take a step on each batch of a table, as `draw` returns it; else as `scan` does."""
        return self._scan_batches_compiled(self.transforms, state, table, order)

    def draw(
        self,
        plan: Simulation,
        state: SVIState,
        rng_keys: Array,
        batch: Batch,
        order: Int[Array, "num_steps batch"],
    ) -> tuple[Batch, Array]:
        """Return a table of batches simulated from the model as it is in a state, compiled.

        It is a batch with one more axis in front of all its arrays. Each has a key of its own, and
        the covariates of the rows that the order names. With it goes whether each has settled.
        """
        return self._draw_compiled(plan, self.transforms, state, rng_keys, batch, order)

    def _draw(
        self,
        plan: Simulation,
        transforms: dict[str, Any],
        state: SVIState,
        rng_keys: Array,
        batch: Batch,
        order: Array,
    ) -> tuple[Batch, Array]:
        def one(key_and_rows: tuple[Array, Array]) -> tuple[Batch, Array]:
            rng_key, like = key_and_rows[0], batch.at(key_and_rows[1])
            svi = self._bind(like, transforms)
            drawn, settled = draw_batch(svi, _params(svi, state), rng_key, like, plan)
            pairs = zip(drawn.arrays, drawn.layout.axes, strict=True)
            arrays = (drawn.layout.devices.split(array, axis) for array, axis in pairs)
            return replace(drawn, arrays=tuple(arrays)), settled

        return jax.lax.map(one, (rng_keys, order))

    def _step(self, transforms: dict[str, Any], state: SVIState, batch: Batch) -> Step:
        args, kwargs = batch.arguments()
        svi = self._bind(batch, transforms)
        with ExitStack() as answers:
            answers.enter_context(at_step(state.optim_state[0]))
            if batch.latents is not None:
                answers.enter_context(simulated(batch.latents))
            new, loss = self._update(svi, state, args, kwargs)
        if self.frozen:
            new = keep(new, state, svi.optim.get_params(state.optim_state), self.frozen)
        return batch.layout.devices.keep((new, loss / batch.num_data))

    @staticmethod
    def _update(svi: SVI, state: SVIState, args: tuple, kwargs: dict[str, Any]) -> Step:
        """Take a step that keeps the networks' state, whatever the objective makes of it."""
        held = state.mutable_state
        if held is None or returns_mutable_state(svi.loss):
            return svi.update(state, *args, **kwargs)
        traced = next(_traces(svi, state, args, kwargs, num_particles=1))
        updated = {name: trace[name]["value"] for trace in traced for name in trace if name in held}
        svi.model, svi.guide = (with_hidden_state(fn, held) for fn in (svi.model, svi.guide))
        new, loss = svi.update(state._replace(mutable_state=None), *args, **kwargs)
        return new._replace(mutable_state=updated), loss

    def _guarded_step(self, transforms: dict[str, Any], state: SVIState, batch: Batch) -> Step:
        new, loss = self._step_compiled(transforms, state, batch)
        ok = jnp.isfinite(loss) & stays_finite(state, new)
        # Copies, which unlike a `jnp.where` for each array need not be compiled.
        kept = jax.lax.cond(ok, lambda new, _: new, lambda _, old: old, new, state)
        return kept._replace(rng_key=new.rng_key), jnp.where(ok, loss, jnp.nan)

    def _scan(self, transforms: dict[str, Any], state: SVIState, batch: Batch, order: Order) -> Any:
        return self._scan_over(transforms, state, batch.at, rows_of(order))

    def _scan_batches(
        self, transforms: dict[str, Any], state: SVIState, table: Batch, order: Array
    ) -> Any:
        return self._scan_over(transforms, state, partial(batch_of, table), order)

    def _scan_over(
        self,
        transforms: dict[str, Any],
        state: SVIState,
        batch: Callable[[Array], Batch],
        order: Array,
    ) -> Any:
        step = self.jaxpr_of_step(state, jax.eval_shape(batch, order[0]))
        new, losses = scan_steps(step, transforms, state, batch, order)
        return new, losses, jnp.isfinite(losses).all() & stays_finite(state, new)

    def loop(
        self, state: SVIState, batch: Batch, order: Order
    ) -> tuple[SVIState, Float[Array, "num_steps"], Bool[Array, ""]]:
        """Do what `scan` does, each step called from Python."""
        new, found = state, []
        for rows in each_step(order):
            new, loss = self.step(new, batch.at(rows))
            found.append(loss)
        losses = jnp.stack(found)
        return new, losses, jnp.isfinite(losses).all() & stays_finite(state, new)

    def is_slow_in_scan(self, state: SVIState, batch: Batch) -> bool:
        """Return whether a step has convolutions, which XLA runs slowly in a scan on a CPU."""
        if jax.default_backend() != "cpu":
            return False
        return "conv_general_dilated" in _primitives(self.jaxpr_of_step(state, batch).jaxpr)

    def jaxpr_of_step(self, state: SVIState, batch: Batch) -> ClosedJaxpr:
        """Return what a step computes; shapes will do for arrays."""
        step: Any = self._step_compiled
        with HANDLERS:
            return step.__wrapped__.trace(self.transforms, state, batch).jaxpr

    # -- what a state says ------------------------------------------------------------------------

    def evaluate(self, rng_key: Array, params: dict[str, Any], batch: Batch) -> Float[Array, ""]:
        """Return the validation loss per datum of a batch, networks in evaluation mode.

        That is the negative ELBO, or what else the objective is compared by.
        """
        return self._evaluate_compiled(rng_key, params, batch)

    def _evaluate(self, rng_key: Array, params: dict[str, Any], batch: Batch) -> Float[Array, ""]:
        args, kwargs = batch.arguments()
        svi = self._bind(batch, {}, evaluate=True)
        kwargs = {**kwargs, **svi.static_kwargs}
        model, guide = (with_hidden_state(fn, params) for fn in (svi.model, svi.guide))
        loss = svi.loss.validation if isinstance(svi.loss, AbstractObjective) else svi.loss
        return loss.loss(rng_key, params, model, guide, *args, **kwargs) / batch.num_data

    def params(self, state: SVIState) -> dict[str, Any]:
        """Return the parameters, and the networks' other state with them."""
        return _params(with_param_transforms(self.svi, self.transforms), state)

    def culprit(self, state: SVIState, batch: Batch) -> str:
        """Say where the next step stops being finite: the first such site, or the gradient."""
        (args, kwargs), svi = batch.arguments(), self._bind(batch, self.transforms)
        with HANDLERS, numpyro.validation_enabled(False):
            for guide, model in _traces(svi, state, args, kwargs, svi.loss.num_particles):
                for name, of, site in (*_sites(guide, "guide"), *_sites(model, "model")):
                    if not _is_finite(site):
                        return f"site {name!r} of the {of}"
        return "the gradient"


def batch_of(table: Batch, number: Any) -> Batch:
    """Return one of the batches of a table, as `Trainer.draw` returns it."""
    return jax.tree.map(lambda array: array[number], table)


def _params(svi: SVI, state: SVIState) -> dict[str, Any]:
    return {**svi.get_params(state), **(state.mutable_state or {})}


def _traces(
    svi: SVI, state: SVIState, args: tuple, kwargs: dict[str, Any], num_particles: int
) -> Iterator[tuple[dict, dict]]:
    """Trace guide and model as each particle of the next step does."""
    kwargs, params = {**kwargs, **svi.static_kwargs}, _params(svi, state)
    for model_key, guide_key in particle_keys(state.rng_key, num_particles):
        guide = handlers.substitute(handlers.seed(svi.guide, guide_key), params)
        guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
        model = handlers.substitute(handlers.seed(svi.model, model_key), params)
        model = handlers.replay(model, guide_trace)
        yield guide_trace, handlers.trace(model).get_trace(*args, **kwargs)


def _sites(trace: dict[str, Any], of: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    return ((name, of, site) for name, site in trace.items() if site["type"] == "sample")


def _is_finite(site: dict[str, Any]) -> bool:
    log_prob = site["fn"].log_prob(site["value"])
    return bool(all_finite(site["value"]) & jnp.isfinite(log_prob).all())


_TRAINERS: WeakKeyDictionary[SVI, Trainer] = WeakKeyDictionary()


def trainer_of(svi: SVI, freeze: Freeze = ()) -> Trainer:
    """Return the trainer of an SVI, the same as the last time, so that nothing compiles twice."""
    if isinstance(svi.guide, AmortizedGuide):
        svi.guide.renew()
    trainer = _TRAINERS.get(svi)
    if trainer is None or not trainer.serves(svi, freeze):
        trainer = _TRAINERS[svi] = Trainer(svi, freeze)
    return trainer


def _held(svi: SVI) -> tuple[Any, ...]:
    """Return what the parts of an SVI are made of beside each other, to compare."""
    plain = (svi.guide,) if isinstance(svi.guide, FunctionType) else ()
    functions = getattr(svi.guide, "functions", plain)
    return (*captured(svi.model, *functions, svi.loss), signature(svi.static_kwargs))


def _declare_params(reading: Reading, *args: Any, **kwargs: Any) -> None:
    """Declare the parameters of a model that was read; a model in its place."""
    for name, param in reading.params.items():
        numpyro.param(name, param.value, constraint=param.constraint, **dict(param.kwargs))


def _primitives(jaxpr: Jaxpr) -> set[str]:
    """Return the names of the primitives of a jaxpr and of those inside it."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    for eqn in jaxpr.eqns:
        names |= {name for found in inner_jaxprs(eqn) for name in _primitives(found)}
    return names
