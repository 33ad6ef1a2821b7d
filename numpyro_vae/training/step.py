"""The compiled pieces of a fit: a step, an epoch, and an evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Bool, Float
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arrays import Batch
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.model.plates import minibatch

Order = Callable[[Array, Array], Array]


class Trainer:
    """An `SVI` that sees minibatches as samples of all the data, and losses per datum.

    Args:
        svi: the inference to run.
        plate: the name of the local plate.
        num_data: how many data there are in all.
        read: from a batch to the model's arguments.
        select: whether the model's plate takes the batch's indices; otherwise it keeps its own.
    """

    def __init__(
        self,
        svi: SVI,
        plate: str,
        num_data: int,
        read: Callable[[Batch], tuple[tuple, dict]],
        select: bool,
    ):
        self.svi, self.plate, self.num_data = svi, plate, num_data
        self.read, self.select = read, select
        # An objective that enumerates takes no weights of single rows.
        self.pads = not svi.loss.can_infer_discrete

    def bind(self, batch: Batch, *, evaluate: bool = False) -> SVI:
        """Return the SVI whose model and guide see the batch as part of all the data."""
        svi = copy.copy(self.svi)

        def wrap(fn: Callable) -> Callable:
            return minibatch(
                fn,
                plate=self.plate,
                num_data=self.num_data,
                indices=batch.indices if self.select else None,
                weights=batch.weights,
            )

        guide = svi.guide
        if evaluate and isinstance(guide, AmortizedGuide):
            guide = guide.eval()
        svi.model, svi.guide = wrap(svi.model), wrap(guide)
        return svi

    def init(self, rng_key: Array, batch: Batch, init_params: dict | None) -> SVIState:
        """Return the first state, and leave the user's SVI ready for its own methods."""
        if isinstance(self.svi.guide, AmortizedGuide):
            self.svi.guide.reset()  # or the result would depend on what the guide was used for
        svi = self.bind(batch)
        args, kwargs = self.read(batch)
        state = svi.init(rng_key, *args, init_params=init_params, **kwargs)
        self.svi.constrain_fn = svi.constrain_fn
        return state

    def update(self, state: SVIState, batch: Batch) -> tuple[SVIState, Float[Array, ""]]:
        """Take a step; the loss is the negative ELBO per datum."""
        args, kwargs = self.read(batch)
        svi, held = self.bind(batch), state.mutable_state
        if held is None or _keeps_state(svi.loss):
            new, loss = svi.update(state, *args, **kwargs)
            return new, loss / self.num_data
        traced = self._traces(svi, state, args, kwargs)
        updated = {name: trace[name]["value"] for trace in traced for name in trace if name in held}
        svi.model, svi.guide = (_give_state(fn, held) for fn in (svi.model, svi.guide))
        new, loss = svi.update(state._replace(mutable_state=None), *args, **kwargs)
        return new._replace(mutable_state=updated), loss / self.num_data

    @cached_property
    def guarded_update(self) -> Callable[[SVIState, Batch], tuple[SVIState, Float[Array, ""]]]:
        """A compiled step that changes nothing but the key, and returns NaN, where it fails."""

        @jax.jit
        def step(state: SVIState, batch: Batch) -> tuple[SVIState, Float[Array, ""]]:
            new, loss = self.update(state, batch)
            ok = jnp.isfinite(loss) & all_finite(new)
            kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
            return kept._replace(rng_key=new.rng_key), jnp.where(ok, loss, jnp.nan)

        return step

    @cached_property
    def epoch(self) -> Callable[..., tuple[SVIState, Float[Array, "num_steps"], Bool[Array, ""]]]:
        """A compiled scan of steps over the rows that ``order(rng_key, epoch)`` gives them."""

        @partial(jax.jit, static_argnames="order")
        def scan(
            state: SVIState, arrays: tuple, rng_key: Array, epoch: Array, order: Order
        ) -> tuple:
            def step(state: SVIState, rows: Array) -> tuple[SVIState, Array]:
                return self.update(state, Batch(arrays, rows, None))

            state, losses = jax.lax.scan(step, state, order(rng_key, epoch))
            return state, losses, jnp.isfinite(losses).all() & all_finite(state)

        return scan

    @cached_property
    def evaluate(self) -> Callable[[Array, dict, Batch], Float[Array, ""]]:
        """A compiled negative ELBO per datum of one batch, networks in evaluation mode."""

        @jax.jit
        def loss(rng_key: Array, params: dict, batch: Batch) -> Float[Array, ""]:
            args, kwargs = self.read(batch)
            svi = self.bind(batch, evaluate=True)
            kwargs = {**kwargs, **svi.static_kwargs}
            model, guide = (_give_state(fn, params) for fn in (svi.model, svi.guide))
            return svi.loss.loss(rng_key, params, model, guide, *args, **kwargs) / self.num_data

        return loss

    def params(self, state: SVIState) -> dict[str, Any]:
        """Return the parameters, and the networks' other state with them."""
        return {**self.svi.get_params(state), **(state.mutable_state or {})}

    def culprit(self, state: SVIState, batch: Batch) -> str:
        """Say where a step stops being finite: the first such site, or the gradient."""
        with numpyro.validation_enabled(False):
            return self._culprit(state, batch)

    def _culprit(self, state: SVIState, batch: Batch) -> str:
        args, kwargs = self.read(batch)
        traces = self._traces(self.bind(batch), state, args, kwargs)
        for of, trace in zip(("guide", "model"), traces, strict=True):
            for name, site in trace.items():
                if site["type"] == "sample" and not _site_is_finite(site):
                    return f"site {name!r} of the {of}"
        return "the gradient"

    def _traces(self, svi: SVI, state: SVIState, args: tuple, kwargs: dict) -> tuple[dict, dict]:
        """Trace guide and model as a step of one particle does."""
        kwargs = {**kwargs, **svi.static_kwargs}
        model_key, guide_key = jax.random.split(jax.random.split(state.rng_key)[1])
        guide = handlers.substitute(handlers.seed(svi.guide, guide_key), self.params(state))
        guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
        model = handlers.substitute(handlers.seed(svi.model, model_key), self.params(state))
        model = handlers.replay(model, guide_trace)
        return guide_trace, handlers.trace(model).get_trace(*args, **kwargs)


def _keeps_state(loss: ELBO) -> bool:
    """Whether an objective returns the networks' new state; with several particles none does."""
    knows = type(loss).loss_with_mutable_state is not ELBO.loss_with_mutable_state
    return knows and loss.num_particles == 1


def _give_state(fn: Callable, state: dict[str, Any]) -> Callable:
    """Return a model, or a guide, that has its networks' state, out of the objective's sight."""
    return handlers.block(handlers.substitute(fn, data=state), hide_fn=_is_state)


def _is_state(msg: Any) -> bool:
    return msg["type"] == "mutable"


def _site_is_finite(site: dict) -> bool:
    log_prob = site["fn"].log_prob(site["value"])
    return bool(all_finite(site["value"]) & jnp.isfinite(log_prob).all())


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Return whether every floating-point value of a pytree is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]).all()
