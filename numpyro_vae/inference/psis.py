"""Pareto-smoothed importance sampling, by row: what ArviZ does of one, for many at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import logsumexp

__all__ = ["khat_threshold", "pareto_khat"]

MIN_SAMPLES = 100  # of fewer draws the tail is too short to judge, and the threshold below 0.5
UNTRUSTWORTHY = 1.0  # a k-hat from which on the weights have no finite mean
NEGLIGIBLE = 0.01  # a range of log weights that is no tail to speak of: rounding, for the most part
PRIOR = 10  # draws that the prior of a k-hat, about a half, counts for
BLOCK = 128  # rows whose tails are fitted at once


class NoWeightsError(ValueError):
    """No row has importance weights that are finite."""


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
    """Return the Pareto k-hat of each datum's importance weights, as ``arviz_stats`` has it.

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


def smooth(
    log_weights: np.ndarray, size: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return Pareto-smoothed log weights that add up to one, and the k-hat, of each datum.

    Args:
        log_weights: ``(num_samples, num_data)``, minus infinity for a draw without density. Some of
            each datum are finite, and none is infinite or NaN.
        size: of the numbers that they were computed from, by datum: rounding is judged by it.
    """
    highest = log_weights.max(0)
    ratios = np.ascontiguousarray(log_weights.T - highest[:, None])
    length = tail_length(ratios.shape[1])
    places = np.argpartition(ratios, -length - 1, axis=1)[:, -length - 1 :]
    found = np.take_along_axis(ratios, places, axis=1)
    order = found.argsort(axis=1)
    places, found = (np.take_along_axis(x, order, axis=1) for x in (places, found))
    khat, scale = _fit_tails(found, ratios.min(1), 0 * highest, np.maximum(size, np.abs(highest)))
    smoothed = _quantiles(length, khat, scale, np.exp(found[:, :1]))
    known = np.isfinite(smoothed).all(1, keepdims=True)
    np.put_along_axis(ratios, places[:, 1:], np.where(known, smoothed, found[:, 1:]), axis=1)
    return (ratios - logsumexp(ratios, axis=1, keepdims=True)).T, khat


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

    Raises:
        NoWeightsError: if a row has, saying what is wrong with them.
    """
    rows = numbers[num_bad > 0]
    if not rows.size:
        return
    nowhere = numbers[highest == -np.inf]
    if nowhere.size:
        raise NoWeightsError(
            f"{len(nowhere)} rows have zero importance weight everywhere, the first is row "
            f"{nowhere[0]}: the model gives none of its draws any density. Is that row's data "
            "possible under the model?"
        )
    raise NoWeightsError(
        f"{len(rows)} rows have log weights that are not finite, the first is row {rows[0]}: "
        "the model or the guide gives a draw there no density. Look at that row's data."
    )


def require_some_density(log_weights: np.ndarray) -> None:
    """Raise NoWeightsError if no draw of the global sites has a finite weight."""
    if not np.isfinite(log_weights).any():
        raise NoWeightsError(
            "No draw of the global sites has a finite importance weight: for each of them the "
            "model gives some row no density. Are all data possible under the model?"
        )


def tail_length(num_samples: int) -> int:
    """Return how many of the largest weights are the tail, as ``arviz_stats`` has it."""
    return math.floor(3 * math.sqrt(num_samples) if num_samples > 225 else num_samples / 5)


def khat_of_tail(
    tail: np.ndarray, lowest: np.ndarray, highest: np.ndarray, reference: Any = 0.0
) -> np.ndarray:
    """Return the k-hat of each row, from its largest log weights, one more than the tail's.

    Args:
        tail: these, ``(length, num_rows)``, the highest first, counted from a reference as the next
            two.
        lowest: the lowest of all.
        highest: the highest.
        reference: by which rounding errors are judged.
    """
    size = np.maximum(np.abs(lowest + reference), np.abs(highest + reference))
    return _fit_tails(tail[::-1].T, lowest, highest, size)[0]


def _fit_tails(
    tails: np.ndarray, lowest: np.ndarray, highest: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return shape and scale of the generalized Pareto distribution of each row's largest weights.

    The shape is minus infinity where there is no tail: if all weights are alike, up to rounding, or
    if the largest are equal, and so the weights' bound. It is NaN where too many others are equal,
    and infinite where they are equal to zero beside the largest in floating point.

    Args:
        tails: log weights, ``(num_rows, length + 1)``, in order; the first is the cutoff.
        lowest: the lowest of all.
        highest: the highest.
        size: of the numbers that they were computed from.
    """
    shape, scale = np.full((2, len(tails)), -np.inf)
    tailed = (highest - lowest > np.maximum(1e-5 * (1 + size), NEGLIGIBLE)) & (
        tails[:, 1] < tails[:, -1]
    )
    rows = np.flatnonzero(tailed)
    for block in np.split(rows, range(BLOCK, len(rows), BLOCK)):
        weights = np.exp(tails[block].astype(float) - highest[block, None])
        shape[block], scale[block] = fit_pareto(weights[:, 1:] - weights[:, :1])
    differ = tails[:, 1 + _quartile(tails.shape[1] - 1)] > tails[:, 1]
    shape[np.isnan(shape) & differ] = np.inf
    return shape, scale


def fit_pareto(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return shape and scale of the generalized Pareto distribution of each row of excesses.

    That is what ``arviz_stats`` does of one row, with its weakly informative prior of the shape.

    Args:
        excess: over a cutoff, ``(num_rows, number)``, in order.

    Returns:
        The shapes, and the scales. NaN where the first quartile is no higher than the lowest.

    Reference:
        Zhang and Stephens, *A New and Efficient Estimation Method for the Generalized Pareto
        Distribution*, Technometrics, 2009.
    """
    number = excess.shape[1]
    grid = np.arange(1, 31 + math.isqrt(number)) - 0.5
    quartile = excess[:, _quartile(number)]
    with np.errstate(all="ignore"):  # of rows with ties, and of weights next to nothing
        rates = (1 - np.sqrt(len(grid) / grid)) / (3 * quartile[:, None]) + 1 / excess[:, -1:]
        shapes = np.log1p(-rates[..., None] * excess[:, None]).mean(-1)
        log_likelihood = number * (np.log(-rates / shapes) - shapes - 1)
        weights = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
        rate = (rates * weights).sum(1) / weights.sum(1)
        shape = np.log1p(-rate[:, None] * excess).mean(1)
        scale = -shape / rate
    shape = (number * shape + PRIOR * 0.5) / (number + PRIOR)
    shape = np.where(np.isnan(shape), np.inf, shape)
    return np.where(quartile > excess[:, 0], shape, np.nan), scale


def _quartile(number: int) -> int:
    """Return the place of the first quartile of so many values in order."""
    return int(number / 4 + 0.5) - 1


def _quantiles(number: int, shape: np.ndarray, scale: np.ndarray, cutoff: np.ndarray) -> np.ndarray:
    """Return the log of so many quantiles of each row's tail, none above the highest weight."""
    log_beyond = np.log1p(-(np.arange(number) + 0.5) / number)
    shape, scale = shape[:, None], scale[:, None]
    with np.errstate(all="ignore"):  # of rows whose tail was not fitted
        standard = np.where(shape == 0, -log_beyond, np.expm1(-shape * log_beyond) / shape)
        return np.minimum(np.log(cutoff + np.where(scale > 0, scale, np.nan) * standard), 0.0)
