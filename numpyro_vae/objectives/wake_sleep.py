"""Reweighted wake-sleep, which trains guides of discrete latents too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array
from numpyro.primitives import Messenger

from numpyro_vae.model.simulate import settle
from numpyro_vae.objectives.base import AbstractImportance, Particles, as_if, log_mean_exp
from numpyro_vae.objectives.rows import simulated_plates
from numpyro_vae.objectives.traces import Call, Trace, latents, scaled_log_prob, total

__all__ = ["ReweightedWakeSleep"]

Simulated = Callable[..., tuple[tuple, dict[str, Any]]]


class ReweightedWakeSleep(AbstractImportance):
    r"""Reweighted wake-sleep (Bornschein & Bengio 2015; Le et al. 2019).

    With :math:`K` draws of the guide, and their normalized importance weights :math:`\tilde w_k`
    in each row, the parameters of the model follow

    .. math::
        \nabla_\theta = \sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k)

    and those of the guide the sum of two directions, either of which may be left out:

    - wake: :math:`\sum_k \tilde w_k \nabla_\phi \log q_\phi(z_k \mid x)`, on the data;
    - sleep: :math:`\nabla_\phi \log q_\phi(z \mid x)` for :math:`z, x` drawn from the model.

    No draw is differentiated, so latents may be discrete, without enumeration. The value of the
    loss is minus the importance-weighted bound of `ImportanceWeightedELBO`. In a model with global
    latents one weight is shared by all sites; it takes all data at once.

    Args:
        num_particles: :math:`K`.
        wake_phi: whether the guide learns from the data.
        sleep: whether, and how, it learns from simulations: a function of the simulated values of
            the observed sites by name, followed by the model's own arguments, that returns the
            arguments ``(args, kwargs)`` of the guide for these values.
        vectorize_particles: as in every ELBO of NumPyro's.
        plate: the plate whose rows have weights of their own; by default that of an amortized
            guide, and for other guides all plates that the sites in plates share.

    Raises:
        ValueError: if the guide learns from neither; when it is used, if the guide has auxiliary
            sites and is to learn from simulations, which have no values for them.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, optax, numpyro.distributions as dist
        >>> from numpyro.infer import SVI
        >>> def model(x):
        ...     logits = numpyro.param("logits", jnp.zeros(2))
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.5))
        ...         numpyro.sample("x", dist.Bernoulli(logits=logits[z]), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.1)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> loss = ReweightedWakeSleep(8, sleep=lambda sites, x: ((sites["x"],), {}))
        >>> svi = SVI(model, guide, optax.adam(1e-2), loss)
        >>> svi.run(jax.random.key(0), 3, jnp.array([0, 1, 1]), progress_bar=False).losses.shape
        (3,)
    """

    can_infer_discrete = True
    shares_globals = False

    def __init__(
        self,
        num_particles: int = 8,
        *,
        wake_phi: bool = True,
        sleep: Simulated | None = None,
        vectorize_particles: bool | Callable[..., Any] = True,
        plate: str | None = None,
    ):
        if not wake_phi and sleep is None:
            raise ValueError(
                "wake_phi is False and sleep= is missing, so that the guide would learn from "
                "nothing. Set one of them, or both."
            )
        super().__init__(num_particles, vectorize_particles=vectorize_particles, plate=plate)
        self.wake_phi, self.sleep = wake_phi, sleep

    def combine(self, particles: Particles, rng_key: Array) -> tuple[Array, dict[str, Any]]:
        """Return minus the bound, with the gradients of the phases, and the networks' state."""

        def draw(key: Array, _: None) -> Trace:
            with _Constants():
                return particles.call.trace_guide(key)

        found, state = particles.run(draw)
        learned = found.model + (found.guide if self.wake_phi else 0.0)
        weights = stop_gradient(jax.nn.softmax(found.log_weights, axis=0))
        by_row = as_if(log_mean_exp(found.log_weights), (weights * learned).sum(0))
        loss = found.loss(by_row)
        if self.sleep is not None:
            dreamed = self._sleep(self.sleep, particles.call, rng_key)
            loss = loss - (dreamed - stop_gradient(dreamed))
        return loss, state

    @staticmethod
    def _sleep(sleep: Simulated, call: Call, rng_key: Array) -> Array:
        """Return the log density that the guide gives latents drawn with data from the model."""
        model_key, guide_key = jax.random.split(rng_key)
        dreaming = call._replace(params=stop_gradient(call.params))
        values, args, kwargs, settled = _dream(sleep, dreaming, model_key)
        trace = call._replace(args=args, kwargs=kwargs).trace_guide(guide_key, values)
        found = total(scaled_log_prob(site).sum() for site in _known(trace, values))
        return jnp.where(settled, found, jnp.nan)


def _dream(
    sleep: Simulated, call: Call, key: Array
) -> tuple[dict[str, Array], tuple, dict[str, Any], Array]:
    """Return values of the model's sites, arguments with the simulated data, and if they settle.

    See `numpyro_vae.model.simulate.settle`. The model is run once if the arguments of the guide are
    no arguments of the model's.
    """
    plates = simulated_plates(call.guide, call.trace_prior(key))
    leaves, treedef = jax.tree.flatten((call.args, call.kwargs))

    def draw(leaves: list[Any]) -> dict[str, Array]:
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        drawn, seen = call._replace(args=args, kwargs=kwargs).simulate(key, plates)
        return drawn | seen

    def put(leaves: list[Any], values: dict[str, Array]) -> list[Any]:
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        found, structure = jax.tree.flatten(sleep(values, *args, **kwargs))
        return found if structure == treedef else leaves

    values, leaves, settled = settle(draw, put, leaves)
    args, kwargs = jax.tree.unflatten(treedef, leaves)
    return values, *sleep(values, *args, **kwargs), settled


def _known(guide_trace: Trace, values: dict[str, Array]) -> list[dict[str, Any]]:
    """Return the latents of the guide, all of which have simulated values."""
    sites = latents(guide_trace)
    unknown = sorted(set(sites) - set(values))
    if unknown:
        raise ValueError(
            f"sleep= was given, and the guide has the sites {unknown}, for which a simulation from "
            "the model has no values, as with the joint families. Leave sleep= out, or use "
            "AutoAmortizedNormal or a guide written by hand."
        )
    return list(sites.values())


class _Constants(Messenger):
    """Makes constants of what the latents of a guide are drawn to be."""

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["value"], msg["intermediates"] = stop_gradient(msg["value"]), []
