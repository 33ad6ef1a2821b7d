"""Whether float32 can carry a model's densities: the rounding error of log weights, measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.quantities import observed
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner

LARGE_VALUE = 1e4  # of the data, from which terms of a density may cancel: 1e4 log(1e4) is 1e5
LARGE_DENSITY = 1e5  # nats, of which float32 resolves a hundredth
NUM_ROWS = 256  # that are measured, spread over the large ones
NUM_SAMPLES = 8  # draws of each


def rounding_errors(
    runner: Runner, rows: Rows, rng_key: Array, log_evidence: Any
) -> np.ndarray | None:
    """Return the rounding error of each row's log weights in nats; None if float32 will do.

    Only values or log densities that are large are a reason to look: then the log weights of a
    few draws are computed in float64 too, of the same parameters, data and draws. Rows without
    such have no error; one that is not measured has that of the next larger row. Under x64 there
    is nothing to compare with.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        log_evidence: that of each row, an array or what is read in slices.
    """
    if jnp.result_type(float) == jnp.float64:
        return None
    values, densities = _sizes(rows, log_evidence)
    large = np.flatnonzero((values >= LARGE_VALUE) | (densities >= LARGE_DENSITY))
    if not large.size:
        return None
    large = large[np.argsort((values + densities)[large], kind="stable")]
    places = np.unique(np.linspace(0, large.size - 1, NUM_ROWS).round().astype(int))
    chosen, back = np.unique(large[places], return_inverse=True)
    some = rows.choose(chosen)
    try:
        measured = _measured(runner, some.in_memory(), rng_key)
    except Exception:  # whatever the model's code cannot do in float64
        measured = np.full(chosen.size, _bound(runner, some, densities.max()))
    errors = np.zeros(len(values), np.float32)
    errors[large] = measured[back][np.searchsorted(places, np.arange(large.size))]
    return errors


def _sizes(rows: Rows, log_evidence: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return of each row the largest value, and the absolute log evidence."""
    start, values, densities = 0, np.zeros(rows.num_rows), np.zeros(rows.num_rows)
    for data in rows.blocks():
        stop = start + (rows.num_rows if rows.stored is None else data.num_data)
        values[start:stop] = _largest_values(data, stop - start)
        found = np.abs(np.asarray(log_evidence[start:stop], float))
        densities[start:stop] = np.where(np.isfinite(found), found, 0.0)
        start = stop
    return values, densities


def _largest_values(data: ArrayData, num_rows: int) -> np.ndarray:
    """Return the largest absolute value of each row, of all that is given to the model."""
    largest = np.zeros(num_rows)
    for array, axis in zip(data.arrays, data.layout.axes, strict=True):
        if jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer):
            values = np.asarray(array)
            others = None if axis is None else tuple(np.delete(np.arange(values.ndim), axis))
            for bound in (np.fmax, np.fmin):  # which leave NaN aside, and copy nothing
                found = bound.reduce(values, axis=others).astype(float)
                largest = np.fmax(largest, np.abs(found))
    return largest


def _measured(runner: Runner, rows: Rows, rng_key: Array) -> np.ndarray:
    """Return the root mean square error of each row's log weights."""
    globals_ = runner.draw_globals(rng_key, rows, NUM_SAMPLES)
    found = runner.per_batch(_draw, rows, rng_key, globals_)
    with jax.enable_x64(True):
        params, arrays, packed, globals_ = jax.tree.map(
            _in_float64, (runner.params, rows.data.arrays, found["packed"], globals_)
        )
        double = Runner(
            runner.guide, params, runner.static_kwargs, runner.batch_axes, devices=runner.devices
        )
        same = rows.with_arrays(arrays).choose(rows.chosen)
        exact = double.per_batch(_weigh, same, globals_, rng_key, by_row=packed)
    errors = found["log_weights"].astype(float) - exact
    errors = np.where(np.isfinite(errors), errors, 0.0)  # a draw without density has no error
    return np.sqrt((errors**2).mean(1))


def _in_float64(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.asarray(leaf, jnp.float64)


def _draw(batch: EncodedBatch, rng_key: Array, globals_: dict) -> dict[str, Array]:
    packed = jnp.moveaxis(batch.draw(rng_key, NUM_SAMPLES, globals_), 0, 1)
    return {"packed": packed, "log_weights": _weigh(batch, packed, globals_, rng_key)}


def _weigh(batch: EncodedBatch, packed: Array, globals_: dict, rng_key: Array) -> Array:
    """Return the log weights of draws ``(batch, num_samples, size)``, rows in front.

    They are those of the network, as steps of rows differ in another precision.
    """
    batch = replace(batch, encoding=batch.network)

    def weigh(packed: Array, globals_: dict) -> Array:
        return batch.log_weight(packed, globals_, rng_key)

    return batch.over_draws(weigh, jnp.moveaxis(packed, 0, 1), globals_).T


def _bound(runner: Runner, rows: Rows, highest: float) -> float:
    """Return the rounding error of a number as large as the density, or the values, of a row."""
    values = jax.tree.leaves(runner.per_batch(observed, rows))
    largest = max((np.abs(x[np.isfinite(x)]).max(initial=0) for x in values), default=0)
    return float(max(largest, highest) * np.finfo(np.float32).eps / 2)
