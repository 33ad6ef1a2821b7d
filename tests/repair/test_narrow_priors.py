"""Globals that make the rows' prior so narrow that none of the guide's draws is near it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import halfcauchy, norm

from numpyro_vae import Posterior
from numpyro_vae.inference.marginal import without_bias

KEY = jax.random.key(0)
X = (0.3 * np.random.default_rng(0).normal(size=18)).astype(np.float32)


def model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, tau))
        numpyro.sample("x", dist.Normal(z, 0.3), obs=x)


def guide(x):
    numpyro.sample("mu", dist.Normal(0.0, 0.1))
    numpyro.sample("tau", dist.LogNormal(-2.0, 0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0.5 * x, 0.25))


def exact():
    """Mean and standard deviation of `mu` and of `log(tau)`, by quadrature."""
    mu, log_tau = np.linspace(-0.5, 0.5, 201)[:, None], np.linspace(-10.0, 2.0, 601)
    tau = np.exp(log_tau)
    density = norm.logpdf(mu) + halfcauchy.logpdf(tau) + log_tau
    for x in X:
        density = density + norm.logpdf(x, mu, np.hypot(0.3, tau))
    weights = np.exp(density - density.max())
    weights /= weights.sum()

    def moments(values):
        mean = (weights * values).sum()
        return mean, np.sqrt((weights * (values - mean) ** 2).sum())

    return moments(mu), moments(log_tau)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_globals_of_a_funnel_are_repaired(seed):
    found = Posterior(guide, {}, model=model).repair_globals(
        jax.random.key(seed), X, num_samples=4000
    )
    assert found.passed
    assert found.method == "importance"
    assert found.error < 0.1
    of_mu, of_log_tau = exact()
    for (mean, sd), draws in (
        (of_mu, found.draws["mu"]),
        (of_log_tau, np.log(found.draws["tau"])),
    ):
        assert draws.mean() == pytest.approx(mean, abs=0.15 * sd)
        assert draws.std() == pytest.approx(sd, rel=0.2)


def test_what_halves_say_of_the_bias_is_bounded():
    """Of particles that miss the density it would be thousands of nats, and its largest value."""
    near, far = without_bias(jnp.array([-1.0, -10.0]), jnp.array([-1.2, -5000.0]))
    assert near == pytest.approx(-1.1 + 2 * np.log(np.cosh(0.1)), abs=1e-4)
    assert -11.0 < far < -10.0
