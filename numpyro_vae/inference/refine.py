"""Optimizes a datum's own variational parameters, starting from what the network says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.inference.encoded import EncodedBatch

LEARNING_RATE = 0.05  # falls to zero
PARTICLES = 16
NUM_STEPS = 500
JUDGES = 256  # draws by which what was found is compared with where it began
STILL = 0.05  # nats: a bound that rises by less in the second half of the steps has converged


def refine(
    batch: EncodedBatch, rng_key: Array, globals_: dict[str, Array]
) -> tuple[EncodedBatch, Bool[Array, "batch"]]:
    r"""Maximize each datum's ELBO over its own variational parameters, all data at once.

    The guide is semi-amortized (Kim et al., *Semi-Amortized Variational Autoencoders*, ICML 2018):
    the raw outputs of its heads, or the features of a head that reads other sites, are optimized
    by Adam. The gradient is that of the path alone, whose variance vanishes where the guide is
    exact (Roeder, Wu and Duvenaud, *Sticking the Landing*, NeurIPS 2017). A datum that ends no
    better than it began keeps what the network said.

    Args:
        batch: the batch.
        rng_key: the random key.
        globals_: draws of the global sites, of which each particle has one.

    Returns:
        The batch with the encoding that was found, and which data have converged.
    """
    batch = release(batch)
    start, steps_key, last_key = features_of(batch), *jax.random.split(rng_key)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, NUM_STEPS))

    def loss(features: Any, key: Array) -> tuple[Array, Array]:
        elbo = log_weights(_given(batch, features), key, globals_, PARTICLES).mean(0)
        return -elbo.sum(), elbo

    def step(state: tuple, key: Array) -> tuple[tuple, Array]:
        features, moments = state
        grads, elbo = jax.grad(loss, has_aux=True)(features, key)
        updates, moments = optimizer.update(jax.tree.map(jnp.nan_to_num, grads), moments)
        return (optax.apply_updates(features, updates), moments), elbo

    state = (start, optimizer.init(start))
    (end, _), trace = jax.lax.scan(step, state, jax.random.split(steps_key, NUM_STEPS))
    before, after = (
        log_weights(_given(batch, features), last_key, globals_, JUDGES).mean(0)
        for features in (start, end)
    )
    better = jnp.nan_to_num(after, nan=-jnp.inf) > before
    kept = jax.tree.map(lambda new, old: jnp.where(_rows(better, new), new, old), end, start)
    return _given(batch, kept), _converged(trace)


def release(batch: EncodedBatch) -> EncodedBatch:
    """Return the batch with each datum's own variational parameters as features."""
    return replace(batch, encoding=_featured(batch).release())


def features_of(batch: EncodedBatch) -> Any:
    """Return what the guide's heads read of each row, of an encoding that `has_features`."""
    return dict(_featured(batch).features)


def _featured(batch: EncodedBatch) -> Encoding:
    if not isinstance(batch.encoding, Encoding):
        raise TypeError("The guide has no features.")
    return batch.encoding


def _given(batch: EncodedBatch, features: Any) -> EncodedBatch:
    return replace(batch, encoding=replace(_featured(batch), features=features))


def log_weights(
    batch: EncodedBatch, rng_key: Array, globals_: dict[str, Array], num_samples: int
) -> Float[Array, "num_samples batch"]:
    """Return the log weights of draws, each with one of the draws of the global sites.

    Their gradient is that of the path alone.
    """
    draw_key, pick_key, noise_key = jax.random.split(rng_key, 3)
    count = len(next(iter(globals_.values()))) if globals_ else 1
    picked = jax.random.randint(pick_key, (num_samples,), 0, count)
    given = {name: value[picked] for name, value in globals_.items()}
    draws = batch.draw(draw_key, num_samples, given)
    still = _given(batch, jax.lax.stop_gradient(features_of(batch)))

    def weigh(draw: Array, given: dict[str, Array]) -> Array:
        return still.log_weight(draw, given, noise_key)

    return batch.over_draws(weigh, draws, given)


def _rows(better: Array, like: Array) -> Array:
    return better.reshape(-1, *[1] * (like.ndim - 1))


def _converged(trace: Float[Array, "num_steps batch"]) -> Array:
    """Return whether the last tenth of the steps is no better than the tenth in the middle."""
    tenth = max(len(trace) // 10, 1)
    middle, last = trace[len(trace) // 2 :][:tenth], trace[-tenth:]
    noise = jnp.sqrt((middle.var(0) + last.var(0)) / tenth)
    return last.mean(0) - middle.mean(0) < STILL + 3 * noise
