"""Pareto-smoothed importance sampling, by row: ArviZ's, for many rows and long tails."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import logsumexp

__all__ = ["khat_threshold", "pareto_khat"]

MIN_SAMPLES = 100  # of fewer draws the tail is too short to judge, and the threshold below 0.5
UNTRUSTWORTHY = 1.0  # a k-hat from which on the weights have no finite mean
NEGLIGIBLE = 0.01  # a range of log weights that is no tail to speak of: rounding, for the most part


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

    Weights that are all alike, up to rounding or within a hundredth, have no tail: their k-hat is
    minus infinity.

    Args:
        log_weights: ``(num_samples, num_data)``.

    Raises:
        ValueError: if there are too few draws for a tail, or weights are not finite.

    Example:
        >>> log_weights = np.random.default_rng(0).normal(size=(1000, 2))
        >>> bool((pareto_khat(log_weights) < 0.5).all())
        True
    """
    require_draws(len(log_weights))
    lowest, highest = log_weights.min(0), log_weights.max(0)
    require_finite((~np.isfinite(log_weights)).sum(0), highest, np.arange(len(highest)))
    tail = np.sort(log_weights, axis=0)[::-1][: tail_length(len(log_weights)) + 1]
    return khat_of_tail(tail, lowest, highest)


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
    require_finite((~(np.abs(highest) < np.inf)).astype(int), highest, rows)
    lowest = np.finfo(np.float32).min / 2  # stands for minus infinity
    ratios = np.maximum(log_weights - highest, lowest).T
    khat = np.full(len(ratios), -np.inf)
    smoothed = ratios - logsumexp(ratios, axis=1, keepdims=True)
    uneven = np.ptp(ratios, axis=1) > 1e-5 * (1 + np.abs(highest))
    if uneven.any():
        with np.errstate(divide="ignore", invalid="ignore"):  # of a tail with ties
            smoothed[uneven], khat[uneven] = array_stats.psislw(-ratios[uneven], axis=-1)
    return smoothed.T, khat


def require_draws(num_samples: int) -> None:
    if num_samples < MIN_SAMPLES:
        raise ValueError(
            f"A k-hat needs at least {MIN_SAMPLES} draws of each datum, found {num_samples}."
        )


def require_finite(num_bad: np.ndarray, highest: np.ndarray, numbers: np.ndarray) -> None:
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


def tail_length(num_samples: int) -> int:
    """Return how many of the largest weights are the tail, as ``arviz_stats`` has it."""
    return math.floor(3 * math.sqrt(num_samples) if num_samples > 225 else num_samples / 5)


def khat_of_tail(
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
    spread = highest - lowest > np.maximum(1e-5 * (1 + size), NEGLIGIBLE)
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
