"""What the truth tests of model classes share: exact linear Gaussian answers."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from numpyro.infer import Trace_ELBO
from scipy import stats

from numpyro_vae import MLP

LINEAR = partial(MLP, hidden_sizes=(8,), activation=lambda hidden: hidden, standardize=False)


class Gaussian(NamedTuple):
    """The posterior of each datum, ``(batch, k)`` and ``(k, k)``, and its log evidence."""

    mean: np.ndarray
    covariance: np.ndarray
    log_evidence: np.ndarray

    @property
    def sd(self) -> np.ndarray:
        return np.sqrt(np.diag(self.covariance))

    def mean_field_gap(self) -> float:
        """The divergence of the best factorized Normal from the posterior, in nats."""
        precision = np.linalg.inv(self.covariance)
        return 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])


def exact(x, loadings, noise, prior_mean=0.0, prior=None) -> Gaussian:
    """Condition ``z ~ N(prior_mean, prior)`` on ``x ~ N(loadings z, noise)``.

    Args:
        x: ``(batch, d)``.
        loadings: ``(d, k)``.
        noise: the standard deviation, a number or ``(d,)``.
        prior_mean: a number or ``(k,)``.
        prior: the prior's covariance; by default the identity.
    """
    num_values, size = loadings.shape
    prior = np.eye(size) if prior is None else prior
    noise = np.diag(np.broadcast_to(np.square(noise), num_values))
    mean = np.broadcast_to(prior_mean, size)
    marginal = loadings @ prior @ loadings.T + noise
    gain = prior @ loadings.T @ np.linalg.inv(marginal)
    residual = np.asarray(x, float) - loadings @ mean
    evidence = stats.multivariate_normal(np.zeros(num_values), marginal).logpdf(residual)
    return Gaussian(
        mean + residual @ gain.T, prior - gain @ loadings @ prior, np.atleast_1d(evidence)
    )


def elbo(posterior, *args, particles=100, seed=1):
    """The bound of all data, in nats; where the guide is exact all particles agree."""
    guide = posterior.guide
    estimate = jax.jit(Trace_ELBO(num_particles=particles).loss, static_argnums=(2, 3))
    return -float(estimate(jax.random.key(seed), posterior.params, guide.model, guide, *args))
