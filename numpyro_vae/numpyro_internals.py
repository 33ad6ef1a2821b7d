"""Every use of NumPyro that its documentation does not promise; each has a test of its own.

`tests/test_numpyro_internals.py` fails when NumPyro changes one of them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, init_to_sample
from numpyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
)
from numpyro.infer.elbo import ELBO, _check_mean_field_requirement
from numpyro.infer.hmc import HMCState
from numpyro.infer.util import transform_fn
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import _PYRO_STACK, Messenger, apply_stack
from numpyro.util import _validate_model, check_model_guide_match

# Handlers sit in one stack for all threads: what runs a model holds this, so that no other
# thread's handlers see its sites. Compiled code runs none.
HANDLERS = threading.RLock()


def in_one_thread(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs, or traces, a model for one thread at a time."""

    @wraps(fn)
    def call(*args: Any) -> Any:
        with HANDLERS:
            return fn(*args)

    return call


def mask_of_masked(fn: dist.MaskedDistribution) -> Any:
    """Return the mask of ``fn.mask(...)``: an array, or a bool for all values."""
    return fn._mask


def is_switched_off(fn: Any) -> bool:
    """Return whether a distribution is masked as a whole, by a ``False`` and not by an array."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution) and fn._mask is False:
            return True
        fn = fn.base_dist
    return False


def declared_scale(msg: dict[str, Any]) -> Any:
    """Return the factor that ``handlers.scale`` gives a site, without those of plates, or None."""
    return msg.get("plate_to_scale", {}).get(None)


def checked_support(fn: Any) -> tuple[str, Any] | None:
    """Return the name of a distribution, and the support outside of which its density is 0.

    Returns:
        None if it does not compare values with its support, by ``validate_args=False``.
    """
    support = fn.support
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return (type(fn).__name__, support) if fn._validate_args and support is not None else None


def plate_indices(plate: Any) -> Array:
    """Return the rows that a plate holds."""
    return plate._indices


def declare_plate(name: str, size: int, length: int) -> tuple[int, Array, bool]:
    """Show a plate to the enclosing handlers, as ``numpyro.plate(name, size, length)`` does.

    Returns:
        The size and the indices that they give it, and whether the indices are drawn, or of a
        handler's making: a plate that holds all of its rows has ``arange(size)`` otherwise.
    """
    watch = _Watch()
    with watch:
        numpyro.plate(name, size, length)
    return watch.size, watch.after, watch.after is not watch.before


def ask_handlers(kind: str, **message: Any) -> Any:
    """Return what an enclosing handler sets as the value of a message of a type of our own.

    It has no name, and so ``handlers.trace`` does not record it.
    """
    found = {"type": kind, "fn": _nothing, "args": (), "kwargs": {}, "value": None, **message}
    apply_stack(found)
    return found["value"]


def _nothing() -> None:
    """Be the value of a message that no handler has answered."""


class _Watch(Messenger):
    """Remembers what the message of a plate comes with, and what it leaves with."""

    before: Any = None
    after: Any = None
    size: int = 0

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            self.before = msg["value"]

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            self.after, self.size = msg["value"], msg["args"][0]


class outwards(Messenger):  # noqa: N801
    """Lets what is sent within ``send`` reach the handlers around this one, and no others."""

    def __enter__(self) -> None:
        self._depth = len(_PYRO_STACK)
        super().__enter__()

    def send(self, msg: dict[str, Any], *within: Any) -> dict[str, Any]:
        """Send a message to the handlers around this one, and further ones within those."""
        inner = _PYRO_STACK[self._depth :]
        del _PYRO_STACK[self._depth :]
        try:
            with ExitStack() as stack:
                for handler in within:
                    stack.enter_context(handler)
                apply_stack(msg)
        finally:
            _PYRO_STACK.extend(inner)
        return msg


def was_observed(site: dict[str, Any]) -> bool:
    """Return whether a site of a trace is observed, or was before ``handlers.uncondition``."""
    return site["is_observed"] or site["infer"].get("was_observed", False)


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


EVALUATION = "numpyro_vae.evaluation"  # the type of a message that asks for `evaluation`


class evaluation(Messenger):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """Let the guides of this library within be in evaluation mode, whatever wraps them."""

    def process_message(self, msg: Any) -> None:
        """Answer."""
        if msg["type"] == EVALUATION:
            msg["value"] = True


def is_training() -> bool:
    """Return whether an objective runs the guide: `Predictive` runs it under ``mask(False)``."""
    return numpyro.get_mask() is not False and ask_handlers(EVALUATION) is None


def is_set_up(guide: AutoGuide) -> bool:
    """Return whether an automatic guide has read its model."""
    return guide.prototype_trace is not None


def set_up(guide: AutoGuide, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> None:
    """Let an automatic guide read its model, which it does when it is first called."""
    if not is_set_up(guide):
        with handlers.block(), handlers.seed(rng_seed=0), handlers.substitute(data=params):
            guide(*args, **kwargs)


def init_model_key(rng_key: Array) -> Array:
    """Return the key that ``SVI.init`` seeds the model with."""
    return jax.random.split(rng_key, 3)[1]


def param_transforms(svi: SVI) -> dict[str, Any] | None:
    """Return by parameter the transform from unconstrained values; None before ``SVI.init``."""
    constrain: Any = svi.constrain_fn
    return None if constrain is None else constrain.args[0]


def set_param_transforms(svi: SVI, transforms: dict[str, Any]) -> None:
    """Leave an SVI as ``SVI.init`` does that has found these transforms."""
    svi.constrain_fn = partial(transform_fn, transforms)


def with_param_transforms(svi: SVI, transforms: dict[str, Any]) -> SVI:
    """Return a copy of an SVI that has been initialized with these transforms."""
    svi = copy.copy(svi)
    set_param_transforms(svi, transforms)
    return svi


def stop_gradients(svi: SVI, names: frozenset[str]) -> None:
    """Let an SVI that has been initialized give some of its parameters no gradient."""
    if names:
        constrain: Any = partial(_constrain_rest, svi.constrain_fn, names)
        svi.constrain_fn = constrain


def _constrain_rest(constrain: Any, names: frozenset[str], params: dict[str, Any]) -> Any:
    found = constrain(params).items()
    return {name: jax.lax.stop_gradient(x) if name in names else x for name, x in found}


class Objective(ELBO):
    """An ELBO of this library's: of NumPyro's it differs in three ways, which the next ones ask.

    Discrete latents are drawn and never summed over, a site's scale may differ by row, and the
    networks' new state is that of the first of several particles.
    """


def enumerates(loss: ELBO) -> bool:
    """Return whether an objective sums over discrete latents that are marked for it."""
    return loss.can_infer_discrete and not isinstance(loss, TraceGraph_ELBO | Objective)


def takes_row_weights(loss: ELBO) -> bool:
    """Return whether a site's scale may differ by row: objectives for discrete latents need one."""
    return isinstance(loss, Objective) or not loss.can_infer_discrete


def returns_mutable_state(loss: ELBO) -> bool:
    """Return whether an objective returns the networks' new state; of several particles none."""
    if isinstance(loss, Objective):
        return True
    knows = type(loss).loss_with_mutable_state is not ELBO.loss_with_mutable_state
    return knows and loss.num_particles == 1


def in_order(loss: ELBO) -> ELBO:
    """Return an objective that adds up the sites in the same order in every process.

    ``Trace_ELBO`` adds them in the order of a set of names, which Python changes from process to
    process, and with it the last bits of the sum.
    """
    return _InOrder(loss) if type(loss) is Trace_ELBO and loss.sum_sites else loss


class _InOrder(ELBO):
    """A ``Trace_ELBO`` whose sites are added up by name."""

    def __init__(self, loss: Trace_ELBO):
        super().__init__(loss.num_particles, loss.vectorize_particles)
        self._by_site = copy.copy(loss)
        self._by_site.sum_sites = False

    def loss_with_mutable_state(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = self._by_site.loss_with_mutable_state(*args, **kwargs)
        by_site = found["loss"]
        return {**found, "loss": sum((by_site[name] for name in sorted(by_site)), jnp.zeros(()))}


def seed_plates(fn: Callable[..., Any], rng_key: Array) -> Callable[..., Any]:
    """Return a model, or a guide, whose plates choose their rows by a key of their own."""
    return handlers.seed(fn, rng_key, hide_types=["sample", "prng_key", "control_flow"])


def check_traces(model_trace: dict[str, Any], guide_trace: dict[str, Any]) -> None:
    """Warn, or raise, where model and guide do not belong together, as NumPyro's objectives do."""
    check_model_guide_match(model_trace, guide_trace)
    _validate_model(model_trace, plate_warning="loose")


def check_mean_field(model_trace: Any, guide_trace: Any) -> None:
    """Warn where analytic divergences may be wrong, as NumPyro's objective with such does."""
    _check_mean_field_requirement(model_trace, guide_trace)


def dependencies(
    fn: Callable[..., dict[str, Array]], values: dict[str, Any]
) -> dict[str, frozenset[str]]:
    """Return by result of a function the keyword arguments that it depends on."""
    return eval_provenance(fn, **values)


def particle_keys(state_key: Array, num_particles: int) -> list[tuple[Array, Array]]:
    """Return the random keys of model and guide of each particle in the next step of an SVI."""
    step_key = jax.random.split(state_key)[1]
    keys = [step_key] if num_particles == 1 else jax.random.split(step_key, num_particles)
    pairs = (jax.random.split(key) for key in keys)
    return [(model_key, guide_key) for model_key, guide_key in pairs]


def with_hidden_state(fn: Callable[..., Any], state: dict[str, Any]) -> Callable[..., Any]:
    """Return a model, or a guide, that reads network state the objective does not see."""
    return handlers.block(
        handlers.substitute(fn, data=state), hide_fn=lambda msg: msg["type"] == "mutable"
    )


def end_adaptation(state: HMCState, num_warmup: int, adapt: Array) -> HMCState:
    """Return a state of HMC that adapts no more, unless ``adapt``: past its warmup none does."""
    return state._replace(i=jnp.where(adapt, state.i, num_warmup))


def guide_parts(guide: AutoGuideList) -> list[Any]:
    """Return the guides that a list of guides is made of."""
    return list(guide._guides)


def diagonal_parts(guide: AutoDiagonalNormal) -> dict[str, tuple[Any, list[Any], Array, Array]]:
    """Return by site its prior, new plates around it, and ``loc`` and ``scale`` of its values.

    Both have the shape of the site's unconstrained value, and are read from parameters that the
    enclosing handlers give.
    """
    normal, plates = guide._get_posterior(), guide._create_plates()
    unpack: Any = guide._unpack_latent
    locs, scales = (unpack(x) for x in (normal.loc, normal.scale))
    prototype: Any = guide.prototype_trace
    return {
        name: (
            prototype[name]["fn"],
            [plates[frame.name] for frame in prototype[name]["cond_indep_stack"]],
            loc,
            scales[name],
        )
        for name, loc in locs.items()
    }


def batched_site(guide: Any) -> tuple[str, Any, str] | None:
    """Return the site, its prior and its plate of a guide with a Normal for each row.

    NumPyro cuts the vector of all latents into as many equal parts as there are rows. A part is a
    row of the data if there is one site, in one plate; of several, one after another in that
    vector, it has values of several rows. Then, or if it has not been set up, None is returned.
    """
    trace: Any = guide.prototype_trace or {}
    latent = [msg for msg in trace.values() if msg["type"] == "sample" and not msg["is_observed"]]
    if len(latent) != 1 or guide.batch_ndim != 1 or len(latent[0]["fn"].batch_shape) != 1:
        return None
    (frames,) = (msg["cond_indep_stack"] for msg in latent)
    return (latent[0]["name"], latent[0]["fn"], frames[0].name) if len(frames) == 1 else None


def batched_parts(guide: Any, plate: str) -> tuple[Any, Any]:
    """Return the Normals of all rows of such a guide, and a new plate around them."""
    return guide._get_batched_posterior(), guide._create_plates()[plate]


def laplace_run(guide: AutoLaplaceApproximation, params: dict[str, Any]) -> Callable[..., Any]:
    """Return the guide with the Normal that it is after training in place of a point."""
    found = copy.copy(guide)
    posterior = guide.get_posterior(params)
    found._get_posterior = lambda: posterior  # what `AutoContinuous` draws from
    return found
