"""NUTS for the global sites, the rows' latents integrated out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer.hmc import hmc

from numpyro_vae.data.batch import Batch
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.global_space import log_density_at
from numpyro_vae.inference.marginal import global_scale
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.numpyro_internals import end_adaptation
from numpyro_vae.repair.global_proposals import StudentT

NUM_CHAINS = 4
ITERATIONS = 250  # of a round: the first to adapt in
ROUNDS = (1, 1, 2, 4)  # before each look at what they have found
MAX_TREE_DEPTH = (5, 8)  # while adapting, and then
MAX_RHAT = 1.01
PAIRS = 2**16  # of a row and a particle that are differentiated at once


class Chains(NamedTuple):
    """Draws of chains, and what they say of themselves.

    Attributes:
        points: ``(number, size)``, chain by chain.
        rhat: the largest of any value.
        ess: the smallest of any value.
    """

    points: np.ndarray
    rhat: float
    ess: float


def run_chains(
    runner: Runner,
    rows: Rows,
    rng_key: Array,
    density_key: Array,
    particles: int,
    near: StudentT,
    min_ess: float,
) -> Chains:
    """Run chains until they agree and their draws suffice, or are too many.

    They sample the density that `marginal.log_density` estimates, all of its random numbers fixed.
    Their coordinates are those in which the distribution ``near`` is standard, and they start at
    draws of it.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        density_key: that of the density.
        particles: local draws of each row.
        near: a distribution near the posterior.
        min_ess: how many effective draws suffice.
    """
    parts, scale = _parts(rows.in_memory(), particles), global_scale(runner, rows)
    frame = tuple(jnp.asarray(x, float) for x in near)
    start_key, first, *keys = jax.random.split(rng_key, 2 + sum(ROUNDS))
    z = jax.random.normal(start_key, (NUM_CHAINS, len(near.loc)))
    state = (z, jnp.ones(NUM_CHAINS), jnp.ones_like(z))

    def advance(key: Array, state: tuple, *, adapts: bool) -> tuple:
        args = (parts, density_key, frame, state, key, jnp.array(adapts), jnp.array(scale))
        return runner.once(_advance, rows, *args, particles=particles)

    state, _ = advance(first, state, adapts=True)
    kept: list[np.ndarray] = []
    for rounds in ROUNDS:
        for _ in range(rounds):
            state, drawn = advance(keys[len(kept)], state, adapts=False)
            kept.append(drawn)
        found = _judged(np.concatenate(kept, axis=1))
        if found.rhat <= MAX_RHAT and found.ess >= min_ess:
            break
    return found


def _parts(rows: Rows, particles: int) -> tuple[Batch, Array, Array]:
    """Return the rows in batches of one size; see `log_density_at`."""
    number = rows.num_rows
    if rows.data.is_whole:
        return rows.whole(), jnp.arange(number)[None], jnp.ones((1, number))
    size = min(max(PAIRS // particles, 1), number)
    count = -(-number // size)
    places = np.arange(count * size).reshape(count, size)
    indices = jnp.asarray(places.clip(max=number - 1))
    return rows.batch(indices[0]), indices, jnp.asarray((places < number).astype(float))


def _advance(
    batch: EncodedBatch,
    parts: tuple[Batch, Array, Array],
    density_key: Array,
    frame: tuple[Array, Array],
    state: tuple[Array, Array, Array],
    rng_key: Array,
    adapts: Array,
    scale: Array,
    *,
    particles: int,
) -> tuple[tuple, Array]:
    """Run all chains for a round, and return where they are and their points."""
    loc, scale_tril = frame

    def energy(z: Array) -> Array:
        point = loc + scale_tril @ z
        density, log_det = log_density_at(batch, parts, density_key, point, particles=particles)
        return -(density / scale + log_det)

    def run(z: Array, step_size: Array, inverse_mass: Array, key: Array) -> tuple:
        init, step = hmc(potential_fn=energy, algo="NUTS")
        adapted = (ITERATIONS, step_size, inverse_mass)
        state = init(z, *adapted, max_tree_depth=MAX_TREE_DEPTH, rng_key=key)
        state = end_adaptation(state, ITERATIONS, adapts)

        def keep(state: tuple, _: None) -> tuple:
            state = step(state)
            return state, loc + scale_tril @ state.z

        state, drawn = jax.lax.scan(keep, state, None, ITERATIONS)
        adapted = state.adapt_state
        return (state.z, adapted.step_size, adapted.inverse_mass_matrix), drawn

    return jax.vmap(run)(*state, jax.random.split(rng_key, NUM_CHAINS))


def _judged(draws: np.ndarray) -> Chains:
    """Return points of chains ``(chains, draws, size)``, and what these say of themselves."""
    from arviz_stats.base import array_stats

    by_value = np.moveaxis(draws.astype(float), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # of chains that stood still
        rhat = array_stats.rhat(by_value, chain_axis=-2, draw_axis=-1)
        ess = array_stats.ess(by_value, chain_axis=-2, draw_axis=-1)
    worst = float(np.where(np.isnan(rhat), np.inf, rhat).max())
    return Chains(draws.reshape(-1, draws.shape[-1]), worst, float(np.nan_to_num(ess).min()))
