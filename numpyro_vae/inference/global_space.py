"""The unconstrained space of the global sites, and the log density of points in it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import biject_to

from numpyro_vae.data.batch import Batch
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.functions import encoded_alike
from numpyro_vae.inference.marginal import Globals, outside_of, row_evidence, without_bias


def flatten(batch: EncodedBatch, globals_: Globals) -> tuple[Array, Array]:
    """Return draws of the global sites as points, and the log volume of the map back.

    Args:
        batch: all rows.
        globals_: by site, a leading axis of draws.

    Returns:
        Points ``(draws, size)`` and ``(draws,)``.
    """

    def one(globals_: Globals) -> tuple[Array, Array]:
        run, parts = batch.encoding.run, []
        for name in batch.guide.global_names:
            site = run.sites.sites[name]
            parts.append(biject_to(run.support(site)).inv(globals_[name]).reshape(-1))
        point = jnp.concatenate(parts)
        return point, unflatten(batch, point)[1]

    return jax.vmap(one)(globals_)


def unflatten(batch: EncodedBatch, point: Float[Array, "size"]) -> tuple[Globals, Array]:
    """Return the values of the global sites at a point, and the log volume of the map."""
    run, values, log_det, start = batch.encoding.run, {}, jnp.zeros(()), 0
    for name in batch.guide.global_names:
        site = run.sites.sites[name]
        part = point[start : start + site.size].reshape(site.batch_shape + site.unconstrained_shape)
        transform = biject_to(run.support(site))
        values[name] = transform(part)
        log_det += transform.log_abs_det_jacobian(part, values[name]).sum()
        start += site.size
    return values, log_det


def unflatten_all(batch: EncodedBatch, points: Array) -> tuple[Globals, Array]:
    """Return what `unflatten` does of several points."""
    return jax.vmap(partial(unflatten, batch))(points)


def log_density_at(
    batch: EncodedBatch,
    parts: tuple[Batch, Array, Array],
    rng_key: Array,
    point: Float[Array, "size"],
    *,
    particles: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the log density of a point and all data, and the log volume of the map from it.

    The first is what `marginal.log_density` estimates, before it is divided by a scale. It is a
    differentiable function of the point, as all random numbers stay the same.

    Args:
        batch: all rows.
        parts: a batch of some rows; the rows of each batch ``(batches, rows)``; and 1 for each of
            these, 0 for those that fill up the last.
        rng_key: the random key of `marginal.log_density`.
        point: the point.
        particles: local draws of each row, a multiple of four.
    """
    globals_, log_det = unflatten(batch, point)
    some, indices, real = parts
    keys = jax.random.split(rng_key)

    @jax.checkpoint
    def of_part(part: tuple[Array, Array]) -> Array:
        rows = encoded_alike(batch, some.at(part[0]))
        first, second = (row_evidence(rows, key, particles // 2)(globals_) for key in keys)
        return (part[1] * without_bias(first, second)).sum()

    of_rows = jax.lax.map(of_part, (indices, real)).sum()
    return outside_of(batch, rng_key, globals_) + of_rows, log_det
