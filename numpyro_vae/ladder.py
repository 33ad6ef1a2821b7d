"""The ladder of repair: tries one method after another on the rows that have not passed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.proposals import Held
from numpyro_vae.repair import Repair, columns
from numpyro_vae.rows import Rows
from numpyro_vae.rowwise import Rowwise
from numpyro_vae.rungs import METHODS, Attempt, attempt, measured
from numpyro_vae.views import View, finish

NUM_HELD = 8  # draws of the global sites that rows are repaired for, if there are any


def run_repair(
    rowwise: Rowwise, rng_key: Array, data: Any, rows: Any, method: str, num_samples: int, axes: Any
) -> Repair:
    """Repair rows; see `Posterior.repair`."""
    rowwise.require_density()
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1.")
    if method not in ("auto", *METHODS):
        raise ValueError(f"method is {method!r}, expected 'auto' or one of {list(METHODS)}.")
    every = rowwise.read(data, axes)
    chosen = every.choose(np.unique(every.choose(rows).chosen))
    plate = rowwise.guide.plate.name
    if not chosen.chosen.size:
        nothing = measured(0, passed=np.zeros(0, bool))
        return Repair(columns(plate, chosen.chosen, [nothing], [np.zeros(0, int)]), {})
    number = min(NUM_HELD, num_samples) if rowwise.guide.global_names else 1
    globals_ = rowwise.draw_globals(rng_key, chosen, number)
    shares = [len(share) for share in np.array_split(np.arange(num_samples), number)]
    ladder = METHODS if method == "auto" else (method,)
    climbed = [
        _climb(
            rowwise,
            jax.random.fold_in(rng_key, m),
            chosen,
            {name: value[m] for name, value in globals_.items()},
            ladder,
            share,
        )
        for m, share in enumerate(shares)
    ]
    found = columns(
        plate, chosen.chosen, [made.columns for made, _ in climbed], [rung for _, rung in climbed]
    )
    packed = np.concatenate([made.draws for made, _ in climbed], axis=1)
    given = {name: np.repeat(value, shares, axis=0) for name, value in globals_.items()}
    groups = rowwise.apply_with(_finish, chosen, packed, rng_key, given, row_axis=1)
    return Repair(found, groups)


def _finish(view: View, packed: Array, rng_key: Array, globals_: Held) -> dict[str, dict]:
    """Return the draws by group, without what lies in another plate than the rows."""
    plate, sites = view.encoding.run.plate.name, view.encoding.run.sites
    around = {name: site.plates for name, site in sites.sites.items()} | sites.deterministic
    return {
        group: {name: x for name, x in variables.items() if plate in around[name]}
        for group, variables in finish(view, packed, rng_key, globals_).items()
    }


def _climb(
    rowwise: Rowwise,
    rng_key: Array,
    rows: Rows,
    held: Held,
    ladder: tuple[str, ...],
    num_samples: int,
) -> tuple[Attempt, np.ndarray]:
    """Return the best draws of each row, and the number of the method that made them."""
    made = attempt(ladder[0], rowwise, rng_key, rows, held, num_samples)
    rung = np.full(len(rows.chosen), METHODS.index(ladder[0]))
    for name in ladder[1:]:
        left = np.flatnonzero(~made.columns["passed"])
        if not left.size:
            break
        key = jax.random.fold_in(rng_key, METHODS.index(name))
        again = attempt(name, rowwise, key, rows.choose(rows.chosen[left]), held, num_samples)
        made.put(left, again)
        rung[left] = METHODS.index(name)
    return made, rung
