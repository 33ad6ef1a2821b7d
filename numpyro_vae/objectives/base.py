"""The two kinds of objectives, and what each of them has to say.

An objective is an ELBO of NumPyro's. One that counts the divergence from the prior otherwise
writes two methods of `AbstractDivergence`: ``terms`` of one run of guide and model, and
``combine`` of their means over particles. One that weighs particles against each other writes
``combine`` of `AbstractImportance`, which runs particles and makes a loss of their densities.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array
from numpyro.infer import TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO, LossWithMutableState

from numpyro_vae.numpyro_internals import Objective, check_mean_field
from numpyro_vae.objectives.rows import Densities, Rows, densities_of, find_rows
from numpyro_vae.objectives.traces import Call, Trace, latents, mutable_state, values_of


class AbstractObjective(Objective):
    """An objective, and what `fit` asks of it."""

    @property
    def validation(self) -> ELBO:
        """The objective whose value `fit` compares on validation data: by default this one."""
        return self

    def settles_at(self, num_steps: int) -> int:
        """Return after how many optimizer steps the objective changes no more.

        Args:
            num_steps: how many are to be taken.
        """
        del num_steps
        return 0


class AbstractDivergence(AbstractObjective):
    """An ELBO in which the divergences of latent sites from their prior count otherwise.

    Particles have the keys that they have in NumPyro's ``TraceMeanField_ELBO``.
    """

    @property
    def validation(self) -> ELBO:
        """The ELBO, in which divergences count in full."""
        vectorize: Any = self.vectorize_particles
        return TraceMeanField_ELBO(self.num_particles, vectorize)

    @abstractmethod
    def terms(self, guide_trace: Trace, model_trace: Trace) -> Any:
        """Return of one run what is averaged over particles, a pytree of arrays."""

    @abstractmethod
    def combine(self, terms: Any, params: dict[str, Any]) -> Array:
        """Return the loss.

        Args:
            terms: the means over particles.
            params: parameters, and the networks' state before the step.
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
        """Return the loss, and the networks' state that the first particle leaves."""
        call = Call(param_map, model, guide, args, kwargs)

        def particle(key: Array) -> tuple[Any, dict[str, Any]]:
            model_key, guide_key = jax.random.split(key)
            guide_trace = call.trace_guide(guide_key)
            model_trace = call.trace_model(guide_trace, model_key)
            check_mean_field(model_trace, guide_trace)
            return self.terms(guide_trace, model_trace), mutable_state(guide_trace, model_trace)

        if self.num_particles == 1:
            terms, state = particle(rng_key)
        else:
            keys = jax.random.split(rng_key, self.num_particles)
            terms, state = self.vectorize_particles_fn(particle, keys)
            terms = jax.tree.map(lambda term: term.mean(0), terms)
            state = jax.tree.map(operator.itemgetter(0), state)
        return {"loss": self.combine(terms, param_map), "mutable_state": state or None}


class Particles(NamedTuple):
    """The particles of a step: how they are run, and with what keys.

    Attributes:
        call: model and guide.
        rows: those that have weights of their own.
        local: by latent of the guide inside the rows its number of event dimensions.
        shared: values of the latents outside the rows, the same for all particles.
        keys: one for each particle.
        map: maps a function over a leading axis.
    """

    call: Call
    rows: Rows
    local: dict[str, int]
    shared: dict[str, Any]
    keys: Any
    map: Callable[..., Any]

    def run(
        self, draw: Callable[[Array, Any], Trace], inputs: Any = None
    ) -> tuple[Densities, dict[str, Any]]:
        """Run all particles.

        Args:
            draw: runs the guide, given a key and a particle's part of the inputs.
            inputs: arrays with the particles along the leading axis, or None.

        Returns:
            The densities, and the networks' state that the first particle leaves.
        """

        def particle(pair: tuple[Array, Any]) -> tuple[Densities, dict[str, Any]]:
            key, own = pair
            model_key, guide_key = jax.random.split(key)
            guide_trace = draw(guide_key, own)
            model_trace = self.call.trace_model(guide_trace, model_key)
            found = densities_of(self.rows, guide_trace, model_trace)
            return found, mutable_state(guide_trace, model_trace)

        found, state = self.map(particle, (self.keys, inputs))
        return found, jax.tree.map(operator.itemgetter(0), state)


def log_mean_exp(log_weights: Array) -> Array:
    """Return the logarithm of the mean over the leading axis."""
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(len(log_weights))


def as_if(value: Array, other: Array) -> Array:
    """Return a value with the gradient of another."""
    return stop_gradient(value) + (other - stop_gradient(other))


class AbstractImportance(AbstractObjective):
    """A bound from the importance weights of several particles, of each row by itself.

    Rows are those of the plates that all local sites share. Local are the sites in the plate of an
    amortized guide, or else those in any plate. Latents outside the rows are drawn once for all
    particles. Where a site outside depends on local latents, or there are no such plates, all sites
    together have one weight, as in NumPyro's ``RenyiELBO``, whose keys the particles have.

    Args:
        num_particles: how many particles.
        vectorize_particles: as in every ELBO of NumPyro's.
        plate: the plate whose rows have weights of their own, if another.
    """

    shares_globals = True  # or else models with global latents get one weight for all sites

    def __init__(
        self,
        num_particles: int,
        *,
        vectorize_particles: bool | Callable[..., Any] = True,
        plate: str | None = None,
    ):
        super().__init__(num_particles, vectorize_particles)
        self.plate = plate

    @abstractmethod
    def combine(self, particles: Particles, rng_key: Array) -> tuple[Array, dict[str, Any]]:
        """Return the loss, and the networks' state."""

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> LossWithMutableState:
        """Return the loss, and the networks' state that the first particle leaves."""
        plate_key, particle_key = jax.random.split(rng_key)
        call = Call(param_map, model, guide, args, kwargs, plate_key)
        shared_key, own_key = jax.random.split(jax.random.fold_in(rng_key, 1))
        rows, local = find_rows(call, shared_key, self.plate, shares_globals=self.shares_globals)
        shared = {}
        if rows.plates:  # or else all is in the rows
            drawn = values_of(latents(call.trace_guide(shared_key)))
            shared = {name: value for name, value in drawn.items() if name not in local}
        keys = jax.random.split(particle_key, self.num_particles)
        particles = Particles(call, rows, local, shared, keys, self.vectorize_particles_fn)
        loss, state = self.combine(particles, own_key)
        return {"loss": loss, "mutable_state": state or None}
