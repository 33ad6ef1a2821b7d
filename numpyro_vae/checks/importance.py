"""Importance: what the weights of a datum's draws say of its posterior."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import logsumexp

from numpyro_vae.checks.base import Finding, Findings, Subject
from numpyro_vae.views import View, weigh

__all__ = ["khat_threshold", "pareto_khat"]

MIN_SAMPLES = 100  # of fewer draws the tail is too short to judge, and the threshold below 0.5
CHUNK = 1000  # draws at once, so that any number of them fits in memory
UNTRUSTWORTHY = 1.0  # a k-hat from which on the weights have no finite mean


def khat_threshold(num_samples: int) -> float:
    r"""Return the k-hat below which an importance estimate from so many draws is reliable.

    .. math:: \min(1 - 1 / \log_{10} S,\; 0.7)

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto Smoothed Importance Sampling*,
        Journal of Machine Learning Research 25(72), 2024.

    Example:
        >>> round(khat_threshold(100), 2), khat_threshold(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_samples), 0.7)


def pareto_khat(log_weights: np.ndarray) -> np.ndarray:
    """Return the Pareto k-hat of each datum's importance weights, by ``arviz_stats``.

    Weights that are all alike, up to rounding, have no tail: their k-hat is minus infinity.

    Args:
        log_weights: ``(num_samples, num_data)``.

    Raises:
        ValueError: if there are too few draws for a tail, or weights are not finite.

    Example:
        >>> log_weights = np.random.default_rng(0).normal(size=(1000, 2))
        >>> bool((pareto_khat(log_weights) < 0.5).all())
        True
    """
    _require_draws(len(log_weights))
    lowest, highest = log_weights.min(0), log_weights.max(0)
    _require_finite((~np.isfinite(log_weights)).sum(0), highest, np.arange(len(highest)))
    tail = np.sort(log_weights, axis=0)[::-1][: _tail_length(len(log_weights)) + 1]
    return _khat_of_tail(tail, lowest, highest)


def smooth(log_weights: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Pareto-smoothed log weights that add up to one, and the k-hat, of each datum.

    Args:
        log_weights: ``(num_samples, num_data)``; minus infinity for a draw without density.
        rows: the numbers of the data, for a message.

    Raises:
        ValueError: if a datum has zero importance weight everywhere.
    """
    from arviz_stats.base import array_stats

    highest = log_weights.max(0)
    _require_finite((~(np.abs(highest) < np.inf)).astype(int), highest, rows)
    lowest = np.finfo(np.float32).min / 2  # stands for minus infinity
    ratios = np.maximum(log_weights - highest, lowest).T
    khat = np.full(len(ratios), -np.inf)
    smoothed = ratios - logsumexp(ratios, axis=1, keepdims=True)
    uneven = np.ptp(ratios, axis=1) > 1e-5 * (1 + np.abs(highest))
    if uneven.any():
        with np.errstate(divide="ignore", invalid="ignore"):  # of a tail with ties
            smoothed[uneven], khat[uneven] = array_stats.psislw(-ratios[uneven], axis=-1)
    return smoothed.T, khat


def _require_draws(num_samples: int) -> None:
    if num_samples < MIN_SAMPLES:
        raise ValueError(
            f"A k-hat needs at least {MIN_SAMPLES} draws of each datum, found {num_samples}."
        )


def _require_finite(num_bad: np.ndarray, highest: np.ndarray, numbers: np.ndarray) -> None:
    """Raise if a row has log weights that are not finite.

    Args:
        num_bad: how many are not, by row.
        highest: the highest of each row.
        numbers: those of the rows.
    """
    rows = numbers[num_bad > 0]
    if not rows.size:
        return
    nowhere = numbers[highest == -np.inf]
    if nowhere.size:
        raise ValueError(
            f"{len(nowhere)} rows have zero importance weight everywhere, the first is row "
            f"{nowhere[0]}: the model gives none of its draws any density. Is that row's data "
            "possible under the model?"
        )
    raise ValueError(
        f"{len(rows)} rows have log weights that are not finite, the first is row {rows[0]}: "
        "the model or the guide gives a draw there no density. Look at that row's data."
    )


def _tail_length(num_samples: int) -> int:
    """Return how many of the largest weights are the tail, as ``arviz_stats`` has it."""
    return math.floor(3 * math.sqrt(num_samples) if num_samples > 225 else num_samples / 5)


def _khat_of_tail(
    tail: np.ndarray, lowest: np.ndarray, highest: np.ndarray, reference: Any = 0.0
) -> np.ndarray:
    """Return the k-hat of each row, from its largest log weights, one more than the tail's.

    Args:
        tail: these, ``(length, num_rows)``, counted from a reference as the next two.
        lowest: the lowest of all.
        highest: the highest.
        reference: by which rounding errors are judged.
    """
    from arviz_stats.base import array_stats

    khat = np.full(tail.shape[1], -np.inf)
    size = np.maximum(np.abs(lowest + reference), np.abs(highest + reference))
    spread = highest - lowest > 1e-5 * (1 + size)
    if spread.any():
        # What is below the tail does not matter but for its number. The same tail of five times
        # as many weights is what ``psislw`` takes for the tail of weights that are so few.
        length = len(tail) - 1
        rest = np.broadcast_to(tail[-1:], (4 * length, tail.shape[1]))
        ratios = np.concatenate([tail[:-1], rest])[:, spread].T.astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):  # of a tail with ties
            # It takes minus the log ratios, and few effective draws to mean a fifth for the tail.
            khat[spread] = array_stats.psislw(-ratios, r_eff=1e-9, axis=-1)[1]
    return khat


class Sums(NamedTuple):
    """What is kept of the log weights drawn so far, by row: enough for all that is reported.

    Log weights are counted from a ``reference``, the highest at first, as the log density of an
    image is in the thousands and what matters of it in the hundredths.
    """

    reference: Float[Array, "batch"]
    count: Float[Array, "batch"]
    mean: Float[Array, "batch"]
    squares: Float[Array, "batch"]  # of deviations from the mean
    log_sum: Float[Array, "batch"]  # of the weights
    log_sum_squares: Float[Array, "batch"]
    lowest: Float[Array, "batch"]
    num_bad: Float[Array, "batch"]
    largest: Float[Array, "batch tail"]

    @classmethod
    def start(cls, num_rows: int, tail: int) -> Sums:
        """Return the sums of no draws, with room for ``tail`` of the largest log weights."""
        zeros, low = jnp.zeros(num_rows), jnp.full(num_rows, -jnp.inf)
        largest = jnp.full((num_rows, tail), -jnp.inf)
        return cls(zeros, zeros, zeros, zeros, low, low, -low, zeros, largest)

    def add(self, log_weights: Float[Array, "num_samples batch"]) -> Sums:
        """Return the sums with further draws."""
        log_weights = jnp.asarray(log_weights)
        reference = jnp.where(self.count == 0, log_weights.max(0), self.reference)
        added = (log_weights - reference).T
        count, number = self.count + added.shape[1], added.shape[1]
        shift = added.mean(1) - self.mean
        squares = ((added - added.mean(1, keepdims=True)) ** 2).sum(1)
        both = jnp.concatenate([self.largest, added], axis=1)
        return Sums(
            reference,
            count,
            self.mean + shift * number / count,
            self.squares + squares + shift**2 * self.count * number / count,
            jnp.logaddexp(self.log_sum, jax.nn.logsumexp(added, axis=1)),
            jnp.logaddexp(self.log_sum_squares, jax.nn.logsumexp(2 * added, axis=1)),
            jnp.minimum(self.lowest, added.min(1)),
            self.num_bad + (~jnp.isfinite(log_weights)).sum(0),
            jax.lax.top_k(both, self.largest.shape[1])[0],
        )


def _accumulate(
    view: View, sums: Sums, rng_key: Array, globals_: dict, *, num_samples: int
) -> Sums:
    return sums.add(weigh(view, rng_key, globals_, num_samples=num_samples)["log_weights"])


def importance(subject: Subject, *, num_samples: int) -> dict[str, Any]:
    r"""Return by row what the weights :math:`w_s = p(x, z_s) / q(z_s \mid x)` say.

    The ELBO is the mean of :math:`\log w_s`, the log evidence
    :math:`\log \frac1S \sum_s w_s`, and the effective sample size
    :math:`(\sum_s w_s)^2 / \sum_s w_s^2`. Draws are added up as they come, and of their weights
    only the tail is kept, so that memory does not grow with their number but by its square root.

    Reference:
        Yao, Vehtari, Simpson and Gelman, *Yes, but Did It Work?*, ICML 2018; Burda, Grosse and
        Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016.

    Raises:
        ValueError: if there are too few draws for a k-hat, or a row's weights are not finite.
    """
    _require_draws(num_samples)
    rowwise, rows = subject.rowwise, subject.rows
    sizes = [min(CHUNK, num_samples - start) for start in range(0, num_samples, CHUNK)]
    keys = [jax.random.fold_in(subject.rng_key, number) for number in range(len(sizes))]
    chunks = [
        (key, rowwise.draw_globals(key, rows, size), size)
        for key, size in zip(keys, sizes, strict=True)
    ]
    tail = _tail_length(num_samples) + 1

    def of_batch(arrays: Any, indices: Array, **how: Any) -> Sums:
        sums = Sums.start(len(indices), tail)
        for key, globals_, size in chunks:
            add = partial(rowwise.run, _accumulate, sums, key, globals_)
            sums = add(arrays, indices, num_samples=size, **how)
        return sums

    found = rows.collect(of_batch, rowwise.rows_at_once(min(CHUNK, num_samples)))
    return {name: ([subject.plate], values) for name, values in summarize(found).items()}


def summarize(sums: Sums) -> dict[str, np.ndarray]:
    """Return what is reported of each row, from the sums over all its draws.

    Raises:
        ValueError: if a row's weights are not finite.
    """
    highest = np.asarray(sums.largest[:, 0], float)
    bad, first = np.asarray(sums.num_bad), np.asarray(sums.reference)
    _require_finite(bad, first, np.arange(len(bad)))
    reference = np.asarray(sums.reference, float)
    number = float(np.max(sums.count))
    log_sum, log_squares = (np.asarray(x, float) for x in (sums.log_sum, sums.log_sum_squares))
    ess = np.exp(2 * log_sum - log_squares)
    relative_variance = np.maximum(number / ess - 1, 0) / (number - 1)
    return {
        "elbo": reference + sums.mean,
        "elbo_mcse": np.sqrt(np.asarray(sums.squares, float) / (number - 1) / number),
        "log_evidence": reference + log_sum - np.log(number),
        "log_evidence_mcse": np.sqrt(relative_variance),
        "khat": _khat_of_tail(
            np.asarray(sums.largest, float).T, np.asarray(sums.lowest), highest, reference
        ),
        "ess": ess,
    }


def find(dataset: Any, attrs: dict[str, Any]) -> Findings:
    """Return how many rows have a posterior that cannot be trusted."""
    khat, threshold = dataset["khat"].values, attrs["khat_threshold"]
    bad = int((~(khat < threshold)).sum())  # NaN, of a tail of ties, is no good sign
    text = f"{bad:,} of {khat.size:,} rows have k-hat > {threshold:.2f}"
    advice = "repair them: posterior.repair(rng_key, data, report)" if bad else ""
    yield Finding("importance", not bad, text, advice)
