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
STARTS = 200  # resampled draws among which chains find where to start
ITERATIONS = (1000, 4000)  # of each chain, half as many more to adapt in; then more where too few
MAX_RHAT = 1.01


class Attempt(NamedTuple):
    """What a method made of some rows, for one draw of the global sites.

    Attributes:
        draws: packed, ``(rows, num_samples, size)``.
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
    method: str, rowwise: Rowwise, rng_key: Array, rows: Rows, held: Held, num_samples: int
) -> Attempt:
    """Draw the latents of rows anew, by a method.

    * ``importance``: draws of the guide and of the prior, Pareto-smoothed and resampled; where few
      of them count, draws around those that do;
    * ``refine``: the same from the row's own variational parameters;
    * ``nuts``: chains started at what ``refine`` resampled, in its scale.
    """
    if method == "nuts":
        return _by_nuts(rowwise, rng_key, rows, held, num_samples)
    return _by_weights(rowwise, rng_key, rows, held, num_samples, refined=method == "refine")


def measured(number: int, **known: Any) -> dict[str, np.ndarray]:
    """Return the columns of rows, NaN for what is not known."""
    names = ("passed", "khat", "log_evidence", "converged", "rhat", "ess")
    return {name: np.array(known.get(name, np.full(number, np.nan))) for name in names}


def _by_weights(
    rowwise: Rowwise, rng_key: Array, rows: Rows, held: Held, num_samples: int, *, refined: bool
) -> Attempt:
    """Weigh proposals; where they are too few that count, propose around what they resample."""
    number = max(num_samples, CENTERS)
    found = rowwise.apply(propose, rows, rng_key, held, refined=refined, num_draws=PROPOSALS)
    made = _weighed(found, rng_key, rows, number)
    for stage in range(STAGES):
        left = np.flatnonzero(~made.columns["passed"].astype(bool) & found["whole"])
        if not left.size:
            break
        key = jax.random.fold_in(rng_key, stage)
        kernels = Kernels.around(made.draws[left, :CENTERS])
        part = rows.choose(rows.chosen[left])
        again = rowwise.apply_with(adapt, part, kernels, key, held)
        made.put(left, _weighed(again, key, part, number))
    if refined:
        made.columns["converged"] = found["converged"].astype(float)
    return made._replace(draws=made.draws[:, :num_samples])


def _weighed(found: dict[str, np.ndarray], rng_key: Array, rows: Rows, num_samples: int) -> Attempt:
    """Return resampled proposals, and what their weights say of them."""
    log_weights = found["log_weights"].astype(float)
    smoothed, khat = smooth(log_weights.T, rows.chosen)
    ess = 1 / np.exp(2 * smoothed).sum(0)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
    chosen = _resample(np.exp(smoothed).T, num_samples, rng)
    columns = measured(
        len(chosen),
        passed=(khat < khat_threshold(len(smoothed))) & (ess >= MIN_ESS),
        khat=khat,
        log_evidence=logsumexp(log_weights, axis=1) - np.log(log_weights.shape[1]),
        ess=ess,
    )
    return Attempt(np.take_along_axis(found["draws"], chosen[..., None], axis=1), columns)


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


def _by_nuts(rowwise: Rowwise, rng_key: Array, rows: Rows, held: Held, num_samples: int) -> Attempt:
    start = _by_weights(rowwise, rng_key, rows, held, STARTS, refined=True)
    total = len(start.draws)
    draws = np.empty((total, num_samples, start.draws.shape[-1]), start.draws.dtype)
    known = {name: np.full(total, np.nan) for name in ("rhat", "ess")}
    known["passed"], left = np.zeros(total, bool), np.arange(total)
    center, scale = start.draws.mean(1), np.maximum(start.draws.std(1), 1e-3)
    starts = np.stack([_far_apart(row) for row in (start.draws - center[:, None]) / scale[:, None]])
    starts = center[:, None] + scale[:, None] * starts
    for number, iterations in enumerate(ITERATIONS):
        chains = run_nuts(
            rowwise,
            rows.choose(rows.chosen[left]),
            jax.random.fold_in(rng_key, number),
            held,
            starts[left],
            center[left],
            scale[left],
            num_warmup=iterations // 2,
            num_samples=iterations,
        )
        rhat, ess = _diagnose(chains)
        known["rhat"][left], known["ess"][left] = rhat, ess
        known["passed"][left] = (rhat < MAX_RHAT) & (ess >= MIN_ESS)
        flat = chains.reshape(len(left), -1, chains.shape[-1])
        draws[left] = flat[:, np.linspace(0, flat.shape[1] - 1, num_samples).round().astype(int)]
        left = np.flatnonzero(~known["passed"])
        if not left.size:
            break
    return Attempt(draws, measured(total, **known))


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
