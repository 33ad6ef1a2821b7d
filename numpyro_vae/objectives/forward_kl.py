"""The divergence from the posterior to the guide, on simulated data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer.elbo import LossWithMutableState
from numpyro.primitives import Messenger

from numpyro_vae.model.redraw import lies_in
from numpyro_vae.model.simulate import (
    Latents,
    NotSimulableError,
    draw_outside,
    settle,
    simulate,
    simulated_latents,
)
from numpyro_vae.numpyro_internals import was_observed
from numpyro_vae.objectives.base import AbstractObjective
from numpyro_vae.objectives.rows import amortized, simulated_plates

__all__ = ["ForwardKL"]


class ForwardKL(AbstractObjective):
    r"""Trains a guide on simulations: its density of the latents that data were drawn with.

    The loss is :math:`-E_{p(z, x)} \log q(z \mid x)`, smallest where the guide is the posterior of
    every datum. As the mean of :math:`\mathrm{KL}(p(z \mid x) \| q(z \mid x))` over data, it covers
    all modes of a posterior, where the ELBO takes one (Papamakarios and Murray, *Fast
    epsilon-free Inference of Simulation Models with Bayesian Conditional Density Estimation*,
    NeurIPS 2016). The model is not trained by it, and needs no density.

    In `fit` on `Simulations` the latents are those of the source; elsewhere each step simulates
    data with the covariates among its arguments. An amortized guide's global latents are drawn from
    the guide itself, and are not trained; for a guide of one's own the model draws all latents.

    Example:
        >>> import optax, numpyro
        >>> from numpyro.infer import SVI
        >>> from numpyro_vae import AutoAmortizedNormal
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-2), ForwardKL())
        >>> result = svi.run(jax.random.key(0), 10, jnp.zeros(64), progress_bar=False)
        >>> result.losses.shape
        (10,)
    """

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> LossWithMutableState:
        """Return the loss, and the state of the guide's networks after it.

        It is NaN if simulated data change each time that the model is run on them.

        Raises:
            ValueError: if the model cannot draw a site, simulated data have no place among the
                arguments, or the guide has no density.
        """
        model_key, guide_key = jax.random.split(rng_key)
        params = jax.lax.stop_gradient(param_map)
        latents, settled = simulated_latents(), jnp.asarray(True)
        if latents is None:
            found = _simulated(model, guide, params, model_key, args, kwargs)
            latents, args, kwargs, settled = found
        seeded = handlers.seed(handlers.substitute(guide, data=param_map), guide_key)
        with handlers.block(), handlers.trace() as trace, _at(latents):
            seeded(*args, **kwargs)
        state = {name: msg["value"] for name, msg in trace.items() if msg["type"] == "mutable"}
        state = {name: x for name, x in param_map.items() if name.endswith("$state")} | state
        loss = jnp.where(settled, -_log_density(trace, latents), jnp.nan)
        return {"loss": loss, "mutable_state": state or None}


class _at(Messenger):  # noqa: N801
    """Let a guide take values for its sites, and remember which of them were drawn from the model.

    Args:
        latents: the values.
    """

    def __init__(self, latents: Latents):
        self.latents = latents
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        """Give a site its value; functions of an auxiliary site follow from that."""
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        drawn, pack = self.latents.drawn, msg["infer"].get("pack")
        if pack is not None:
            msg["value"] = pack(drawn)
        elif msg["name"] in drawn and not isinstance(msg["fn"], dist.Delta):
            msg["value"] = drawn[msg["name"]]
        elif msg["name"] in self.latents.given:
            msg["value"] = self.latents.given[msg["name"]]


def _log_density(trace: dict[str, Any], latents: Latents) -> Array:
    """Return the log-density of the latents that were drawn from the model."""
    total, has_density = jnp.zeros(()), False
    for name, msg in trace.items():
        if msg["type"] != "sample" or not (name in latents.drawn or "pack" in msg["infer"]):
            continue
        has_density |= not isinstance(msg["fn"], dist.Delta)
        log_prob = msg["fn"].log_prob(msg["value"])
        total += (log_prob if msg["scale"] is None else msg["scale"] * log_prob).sum()
    if not has_density:
        raise ValueError(
            f"The guide has no density at the latents {sorted(latents.drawn)}, which ForwardKL "
            "trains it on. Take a guide with one, such as AutoAmortizedNormal."
        )
    return total


def _simulated(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: dict[str, Any],
    rng_key: Array,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[Latents, tuple, dict[str, Any], Array]:
    """Return latents from the model, the arguments with data drawn with them, and if they settle.

    See `numpyro_vae.model.simulate.settle`.
    """
    guide_key, model_key = jax.random.split(rng_key)
    given = _outside(guide, params, guide_key, args, kwargs)
    seeded = handlers.seed(handlers.substitute(model, data=params), model_key)
    with handlers.block(), handlers.trace() as trace:
        seeded(*args, **kwargs)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    seen = {name: site for name, site in sites.items() if was_observed(site)}
    plates = simulated_plates(guide, trace)
    values = {name: site["value"] for name, site in seen.items() if lies_in(site, plates)}
    places = {name: _places(name, value, leaves) for name, value in values.items()}

    def draw(leaves: list[Any]) -> tuple[Latents, dict[str, Array]]:
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        latents, seen = simulate(model, params, given, model_key, args, kwargs, plates)
        return latents, {name: seen[name]["value"] for name in places}

    def put(leaves: list[Any], made: tuple[Latents, dict[str, Array]]) -> list[Any]:
        held = {number: name for name, numbers in places.items() for number in numbers}
        new = {number: made[1][name].astype(leaves[number].dtype) for number, name in held.items()}
        return [new.get(number, leaf) for number, leaf in enumerate(leaves)]

    (latents, _), leaves, settled = settle(draw, put, leaves)
    return jax.lax.stop_gradient(latents), *jax.tree.unflatten(treedef, leaves), settled


def _places(name: str, value: Any, leaves: list[Any]) -> list[int]:
    """Return the numbers of the arguments that are what a site observes."""
    found = [number for number, leaf in enumerate(leaves) if leaf is value]
    if not found:
        raise NotSimulableError(
            f"The observed values of site {name!r} are not one of the model's arguments as it "
            "stands, so simulated ones cannot be put in its place. Train with fit on "
            "Simulations(num_data, like=data, to_data=...)."
        )
    return found


def _outside(
    guide: Any, params: dict[str, Any], rng_key: Array, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return an amortized guide's draw of its global sites; nothing of other guides."""
    found = amortized(guide)
    if found is None:
        return {}
    return draw_outside(guide, params, rng_key, found.plate.name, args, kwargs)
