"""NUTS for the latents of a datum, many data at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from numpyro.infer.hmc import hmc

from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.numpyro_internals import end_adaptation
from numpyro_vae.repair.proposals import location_and_scale

NUM_CHAINS = 4
ITERATIONS = 250  # of a round: the first to adapt in
ROUNDS = (2, 2, 4, 8)  # before each look at what they have found
MAX_TREE_DEPTH = (5, 8)  # while adapting, and then: all chains wait for the longest trajectory


class Chains(NamedTuple):
    """Where chains are, and what they have adapted to.

    Attributes:
        z: standardized, ``(rows, held, chains, size)``.
        step_size: ``(rows, held, chains)``.
        inverse_mass: the diagonal of the inverse mass matrix, as ``z``.
    """

    z: Any
    step_size: Any
    inverse_mass: Any


class Frame(NamedTuple):
    """Coordinates ``z`` in which a row's posterior is about standard.

    Attributes:
        center: packed latents, ``(rows, size)``.
        scale_tril: the Cholesky factor of their covariance, ``(rows, size, size)``.
    """

    center: Any
    scale_tril: Any

    @classmethod
    def around(
        cls, draws: Float[np.ndarray, "rows draws size"], ess: Float[np.ndarray, "rows"]
    ) -> Frame:
        """Return the frame of draws, whose correlations count by how many of them do."""
        center, scale_tril = location_and_scale(draws, ess, 1e-3)
        return cls(center.astype(draws.dtype), scale_tril.astype(draws.dtype))

    def standardize(self, packed: Float[np.ndarray, "rows draws size"]) -> np.ndarray:
        """Return the coordinates of draws."""
        centered = np.moveaxis(packed - self.center[:, None], 1, 2)
        return np.moveaxis(np.linalg.solve(self.scale_tril, centered), 1, 2)


def start_chains(near: Float[np.ndarray, "rows draws size"], frame: Frame, size: int) -> Chains:
    """Return chains that have not moved, for each of ``size`` values of the global sites.

    They start at draws that are far apart: chains that started in different modes do not agree, and
    so the modes are not overlooked.
    """
    z = frame.standardize(near)
    far = np.stack([_far_apart(row) for row in z])
    starts = np.repeat(far[:, None], size, axis=1).astype(near.dtype)
    return Chains(starts, np.ones(starts.shape[:3], near.dtype), np.ones_like(starts))


def _far_apart(draws: Float[np.ndarray, "draws size"]) -> Float[np.ndarray, "chains size"]:
    """Return draws of which each is as far from those before as can be."""
    places = [0]
    distance = ((draws - draws[0]) ** 2).sum(-1)
    for _ in range(NUM_CHAINS - 1):
        places.append(int(distance.argmax()))
        distance = np.minimum(distance, ((draws - draws[places[-1]]) ** 2).sum(-1))
    return draws[places]


def advance(
    runner: Runner,
    rows: Rows,
    rng_key: Array,
    held: dict[str, Any],
    frame: Frame,
    chains: Chains,
    *,
    adapt: bool,
) -> tuple[Chains, np.ndarray]:
    """Run the chains of rows for a round, given each value of the global sites.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key, another one for each round.
        held: values of the global sites, a leading axis of them.
        frame: the coordinates that chains run in.
        chains: where they are.
        adapt: whether step size and mass matrix adapt, and the draws are to be dropped.

    Returns:
        Where the chains have come to, and packed draws, ``(rows, held, chains, iterations, size)``.
    """
    return runner.per_row(_advance_row, rows, (chains, frame), rng_key, held, jnp.array(adapt))


def _advance_row(
    batch: EncodedBatch,
    place: Array,
    of_row: tuple[Chains, Frame],
    rng_key: Array,
    held: dict[str, Array],
    adapt: Array,
) -> tuple[Chains, Array]:
    """Run the chains of the row at a place of the batch.

    What the model masks has no density; a standard one keeps the chains in place there.
    """
    chains, frame = of_row
    length, mask = batch.encoding.run.plate.length, batch.encoding.mask

    def energy(z: Array, held: dict[str, Array]) -> Array:
        packed = jnp.broadcast_to(frame.center + frame.scale_tril @ z, (length, z.size))
        energy = -logsumexp(batch.log_joint(packed, held, rng_key), axis=0)[place]
        return energy if mask is None else energy + jnp.where(mask[place], 0, z**2 / 2).sum()

    def run(chain: Chains, held: dict[str, Array], key: Array) -> tuple[Chains, Array]:
        init, step = hmc(potential_fn=lambda z: energy(z, held), algo="NUTS")
        state = init(
            chain.z,
            ITERATIONS,
            chain.step_size,
            chain.inverse_mass,
            max_tree_depth=MAX_TREE_DEPTH,
            rng_key=key,
        )
        state = end_adaptation(state, ITERATIONS, adapt)

        def keep(state: Any, _: None) -> tuple[Any, Array]:
            state = step(state)
            return state, frame.center + frame.scale_tril @ state.z

        state, draws = jax.lax.scan(keep, state, None, ITERATIONS)
        adapted = state.adapt_state
        return Chains(state.z, adapted.step_size, adapted.inverse_mass_matrix), draws

    key = jax.random.fold_in(rng_key, batch.indices[place])
    keys = jax.random.split(key, chains.step_size.shape)
    return jax.vmap(jax.vmap(run, (0, None, 0)))(chains, held, keys)
