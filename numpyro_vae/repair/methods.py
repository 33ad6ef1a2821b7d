"""The three methods of repair, each more expensive and more reliable than the one before."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float
from scipy.special import logsumexp

from numpyro_vae.inference.psis import khat_threshold, smooth
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.repair.nuts import (
    ITERATIONS,
    NUM_CHAINS,
    ROUNDS,
    Frame,
    advance,
    start_chains,
)
from numpyro_vae.repair.proposals import (
    FEWEST,
    FROM_PRIOR,
    PROPOSALS,
    Held,
    Kernels,
    adapt,
    propose,
)

METHODS = ("importance", "refine", "nuts")
MIN_ESS = 400.0  # effective draws that a mean and its error need (Vehtari et al., 2021)
STAGES = 2  # in which proposals adapt to what earlier ones found
CENTERS = 200  # draws that proposals are then made around
MAX_RHAT = 1.01


class Attempt(NamedTuple):
    """What a method made of some rows.

    Attributes:
        draws: packed, ``(rows, held, number, size)``: as many given each value of the globals.
        columns: what was measured of each row, ``passed`` among it; NaN where the method does not.
    """

    draws: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def joined(cls, parts: list[Attempt]) -> Attempt:
        """Return the attempts at several blocks of rows as one."""
        columns = {
            name: np.concatenate([part.columns[name] for part in parts])
            for name in parts[0].columns
        }
        return cls(np.concatenate([part.draws for part in parts]), columns)

    def at(self, rows: np.ndarray) -> Attempt:
        """Return the attempt at some of the rows."""
        return Attempt(self.draws[rows], {name: x[rows] for name, x in self.columns.items()})

    def put(self, rows: np.ndarray, other: Attempt) -> None:
        """Put another attempt at some of the rows in place of this one."""
        self.draws[rows] = other.draws
        for name, values in other.columns.items():
            self.columns[name][rows] = values


def attempt(
    method: str,
    runner: Runner,
    rng_key: Array,
    rows: Rows,
    held: Held,
    number: int,
    before: Attempt | None = None,
) -> Attempt:
    """Draw the latents of rows anew, by a method.

    * ``importance``: draws of the guide and of the prior, Pareto-smoothed and resampled; where few
      of them count, draws around those that do;
    * ``refine``: the same from the row's own variational parameters;
    * ``nuts``: chains started at what was drawn before, in its scale; where they do not agree, as
      in modes of their own, draws around those of all chains, weighed as above.

    Args:
        method: one of these.
        runner: the trained guide.
        rng_key: the random key.
        rows: the data.
        held: values of the global sites, a leading axis of them.
        number: how many draws for each of these.
        before: the attempt of an earlier method at these rows; NUTS starts from its draws, or else
            from weighted draws of the guide.
    """
    weights_key, nuts_key = jax.random.split(rng_key)
    arguments = (rows, held, number)
    if method != "nuts":
        return _by_weights(runner, weights_key, *arguments, refined=method == "refine")
    if before is None:
        before = _by_weights(runner, weights_key, *arguments, refined=False, stages=0)
    return _by_nuts(runner, nuts_key, *arguments, before)


def draws_of(method: str, held: Held) -> int:
    """Return how many draws a method holds of a row, given values of the global sites."""
    size = len(next(iter(held.values()))) if held else 1
    if method == "nuts":
        return size * NUM_CHAINS * ITERATIONS * sum(ROUNDS)
    return round(size * max(PROPOSALS // size, FEWEST) / (1 - FROM_PRIOR))


def measured(number: int, **known: Any) -> dict[str, np.ndarray]:
    """Return the columns of rows, NaN for what is not known."""
    names = ("passed", "khat", "log_evidence", "converged", "rhat", "ess")
    return {name: np.array(known.get(name, np.full(number, np.nan))) for name in names}


def _by_weights(
    runner: Runner,
    rng_key: Array,
    rows: Rows,
    held: Held,
    number: int,
    *,
    refined: bool,
    stages: int = STAGES,
) -> Attempt:
    """Weigh proposals; where they are too few that count, propose around what they resample."""
    # Split once: folding a number into a key gives what splitting it does.
    first, *later = jax.random.split(rng_key, 1 + stages)
    found = runner.per_batch(propose, rows, first, held, refined=refined, num_draws=PROPOSALS)
    made = _weighed(found, first, number)
    for key in later:
        left = np.flatnonzero(~made.columns["passed"] & found["whole"])
        if not left.size:
            break
        centers, ess = spread(pooled(made.draws[left]), CENTERS), made.columns["ess"][left]
        kernels = Kernels.around(centers, ess)
        part = rows.choose(rows.chosen[left])
        again = runner.per_batch(adapt, part, key, held, by_row=kernels)
        made.put(left, _weighed(again, key, number))
    if refined:
        made.columns["converged"] = found["converged"].astype(float)
    return made


def pooled(by_held: np.ndarray) -> np.ndarray:
    """Return draws ``(rows, held, number, ...)`` with ``held`` and ``number`` in one axis."""
    return by_held.reshape(len(by_held), -1, *by_held.shape[3:])


def spread(draws: np.ndarray, number: int) -> np.ndarray:
    """Return so many draws, evenly spread over the second axis."""
    return draws[:, np.linspace(0, draws.shape[1] - 1, number).round().astype(int)]


def _weighed(found: dict[str, np.ndarray], rng_key: Array, number: int) -> Attempt:
    """Return resampled proposals, and what their weights say of them.

    Weights are of the posterior given each value of the globals, which count alike whatever the
    row's evidence given them. A row does not pass, and nothing is said of it, if a density is
    infinite, or if no draw has any.
    """
    log_weights, known = _finite(found["log_weights"].astype(float), found["draws"])
    total, held, proposals = log_weights.shape
    evidence = logsumexp(log_weights, axis=2, keepdims=True) - np.log(proposals)
    size = np.abs(log_weights.max((1, 2)))
    smoothed, khat = smooth(pooled(log_weights - evidence).T, size)
    ess = 1 / np.exp(2 * smoothed).sum(0)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
    weights = np.exp(smoothed).T.reshape(total * held, proposals)
    chosen = resample(weights, number, rng).reshape(total, held, number, 1)
    said = {"khat": khat, "log_evidence": evidence.mean((1, 2)), "ess": ess}
    columns = measured(
        total,
        passed=(khat < khat_threshold(len(smoothed))) & (ess >= MIN_ESS) & known,
        **{name: np.where(known, values, np.nan) for name, values in said.items()},
    )
    return Attempt(np.take_along_axis(found["draws"], chosen, axis=2), columns)


def _finite(
    log_weights: Float[np.ndarray, "rows held proposals"], draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return log weights of which some are finite in each row, and in which rows they mean it.

    A draw without density counts for nothing. Where none has any, all that are numbers count alike.
    """
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    infinite = log_weights == np.inf
    log_weights = np.where(infinite, -np.inf, log_weights)
    nowhere = (log_weights == -np.inf).all(2)
    for row, place in np.argwhere(nowhere):
        numbers = np.isfinite(draws[row, place]).all(-1)
        log_weights[row, place] = np.where(numbers | ~numbers.any(), 0.0, -np.inf)
    return log_weights, ~(infinite.any((1, 2)) | nowhere.any(1))


def resample(
    weights: Float[np.ndarray, "rows proposals"], num_samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return which proposals to keep, systematically, so that few are kept twice."""
    points = (np.arange(num_samples) + rng.uniform(size=(len(weights), 1))) / num_samples
    sums = np.cumsum(weights, axis=1)
    sums /= sums[:, -1:]
    pairs = zip(sums, points, strict=True)
    chosen = [rng.permutation(np.searchsorted(row, point)) for row, point in pairs]
    return np.minimum(np.stack(chosen), weights.shape[1] - 1)


def _by_nuts(
    runner: Runner, rng_key: Array, rows: Rows, held: Held, number: int, before: Attempt
) -> Attempt:
    """Run the chains of rows until they agree and their draws suffice, or are too many.

    Chains that do not agree may each be right of a mode of its own: weights say how much each is.
    """
    near = pooled(before.draws)
    frame = Frame.around(near, before.columns["ess"])
    chains = start_chains(near, frame, before.draws.shape[1])
    first, *later, last = jax.random.split(rng_key, 2 + sum(ROUNDS))
    chains, _ = advance(runner, rows, first, held, frame, chains, adapt=True)
    left, kept = np.arange(len(near)), []
    made = before.at(left)
    for rounds in ROUNDS:
        for _ in range(rounds):
            key = later[len(kept)]
            chains, draws = advance(runner, rows, key, held, frame, chains, adapt=False)
            kept.append(draws)
        found = _judge(np.concatenate(kept, axis=3), number)
        made.put(left, found)
        on = np.flatnonzero(~found.columns["passed"])
        if not on.size:
            break
        left, rows = left[on], rows.choose(rows.chosen[on])
        frame, chains, kept = jax.tree.map(itemgetter(on), (frame, chains, kept))
    else:
        draws, found = np.concatenate(kept, axis=3), made.at(left)
        made.put(left, _around_chains(runner, last, rows, held, number, draws, found))
    return made


def _around_chains(
    runner: Runner,
    rng_key: Array,
    rows: Rows,
    held: Held,
    number: int,
    draws: Float[np.ndarray, "rows held chains draws size"],
    made: Attempt,
) -> Attempt:
    """Weigh draws of the guide, and around those of chains, of the width that each chain has.

    Where few of them count, draws around those that do follow: they may be in modes without chains.
    Rows that do not pass then stay what chains have made of them.
    """
    within = draws - draws.mean(3, keepdims=True)
    centers, widths = (spread(x.reshape(len(x), -1, x.shape[-1]), CENTERS) for x in (draws, within))
    left = np.arange(len(draws))
    for key in jax.random.split(rng_key, STAGES):
        kernels = Kernels.around(centers, np.full(len(left), CENTERS), widths[left])
        part = rows.choose(rows.chosen[left])
        found = runner.per_batch(adapt, part, key, held, by_row=kernels, with_guide=True)
        weighed = _weighed(found, key, number)
        weighed.columns["rhat"] = made.columns["rhat"][left]
        passed = weighed.columns["passed"].astype(bool) & found["whole"]
        made.put(left[passed], weighed.at(passed))
        left = left[~passed]
        if not left.size:
            break
        centers = spread(pooled(weighed.draws[~passed]), CENTERS)
    return made


def _judge(draws: Float[np.ndarray, "rows held chains draws size"], number: int) -> Attempt:
    """Return so many of the draws of chains, and what these say of each row.

    Draws given all values of the globals are returned together: their r-hats are averaged, squared,
    as variances are, and their effective sample sizes add up.
    """
    from arviz_stats.base import array_stats

    by_value = np.moveaxis(draws.astype(float), -1, 2)
    with np.errstate(divide="ignore", invalid="ignore"):  # of chains that stood still
        rhat = array_stats.rhat(by_value, chain_axis=-2, draw_axis=-1)
        ess = array_stats.ess(by_value, chain_axis=-2, draw_axis=-1)
    worst = np.sqrt((np.where(np.isnan(rhat), np.inf, rhat) ** 2).mean(1)).max(-1)
    least = np.nan_to_num(ess).sum(1).min(-1)
    passed = (worst < MAX_RHAT) & (least >= MIN_ESS)
    rows, size = draws.shape[:2]
    thinned = spread(draws.reshape(rows * size, -1, draws.shape[-1]), number)
    columns = measured(rows, passed=passed, rhat=worst, ess=least)
    return Attempt(thinned.reshape(rows, size, number, -1), columns)
