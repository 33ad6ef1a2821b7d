"""Adaptive importance sampling of the global sites, in their unconstrained space, on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp
from scipy.stats import multivariate_t

from numpyro_vae.inference.marginal import LogDensity
from numpyro_vae.inference.psis import khat_threshold, require_some_density, smooth

DEGREES = 8.0  # of freedom of a proposal: heavier tails than those of most posteriors
NUM_PROPOSALS = 1000  # of a round
MAX_ROUNDS = 6
MIN_ESS = 400.0  # effective draws that a mean and its error need (Vehtari et al., 2021)
ENOUGH = 1000.0  # effective draws after which no more are made
LEAST = 1e-6  # the smallest standard deviation

Density = Callable[[np.ndarray], LogDensity]


class StudentT(NamedTuple):
    """A multivariate t distribution of a few degrees of freedom.

    Attributes:
        loc: ``(size,)``.
        scale_tril: the Cholesky factor of its shape matrix, ``(size, size)``.
    """

    loc: np.ndarray
    scale_tril: np.ndarray

    @classmethod
    def fitted(cls, points: np.ndarray, log_weights: np.ndarray) -> StudentT:
        """Return the distribution with the moments of weighted points.

        Where few points count, their weights are flattened by a power until several times as many
        as there are dimensions do; correlations are shrunk to zero by how many do.

        Args:
            points: ``(number, size)``.
            log_weights: ``(number,)``.
        """
        number, size = points.shape
        weights = _flattened(log_weights, min(max(50.0, 5.0 * size), number / 4))
        loc = weights @ points
        centered = points - loc
        scale = np.maximum(np.sqrt(weights @ centered**2), LEAST)
        z = centered / scale
        ess = 1 / (weights**2).sum()
        share = ess / (ess + 2 * size)
        correlation = share * (z.T * weights) @ z + (1 - share) * np.eye(size)
        return cls(loc, scale[:, None] * np.linalg.cholesky(correlation))

    def sample(self, rng: np.random.Generator, number: int) -> Float[np.ndarray, "number size"]:
        """Draw points."""
        normal = rng.normal(size=(number, len(self.loc)))
        factor = np.sqrt(DEGREES / rng.chisquare(DEGREES, number))
        return self.loc + factor[:, None] * (normal @ self.scale_tril.T)

    def log_prob(self, points: Float[np.ndarray, "number size"]) -> Float[np.ndarray, "number"]:
        """Return the log-density of points."""
        shape = self.scale_tril @ self.scale_tril.T
        return np.atleast_1d(multivariate_t(self.loc, shape, DEGREES).logpdf(points))


@dataclass(frozen=True)
class Weighted:
    """Points with importance weights, and what these say.

    Attributes:
        points: ``(number, size)``.
        density: the log density of the points.
        log_weights: Pareto-smoothed, adding up to one.
        khat: that of the weights.
    """

    points: np.ndarray
    density: LogDensity
    log_weights: np.ndarray
    khat: float

    @classmethod
    def of(cls, points: np.ndarray, density: LogDensity, log_q: np.ndarray) -> Weighted:
        """Weigh points by the log-density that they were drawn by."""
        log_weights = density.values - log_q
        require_some_density(log_weights)
        smoothed, khat = smooth(log_weights[:, None])
        return cls(points, density, smoothed[:, 0], float(khat[0]))

    @property
    def ess(self) -> float:
        """How many points count."""
        return float(1 / np.exp(logsumexp(2 * self.log_weights)))

    @property
    def error(self) -> float:
        """How far the error of the density moves a mean, in standard deviations, at most."""
        with_errors = self.log_weights[:, None] + self.density.errors.T
        log_weights = np.column_stack([self.log_weights, with_errors])
        weights = np.exp(log_weights - logsumexp(log_weights, axis=0))
        means = weights.T @ self.points
        deviations = np.sqrt(weights[:, 0] @ (self.points - means[0]) ** 2)
        moved = np.sqrt(((means[1:] - means[0]) ** 2).mean(0))
        return float((moved / np.maximum(deviations, LEAST)).max())

    @property
    def passes(self) -> bool:
        """Whether weighted points can be trusted."""
        return self.khat < khat_threshold(len(self.points)) and self.ess >= MIN_ESS


def adapt(
    first: Weighted, density: Density, rng: np.random.Generator, max_error: float
) -> Weighted:
    r"""Draw from distributions fitted to what those before have found, until the weights are good.

    In each round a multivariate t distribution is fitted to all points so far, and more are drawn
    from it. All of them are weighed by the mixture that they were drawn from,

    .. math:: w_s = p(g_s, x) \Big/ \sum_j \frac{n_j}{n} t_j(g_s).

    Args:
        first: points with weights to begin with, which are then forgotten.
        density: of points.
        rng: what random numbers come from.
        max_error: of the means, in standard deviations, above which the density is too imprecise
            for more points to be of use.

    Reference:
        Cornuet, Marin, Mira and Robert, *Adaptive Multiple Importance Sampling*, Scandinavian
        Journal of Statistics 39, 2012; Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto Smoothed
        Importance Sampling*, Journal of Machine Learning Research 25(72), 2024.
    """
    found, proposals = first, []
    points, parts = np.zeros((0, first.points.shape[1])), []
    for _ in range(MAX_ROUNDS):
        proposals.append(StudentT.fitted(found.points, found.log_weights))
        drawn = proposals[-1].sample(rng, NUM_PROPOSALS)
        points = np.concatenate([points, drawn])
        parts.append(density(drawn))
        log_q = logsumexp([proposal.log_prob(points) for proposal in proposals], axis=0)
        found = Weighted.of(points, LogDensity.joined(parts), log_q - np.log(len(proposals)))
        if found.passes and (found.ess >= ENOUGH or found.error > max_error):
            break
    return found


def _flattened(log_weights: np.ndarray, least: float) -> np.ndarray:
    """Return weights of which so many count, raised to the largest power up to 1 that lets them."""

    def powered(power: float) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            scaled = np.where(log_weights == -np.inf, -np.inf, power * log_weights)
        return np.exp(scaled - logsumexp(scaled))

    low, high = 0.0, 1.0
    if 1 / (powered(high) ** 2).sum() >= least:
        return powered(high)
    for _ in range(30):
        middle = (low + high) / 2
        counts = 1 / (powered(middle) ** 2).sum() >= least
        low, high = (middle, high) if counts else (low, middle)
    return powered(low)
