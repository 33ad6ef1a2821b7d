"""Models whose posterior and evidence are known in closed form, with data drawn from them."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

NUM_DATA = 512
NOISE = 0.5


@dataclass(frozen=True)
class Exact:
    """A model, its data, and by site the exact ``loc`` and ``scale``, unconstrained."""

    model: Any
    data: Any
    loc: dict[str, np.ndarray]
    scale: dict[str, np.ndarray]
    log_evidence: np.ndarray
    globals: dict[str, tuple[float, float]] = field(default_factory=dict)


def normal_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def normal_normal() -> Exact:
    precision = 1 + 1 / NOISE**2
    x = np.random.default_rng(0).normal(0, np.sqrt(1 + NOISE**2), NUM_DATA)
    return Exact(
        normal_model,
        x.astype(np.float32),
        {"z": x / NOISE**2 / precision},
        {"z": np.full(NUM_DATA, precision**-0.5)},
        stats.norm(0, np.sqrt(1 + NOISE**2)).logpdf(x),
    )


def factor_analysis() -> Exact:
    """Loadings with orthogonal columns, so that the exact posterior is diagonal."""
    rng = np.random.default_rng(1)
    directions, _ = np.linalg.qr(rng.normal(size=(6, 3)))
    loadings = directions * np.array([0.5, 1.0, 2.0])

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ loadings.T, NOISE).to_event(1), obs=x)

    x = rng.normal(size=(NUM_DATA, 3)) @ loadings.T + NOISE * rng.normal(size=(NUM_DATA, 6))
    variance = 1 / (1 + np.array([0.5, 1.0, 2.0]) ** 2 / NOISE**2)
    covariance = loadings @ loadings.T + NOISE**2 * np.eye(6)
    return Exact(
        model,
        x.astype(np.float32),
        {"z": x @ loadings / NOISE**2 * variance},
        {"z": np.broadcast_to(np.sqrt(variance), (NUM_DATA, 3))},
        stats.multivariate_normal(np.zeros(6), covariance).logpdf(x),
    )


def two_sites() -> Exact:
    """A vector on the reals and a positive scalar, each seen through noise of its own."""

    def model(x, y):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)
            numpyro.sample("y", dist.Normal(jnp.log(rate), 1.0), obs=y)

    rng = np.random.default_rng(2)
    x = rng.normal(0, np.sqrt(1 + NOISE**2), (NUM_DATA, 2))
    y = rng.normal(0, np.sqrt(2), NUM_DATA)
    precision = 1 + 1 / NOISE**2
    return Exact(
        model,
        (x.astype(np.float32), y.astype(np.float32)),
        {"z": x / NOISE**2 / precision, "rate": y / 2},
        {"z": np.full((NUM_DATA, 2), precision**-0.5), "rate": np.full(NUM_DATA, 0.5**0.5)},
        stats.norm(0, np.sqrt(1 + NOISE**2)).logpdf(x).sum(1) + stats.norm(0, 2**0.5).logpdf(y),
    )


def hierarchical_model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def hierarchical() -> Exact:
    """A global mean; the guide is mean-field, so its `mu` is as sure as if z were known."""
    x = np.random.default_rng(3).normal(1.0, np.sqrt(1 + NOISE**2), NUM_DATA)
    marginal, precision = 1 + NOISE**2, 1 + 1 / NOISE**2
    mu_variance = 1 / (1 + NUM_DATA / marginal)
    mu_loc = x.sum() / marginal * mu_variance
    scale = np.sqrt(marginal + mu_variance)
    return Exact(
        hierarchical_model,
        x.astype(np.float32),
        {"z": (mu_loc + x / NOISE**2) / precision},
        {"z": np.full(NUM_DATA, precision**-0.5)},
        stats.norm(mu_loc, scale).logpdf(x),
        {"mu": (mu_loc, (1 + NUM_DATA) ** -0.5)},
    )


EXACT = {
    "normal-normal": normal_normal,
    "factor analysis": factor_analysis,
    "two sites": two_sites,
    "global": hierarchical,
}
