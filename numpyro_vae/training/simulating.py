"""Draws the rows of a batch from the model, in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer import SVI

from numpyro_vae.data.arrays import as_arguments, is_array
from numpyro_vae.data.batch import Batch
from numpyro_vae.model.densities import drawn_rows
from numpyro_vae.model.simulate import Latents, draw_outside, settle, simulate


@dataclass(frozen=True)
class Simulation:
    """How the rows of a batch are simulated; hashable, so that compiled code can depend on it.

    Attributes:
        places: by observed site the numbers of the arrays among the arguments that hold it.
        num_real: how many rows of each part of a batch, the first ones, stay the data they are.
        to_data: from simulated values by observed site to data; None to put them into ``places``.
        plates: those that hold the observations of the local plate's data, itself the first.
        num_parts: how many parts of consecutive rows a batch has, one of each host.
    """

    places: tuple[tuple[str, tuple[int, ...]], ...]
    num_real: int
    to_data: Callable[[dict], Any] | None
    plates: tuple[str, ...]
    num_parts: int = 1

    def drawn(self, num_rows: int) -> np.ndarray | slice:
        """Return which of the rows of a batch are simulated."""
        if not self.num_real:
            return slice(None)
        return np.arange(num_rows).reshape(self.num_parts, -1)[:, self.num_real :].ravel()


def draw_batch(
    svi: SVI, params: dict[str, Any], rng_key: Array, batch: Batch, plan: Simulation
) -> tuple[Batch, Array]:
    """Return a batch with rows drawn from the model in place of its own, and whether they settled.

    Global latents are drawn from the guide, once for the batch, and the rest from the model.

    Args:
        svi: whose model and guide see the batch.
        params: constrained parameters, with the networks' state.
        rng_key: the random key.
        batch: the rows whose covariates the model is given.
        plan: how its rows are simulated.
    """
    args, kwargs = batch.arguments()
    kwargs = {**kwargs, **svi.static_kwargs}
    guide_key, model_key = jax.random.split(rng_key)
    given = draw_outside(svi.guide, params, guide_key, batch.plate, args, kwargs)
    cut = _cut(batch)

    def draw(arrays: list[Any]) -> tuple[Latents, dict[str, Array]]:
        args, kwargs = replace(cut, arrays=tuple(arrays)).arguments()
        kwargs = {**kwargs, **svi.static_kwargs}
        latents, seen = simulate(svi.model, params, given, model_key, args, kwargs, plan.plates)
        return latents, {name: _by_row(site, plan.plates) for name, site in seen.items()}

    def put(arrays: list[Any], made: tuple[Latents, dict[str, Array]]) -> list[Any]:
        return _replaced(plan, cut, arrays, made[1])

    (latents, _), arrays, settled = settle(draw, put, list(cut.arrays))
    latents = None if plan.num_real else jax.lax.stop_gradient(latents)
    return replace(cut, arrays=tuple(arrays), latents=latents), settled


def _cut(batch: Batch) -> Batch:
    """Return a batch with nothing but its own rows, where it takes them from all."""
    if not batch.cuts:
        return batch
    arrays = batch.layout.take(batch.arrays, batch.indices)
    return replace(batch, arrays=arrays, indices=jnp.arange(len(batch.indices)), cuts=False)


def _by_row(site: dict[str, Any], plates: tuple[str, ...]) -> Array:
    """Return the value of an observed site, rows in front where it has some."""
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    dim = next((dims[plate] for plate in plates if plate in dims), None)
    return site["value"] if dim is None else drawn_rows(site, dim)


def _replaced(
    plan: Simulation, batch: Batch, arrays: list[Any], made: dict[str, Array]
) -> list[Any]:
    """Return the arguments' arrays with simulated rows in place of their own."""
    if plan.to_data is not None:
        leaves = jax.tree.leaves(as_arguments(plan.to_data(made)))
        new = dict(enumerate(leaf for leaf in leaves if is_array(leaf)))
    else:
        new = {number: made[name] for name, numbers in plan.places for number in numbers}
    drawn = plan.drawn(len(batch.indices))
    places = batch.indices[drawn]
    found = list(arrays)
    for number, value in new.items():
        axis = batch.layout.axes[number]
        if axis is None:
            found[number] = value.astype(arrays[number].dtype)
            continue
        rows = jnp.moveaxis(arrays[number], axis, 0)
        rows = rows.at[places].set(value[drawn].astype(rows.dtype))
        found[number] = jnp.moveaxis(rows, 0, axis)
    return found
