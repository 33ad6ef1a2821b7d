"""The ELBO with a weight on the divergence from the prior: beta-VAE, warm-up and cycles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from numpyro.primitives import mutable

from numpyro_vae.data.arguments import require_count
from numpyro_vae.model.plates import given_step
from numpyro_vae.objectives.base import AbstractDivergence
from numpyro_vae.objectives.traces import (
    Trace,
    divergence_of,
    samples,
    scaled_log_prob,
    total,
)

__all__ = ["AnnealedELBO", "count_steps", "cyclical"]

Schedule = Callable[[Any], Any]

COUNT = "numpyro_vae.num_steps"  # a mutable site
FAR = 2**30  # a step so late that a schedule that ever ends has ended


class Terms(NamedTuple):
    """The parts of an ELBO: what is observed, and the divergence of what is latent."""

    log_likelihood: Any
    divergence: Any


class AnnealedELBO(AbstractDivergence):
    r"""The ELBO in which the divergence of the latents from their prior has a weight.

    .. math::
        \mathbb{E}_q \log p(x \mid z) - \beta_t \, \mathrm{KL}(q(z \mid x) \,\|\, p(z))

    A number is the :math:`\beta` of Higgins et al. (2017); a schedule that rises to 1 keeps
    latents from collapsing while the decoder is not yet of use to them (Bowman et al. 2016). The
    divergence is analytic where NumPyro's ``TraceMeanField_ELBO`` has it so, with a condition on
    the order of sites that is described there, and sampled elsewhere. It counts likewise for local
    and global latents. With a weight of 1 the value is that of ``TraceMeanField_ELBO``, with
    which `fit` computes losses on validation data whatever the weight.

    In `fit` a schedule knows its step, early stopping waits until it has ended, and it has to
    end before training does. In an SVI of your own wrap the model in `count_steps`.

    Args:
        weight: :math:`\beta`, not negative, or an optax schedule of it in optimizer steps.
        num_particles: how many particles are averaged.
        vectorize_particles: as in every ELBO of NumPyro's.

    Raises:
        ValueError: if the weight is negative; when it is used, if nobody knows the step.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, optax, numpyro.distributions as dist
        >>> from numpyro_vae import AutoAmortizedNormal, fit
        >>> from numpyro.infer import SVI
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> loss = AnnealedELBO(optax.linear_schedule(0.0, 1.0, transition_steps=10))
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-3), loss)
        >>> x = jnp.linspace(-1.0, 1.0, 64)
        >>> options = {"batch_size": 16, "num_epochs": 3, "progress_bar": False}
        >>> fit(svi, jax.random.key(0), x, **options).losses.shape
        (12,)
    """

    def __init__(
        self,
        weight: float | Schedule,
        num_particles: int = 1,
        vectorize_particles: bool | Callable[..., Any] = True,
    ):
        if not callable(weight) and not weight >= 0:
            raise ValueError(f"weight is {weight}, expected a number from 0 on, or a schedule.")
        super().__init__(num_particles, vectorize_particles)
        self.weight = weight

    def settles_at(self, num_steps: int) -> int:
        """Return after how many steps the weight changes no more.

        Args:
            num_steps: how many are to be taken; beyond twice as many the answer is the first
                power of two times it at which the weight is the last one.
        """
        if not callable(self.weight):
            return 0
        schedule: Any = jax.vmap(self.weight)
        weights, last = schedule(jnp.arange(2 * num_steps)), schedule(jnp.array([FAR]))
        changing = np.flatnonzero(~np.isclose(weights, last))
        end = int(changing[-1]) + 1 if changing.size else 0
        while 2 * num_steps <= end < FAR and not np.isclose(schedule(jnp.array([end])), last):
            end *= 2
        return end

    def terms(self, guide_trace: Trace, model_trace: Trace) -> Terms:
        """Return the log likelihood, and the divergence of all that is latent."""
        likelihood, divergence = [], []
        for name, site in samples(model_trace).items():
            if site["is_observed"]:
                likelihood.append(scaled_log_prob(site).sum())
            else:
                divergence.append(divergence_of(guide_trace[name], site).sum())
        for name, site in samples(guide_trace).items():
            if name not in model_trace:
                divergence.append(scaled_log_prob(site).sum())
        return Terms(total(likelihood), total(divergence))

    def combine(self, terms: Terms, params: dict[str, Any]) -> Array:
        """Return minus the ELBO, with the weight at this step."""
        weight = self.weight(_step(params)) if callable(self.weight) else self.weight
        return weight * terms.divergence - terms.log_likelihood


def _step(params: dict[str, Any]) -> Any:
    """Return how many steps were taken before, as `fit` or a count says."""
    step = given_step()
    if step is not None:
        return step
    if COUNT not in params:
        raise ValueError(
            "The weight of AnnealedELBO is a schedule, and nobody knows the step. Train with "
            "numpyro_vae.fit, or count steps with SVI(count_steps(model), guide, ...); to evaluate "
            "a state, use the ELBO itself: svi.loss.validation.loss(key, params, model, guide, x)."
        )
    return params[COUNT]["value"]


def count_steps(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that counts the steps of an SVI, as state, for the schedule of an objective.

    `fit` counts by itself.

    Args:
        model: a NumPyro model.

    Example:
        >>> import jax, numpyro, optax, numpyro.distributions as dist
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = AnnealedELBO(optax.linear_schedule(0.0, 1.0, 10))
        >>> svi = SVI(count_steps(model), AutoNormal(model), optax.adam(1e-3), loss)
        >>> result = svi.run(jax.random.key(0), 3, progress_bar=False)
        >>> int(result.state.mutable_state["numpyro_vae.num_steps"]["value"])
        3
    """

    def counting(*args: Any, **kwargs: Any) -> Any:
        begin: Any = {"value": jnp.full((), -1)}  # as `SVI.init` runs the model too
        count: Any = mutable(COUNT, begin)
        count["value"] = count["value"] + 1
        return model(*args, **kwargs)

    return counting


def cyclical(num_cycles: int, steps_per_cycle: int, *, rising: float = 0.5) -> Schedule:
    """Return a schedule that rises from 0 to 1 in each cycle, and stays at 1 after the last.

    Each cycle rises linearly and stays at 1 until the next begins (Fu et al. 2019).

    Args:
        num_cycles: how many cycles.
        steps_per_cycle: the optimizer steps of each.
        rising: the part of a cycle that rises.

    Raises:
        ValueError: if a number is below 1, or ``rising`` is not above 0 and at most 1.

    Example:
        >>> schedule = cyclical(2, 10)
        >>> [float(schedule(step)) for step in (0, 5, 9, 10, 15, 99)]
        [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    """
    num_cycles = require_count("num_cycles", num_cycles)
    steps = require_count("steps_per_cycle", steps_per_cycle)
    if not 0 < rising <= 1:
        raise ValueError(f"rising is {rising}, expected a part of a cycle, above 0 and at most 1.")
    cycle = optax.linear_schedule(0.0, 1.0, max(1, round(rising * steps)))
    boundaries = [steps * number for number in range(1, num_cycles)]
    return optax.join_schedules([cycle] * num_cycles, boundaries)
