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
NUM_ROWS = 8  # that are looked at, spread over the data, and as many with the largest values
NUM_SAMPLES = 8  # draws of each


def rounding_error(runner: Runner, rows: Rows, rng_key: Array, log_evidence: Any) -> float | None:
    """Return the rounding error of log weights in nats, or None if float32 is surely enough.

    Only values or log densities that are large are a reason to look: then the log weights of a
    few draws are computed in float64 too, of the same parameters, data and draws. Under x64 there
    is nothing to compare with.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        log_evidence: that of each row, an array or what is read in slices.
    """
    if jnp.result_type(float) == jnp.float64:
        return None
    numbers, largest, highest = _largest_rows(rows, log_evidence)
    if largest < LARGE_VALUE and highest < LARGE_DENSITY:
        return None
    spread = np.linspace(0, rows.num_rows - 1, NUM_ROWS).round().astype(int)
    some = rows.choose(np.unique([*spread, *numbers]))
    try:
        return _measured(runner, some.in_memory(), rng_key)
    except Exception:  # whatever the model's code cannot do in float64
        return _bound(runner, some, highest)


def _largest_rows(rows: Rows, log_evidence: Any) -> tuple[np.ndarray, float, float]:
    """Return the rows with the largest values and densities, the largest value and density."""
    start, numbers, sums, largest, highest = 0, np.empty(0, int), np.empty(0), 0.0, 0.0
    for data in rows.blocks():
        size = rows.num_rows if rows.stored is None else data.num_data
        values = _largest_values(data, size)
        densities = np.abs(np.asarray(log_evidence[start : start + size], float))
        densities = np.where(np.isfinite(densities), densities, 0.0)
        largest, highest = max(largest, values.max()), max(highest, densities.max())
        sums = np.concatenate([sums, values + densities])
        kept = np.argsort(sums)[-NUM_ROWS:]
        numbers = np.concatenate([numbers, np.arange(start, start + size)])[kept]
        sums, start = sums[kept], start + size
    return numbers, largest, highest


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


def _measured(runner: Runner, rows: Rows, rng_key: Array) -> float:
    """Return the root mean square error of the row's log weights that is largest."""
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
    return float(np.sqrt((errors**2).mean(1)).max())


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
