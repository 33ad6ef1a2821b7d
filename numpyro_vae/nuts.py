"""NUTS for the latents of a datum, many data at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from numpyro.infer.hmc import hmc

from numpyro_vae.rows import Rows
from numpyro_vae.rowwise import Rowwise
from numpyro_vae.views import View

MAX_TREE_DEPTH = 8  # all data wait for the longest trajectory


def run_nuts(
    rowwise: Rowwise,
    rows: Rows,
    rng_key: Array,
    held: dict[str, Any],
    start: Float[np.ndarray, "rows chains size"],
    center: Float[np.ndarray, "rows size"],
    scale: Float[np.ndarray, "rows size"],
    *,
    num_warmup: int,
    num_samples: int,
) -> np.ndarray:
    """Sample each row's latents with NUTS, given values of the global sites.

    Chains run in ``(z - center) / scale``, in which the posterior is about standard, and adapt
    from there.

    Args:
        rowwise: the trained guide.
        rows: the data; a row may be chosen more than once.
        rng_key: the random key.
        held: for each of them the values of the global sites.
        start: packed latents that chains start at.
        center: packed latents, about the posterior's mean.
        scale: about its standard deviation.
        num_warmup: iterations of each chain to adapt in, which are dropped.
        num_samples: iterations kept.

    Returns:
        Packed draws, ``(rows, chains, num_samples, size)``.
    """
    by_row = jax.tree.map(jnp.asarray, (start, center, scale, held))
    sizes = {"num_warmup": num_warmup, "num_samples": num_samples}
    return rowwise.apply_each(_sample_row, rows, by_row, rng_key, **sizes)


def _sample_row(
    view: View,
    place: Array,
    by_row: tuple[Array, Array, Array, dict[str, Array]],
    rng_key: Array,
    *,
    num_warmup: int,
    num_samples: int,
) -> Array:
    """Run the chains of the row at a place of the view.

    What the model masks has no density; a standard one keeps the chains in place there.
    """
    start, center, scale, held = by_row
    length, mask = view.encoding.run.plate.length, view.encoding.mask

    def potential(standard: Array) -> Array:
        packed = jnp.broadcast_to(center + scale * standard, (length, center.size))
        energy = -logsumexp(view.log_joint(packed, held, rng_key), axis=0)[place]
        return energy if mask is None else energy + jnp.where(mask[place], 0, standard**2 / 2).sum()

    def chain(start: Array, key: Array) -> Array:
        init, step = hmc(potential_fn=potential, algo="NUTS")
        state = init(
            (start - center) / scale, num_warmup, max_tree_depth=MAX_TREE_DEPTH, rng_key=key
        )
        state = jax.lax.fori_loop(0, num_warmup, lambda _, state: step(state), state)

        def keep(state: Any, _: None) -> tuple[Any, Array]:
            state = step(state)
            return state, state.z

        return center + scale * jax.lax.scan(keep, state, None, num_samples)[1]

    keys = jax.random.split(jax.random.fold_in(rng_key, view.indices[place]), len(start))
    return jax.vmap(chain)(start, keys)
