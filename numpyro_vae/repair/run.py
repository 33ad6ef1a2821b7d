"""Runs a repair: one method after another, on the rows that have not passed."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.checks.report import Report
from numpyro_vae.data.arguments import require_whole
from numpyro_vae.inference.derived import derived_sites
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.memory import require_memory
from numpyro_vae.inference.predictable import undrawn_sites, warn_of_undrawn
from numpyro_vae.inference.quantities import Axes, finish
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.repair.methods import (
    CENTERS,
    METHODS,
    Attempt,
    attempt,
    draws_of,
    measured,
    pooled,
    spread,
)
from numpyro_vae.repair.proposals import Held
from numpyro_vae.repair.result import Repair, columns

NUM_HELD = 32  # draws of the global sites that rows are repaired for, if there are any
BLOCK = 64  # rows that are repaired at once
HELD = 2**26  # values that are drawn of them, at most


def run_repair(
    runner: Runner, rng_key: Array, data: Any, rows: Any, method: str, num_samples: int
) -> Repair:
    """Repair rows; see `Posterior.repair`."""
    require_whole("num_samples", num_samples)
    if method not in ("auto", *METHODS):
        raise ValueError(f"method is {method!r}, expected 'auto' or one of {list(METHODS)}.")
    every = runner.read(data)
    runner.require_density()
    if isinstance(rows, Report):
        rows = rows.flagged_of(every.fingerprint)
    chosen = every.choose(np.unique(every.choose(rows).chosen))
    if not len(chosen.chosen):
        nothing = measured(0, passed=np.zeros(0, bool))
        return Repair(columns(chosen, nothing, np.zeros(0, int)), {}, ())
    size = min(NUM_HELD, num_samples) if runner.guide.global_names else 1
    held = runner.draw_globals(rng_key, chosen, size)
    methods = _methods(runner, chosen, method)
    _look_ahead(runner, chosen, num_samples)
    number = -(-max(num_samples, CENTERS) // size)
    made, by = _try_methods(runner, rng_key, chosen, held, methods, number)
    packed = spread(pooled(made.draws), num_samples)
    of_held = spread(np.arange(size * number)[None] // number, num_samples)[0]
    given = {name: np.asarray(value)[of_held] for name, value in held.items()}
    groups = _groups(runner, chosen, rng_key, given, packed)
    return Repair(columns(chosen, made.columns, by), groups, _stale(runner, chosen, groups))


def _methods(runner: Runner, rows: Rows, method: str) -> tuple[str, ...]:
    """Return the methods to try, in their order.

    Raises:
        ValueError: if one was asked for that the guide does not allow.
    """
    allowed = METHODS if runner.has_features(rows) else ("importance", "nuts")
    if method not in ("auto", *allowed):
        raise ValueError(
            f"method is {method!r}, and the guide's distributions are no Normals, whose parameters "
            "could be refined. Use 'auto', 'importance' or 'nuts'."
        )
    return allowed if method == "auto" else (method,)


def _look_ahead(runner: Runner, rows: Rows, num_samples: int) -> None:
    """Find out what will not work in the end, before what takes long."""
    values = len(rows.chosen) * num_samples * runner.width(observed=True)
    require_memory(values * jnp.zeros(()).dtype.itemsize)
    warn_of_undrawn(undrawn_sites(runner, rows))


def _groups(
    runner: Runner, rows: Rows, rng_key: Array, given: dict[str, Any], packed: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Return the draws by group; the latents alone if the model cannot be run for the others."""
    finish = partial(runner.per_draw, _finish, rows, rng_key, given, by_row=packed)
    finish = partial(finish, num_samples=packed.shape[1], observed=True)
    try:
        derived = tuple(derived_sites(runner, rows).by_row.items())
        return finish(groups=("posterior", "posterior_predictive"), derived=derived)
    except Exception as error:  # of whatever kind: what took so long is not to be lost
        message = (
            f"Nothing could be predicted for the repaired rows, which have latents alone: {error}"
        )
        warnings.warn(message, UserWarning, stacklevel=4)
        return finish(groups=("posterior",), derived=())


def _stale(runner: Runner, rows: Rows, groups: dict[str, dict]) -> tuple[str, ...]:
    """Return the sites that read the rows' latents, and were not computed of their new draws."""
    sites = runner.guide.reader.sites(rows.args, rows.kwargs, rows.held)
    plates = (rows.plate, *runner.guide.segments)
    reads = {site.name for plate in plates for site in sites.observed(plate)}
    reads |= {
        name for name, read in sites.reads.deterministic.items() if read & set(runner.local_names)
    }
    done = {name for variables in groups.values() for name in variables}
    return tuple(sorted(reads - done))


def _finish(
    batch: EncodedBatch,
    packed: Array,
    rng_key: Array,
    globals_: Held,
    *,
    num_samples: int,
    groups: tuple[str, ...],
    derived: Axes,
) -> dict[str, dict]:
    """Return the draws by group, without what lies in another plate than the rows."""
    plate, sites = batch.encoding.run.plate.name, batch.encoding.run.sites
    found = finish(batch, packed, rng_key, globals_, groups=groups, derived=derived)
    around = {name: site.plates for name, site in sites.sites.items()} | sites.deterministic
    return {
        group: {name: x for name, x in variables.items() if plate in around[name]}
        for group, variables in found.items()
    }


def _try_methods(
    runner: Runner,
    rng_key: Array,
    rows: Rows,
    held: Held,
    methods: tuple[str, ...],
    number: int,
) -> tuple[Attempt, np.ndarray]:
    """Return the last draws of each row, and the number of the method that made them."""

    def tried(name: str, left: np.ndarray, before: Attempt | None) -> Attempt:
        key = jax.random.fold_in(rng_key, METHODS.index(name))
        parts = []
        values = draws_of(name, held) * runner.width()
        size = int(np.clip(HELD // max(values, 1), 1, BLOCK))
        for block in np.split(np.arange(len(left)), range(size, len(left), size)):
            part = rows.choose(rows.chosen[left[block]])
            begun = before and before.at(block)
            parts.append(attempt(name, runner, key, part, held, number, begun))
        return Attempt.joined(parts)

    every = np.arange(len(rows.chosen))
    made = tried(methods[0], every, None)
    by = np.full(len(every), METHODS.index(methods[0]))
    for name in methods[1:]:
        left = np.flatnonzero(~made.columns["passed"])
        if not left.size:
            break
        made.put(left, tried(name, left, made.at(left)))
        by[left] = METHODS.index(name)
    return made, by
