"""The rungs of the ladder of repair: three methods, each dearer and surer than the one before."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float
from scipy.special import logsumexp

from numpyro_vae.checks.importance import khat_threshold, smooth
from numpyro_vae.nuts import run_nuts
from numpyro_vae.proposals import PROPOSALS, Held, Kernels, adapt, propose
from numpyro_vae.rows import Rows
from numpyro_vae.rowwise import Rowwise

METHODS = ("importance", "refine", "nuts")
MIN_ESS = 400.0  # effective draws that a mean and its error need (Vehtari et al., 2021)
STAGES = 2  # in which proposals adapt to what earlier ones found
CENTERS = 200  # draws that proposals are then made around
CHAINS = 4
STARTS = 25  # resampled draws, or more, among which chains find where to start
ITERATIONS = (1000, 4000)  # of each chain, half as many more to adapt in; then more where too few
MAX_RHAT = 1.01


class Attempt(NamedTuple):
    """What a method made of some rows.

    Attributes:
        draws: packed, ``(rows, held, number, size)``: as many given each value of the globals.
        columns: what was measured of each row, ``passed`` among it; NaN where the method does not.
    """

    draws: np.ndarray
    columns: dict[str, np.ndarray]

    def put(self, rows: np.ndarray, other: Attempt) -> None:
        """Put another attempt at some of the rows in place of this one."""
        self.draws[rows] = other.draws
        for name, values in other.columns.items():
            self.columns[name][rows] = values


def attempt(
    method: str, rowwise: Rowwise, rng_key: Array, rows: Rows, held: Held, number: int
) -> Attempt:
    """Draw the latents of rows anew, by a method.

    * ``importance``: draws of the guide and of the prior, Pareto-smoothed and resampled; where few
      of them count, draws around those that do;
    * ``refine``: the same from the row's own variational parameters;
    * ``nuts``: chains started at what ``refine`` resampled, in its scale.

    Args:
        method: one of these.
        rowwise: the trained guide.
        rng_key: the random key.
        rows: the data.
        held: values of the global sites, a leading axis of them.
        number: how many draws for each of these.
    """
    if method == "nuts":
        return _by_nuts(rowwise, rng_key, rows, held, number)
    return _by_weights(rowwise, rng_key, rows, held, number, refined=method == "refine")


def measured(number: int, **known: Any) -> dict[str, np.ndarray]:
    """Return the columns of rows, NaN for what is not known."""
    names = ("passed", "khat", "log_evidence", "converged", "rhat", "ess")
    return {name: np.array(known.get(name, np.full(number, np.nan))) for name in names}


def _by_weights(
    rowwise: Rowwise, rng_key: Array, rows: Rows, held: Held, number: int, *, refined: bool
) -> Attempt:
    """Weigh proposals; where they are too few that count, propose around what they resample."""
    found = rowwise.apply(propose, rows, rng_key, held, refined=refined, num_draws=PROPOSALS)
    many = max(number, -(-CENTERS // found["draws"].shape[1]))
    made = _weighed(found, rng_key, rows, many)
    for stage in range(STAGES):
        left = np.flatnonzero(~made.columns["passed"] & found["whole"])
        if not left.size:
            break
        key = jax.random.fold_in(rng_key, stage)
        kernels = Kernels.around(spread(pooled(made.draws[left]), CENTERS))
        part = rows.choose(rows.chosen[left])
        again = rowwise.apply_with(adapt, part, kernels, key, held)
        made.put(left, _weighed(again, key, part, many))
    if refined:
        made.columns["converged"] = found["converged"].astype(float)
    return made._replace(draws=made.draws[:, :, :number])


def pooled(by_held: np.ndarray) -> np.ndarray:
    """Return draws ``(rows, held, number, ...)`` with ``held`` and ``number`` in one axis."""
    return by_held.reshape(len(by_held), -1, *by_held.shape[3:])


def spread(draws: np.ndarray, number: int) -> np.ndarray:
    """Return so many draws, evenly spread over the second axis."""
    return draws[:, np.linspace(0, draws.shape[1] - 1, number).round().astype(int)]


def _weighed(found: dict[str, np.ndarray], rng_key: Array, rows: Rows, number: int) -> Attempt:
    """Return resampled proposals, and what their weights say of them.

    Weights are of the posterior given each value of the globals, which count alike whatever the
    row's evidence given them.
    """
    log_weights = found["log_weights"].astype(float)
    total, held, proposals = log_weights.shape
    evidence = logsumexp(log_weights, axis=2, keepdims=True) - np.log(proposals)
    smoothed, khat = smooth(pooled(log_weights - evidence).T, rows.chosen)
    ess = 1 / np.exp(2 * smoothed).sum(0)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
    weights = np.exp(smoothed).T.reshape(total * held, proposals)
    chosen = _resample(weights, number, rng).reshape(total, held, number, 1)
    columns = measured(
        total,
        passed=(khat < khat_threshold(len(smoothed))) & (ess >= MIN_ESS),
        khat=khat,
        log_evidence=evidence.mean((1, 2)),
        ess=ess,
    )
    return Attempt(np.take_along_axis(found["draws"], chosen, axis=2), columns)


def _resample(
    weights: Float[np.ndarray, "rows proposals"], num_samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return which proposals to keep, systematically, so that few are kept twice."""
    points = (np.arange(num_samples) + rng.uniform(size=(len(weights), 1))) / num_samples
    sums = np.cumsum(weights, axis=1)
    sums /= sums[:, -1:]
    pairs = zip(sums, points, strict=True)
    chosen = [rng.permutation(np.searchsorted(row, point)) for row, point in pairs]
    return np.minimum(np.stack(chosen), weights.shape[1] - 1)


def _by_nuts(rowwise: Rowwise, rng_key: Array, rows: Rows, held: Held, number: int) -> Attempt:
    start = _by_weights(rowwise, rng_key, rows, held, STARTS, refined=True)
    total, size = start.draws.shape[:2]
    near = pooled(start.draws)
    center, scale = near.mean(1), np.maximum(near.std(1), 1e-3)
    starts = np.stack([_far_apart(row) for row in (near - center[:, None]) / scale[:, None]])
    starts = center[:, None] + scale[:, None] * starts
    # A lane is a row given one value of the globals.
    lane_row, lane_held = np.divmod(np.arange(total * size), size)
    draws = np.empty((total * size, number, near.shape[-1]), near.dtype)
    rhat, ess = np.full(total * size, np.inf), np.zeros(total * size)
    left = np.arange(total * size)
    for iterations in ITERATIONS:
        row = lane_row[left]
        chains = run_nuts(
            rowwise,
            rows.choose(rows.chosen[row]),
            jax.random.fold_in(rng_key, iterations),
            {name: np.asarray(value)[lane_held[left]] for name, value in held.items()},
            starts[row],
            center[row],
            scale[row],
            num_warmup=iterations // 2,
            num_samples=iterations,
        )
        rhat[left], ess[left] = _diagnose(chains)
        draws[left] = spread(pooled(chains), number)
        left = np.flatnonzero((rhat >= MAX_RHAT) | (ess < MIN_ESS))
        if not left.size:
            break
    worst, least = rhat.reshape(total, size).max(1), ess.reshape(total, size).min(1)
    passed = (worst < MAX_RHAT) & (least >= MIN_ESS)
    columns = measured(total, passed=passed, rhat=worst, ess=least)
    return Attempt(draws.reshape(total, size, number, -1), columns)


def _far_apart(draws: Float[np.ndarray, "draws size"]) -> Float[np.ndarray, "chains size"]:
    """Return draws to start chains at, each as far from those before as can be.

    Chains that started in different modes do not agree, and so the modes are not overlooked.
    """
    places = [0]
    distance = ((draws - draws[0]) ** 2).sum(-1)
    for _ in range(CHAINS - 1):
        places.append(int(distance.argmax()))
        distance = np.minimum(distance, ((draws - draws[places[-1]]) ** 2).sum(-1))
    return draws[places]


def _diagnose(chains: Float[np.ndarray, "rows chains draws size"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the worst r-hat and the smallest effective sample size of each row."""
    from arviz_stats.base import array_stats

    by_value = np.moveaxis(chains.astype(float), -1, 1)
    rhat = array_stats.rhat(by_value, chain_axis=-2, draw_axis=-1)
    ess = array_stats.ess(by_value, chain_axis=-2, draw_axis=-1)
    return np.nan_to_num(rhat.max(-1), nan=np.inf), np.nan_to_num(ess.min(-1))
