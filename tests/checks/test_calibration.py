"""Simulation-based calibration of trained guides: of a family with the posterior in it, and not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import planted
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.calibration import vsbc_diagnostic
from scipy.stats import ks_2samp, kstest

from numpyro_vae import (
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Calibration,
    Posterior,
)

KEY = jax.random.key(1)
NUM_TRAIN, NUM_SIMULATIONS = 2000, 1000
WEIGHTS = np.array([[1.0, 1.0], [0.5, 0.0], [0.0, 0.5]], np.float32)


def positive(x):
    """The logarithms are Normal, so the posterior is LogNormal."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.LogNormal(0.0, 1.0))
        numpyro.sample("x", dist.LogNormal(jnp.log(z), 0.5), obs=x)


def of_logs(number):
    rng = np.random.default_rng(0)
    return np.exp(rng.normal(size=number) + 0.5 * rng.normal(size=number)).astype(np.float32)


CORRELATED = planted.linear(WEIGHTS, 0.5), planted.simulate(WEIGHTS, 0.5, NUM_TRAIN), {}
POSITIVE = positive, of_logs(NUM_TRAIN), {"inputs": jnp.log}


def uniformity(guide, model, data, options):
    """p-values of the ranks, and of how far they are from the middle."""
    posterior = planted.trained(model, planted.SMALL, (data,), 1500, guide=guide, **options)
    report = posterior.check(KEY, data[:500], Calibration(num_simulations=NUM_SIMULATIONS))
    pits = report.dataset["pit_z"].values.reshape(NUM_SIMULATIONS, -1).T
    ranks = [report.dataset["tarp"].values, *pits]
    tests = [kstest(x, "uniform").pvalue for u in ranks for x in (u, abs(2 * u - 1))]
    return report, np.array(tests)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "case"),
    [(AutoAmortizedMultivariateNormal, CORRELATED), (AutoAmortizedNormal, POSITIVE)],
    ids=["correlated", "positive"],
)
def test_ranks_are_uniform_if_the_family_has_the_posterior(guide, case):
    report, tests = uniformity(guide, *case)
    assert tests.min() > 1e-3
    assert all(finding.ok for finding in report.findings)


@pytest.mark.slow
def test_ranks_are_not_uniform_if_it_has_not():
    """A diagonal Normal is too narrow for latents that a datum ties together."""
    report, tests = uniformity(AutoAmortizedNormal, *CORRELATED)
    assert tests.min() < 1e-6
    assert not all(finding.ok for finding in report.findings)


@pytest.mark.slow
def test_ranks_are_those_of_numpyro_which_fits_every_simulation():
    """The best diagonal Normal of a datum is the same, amortized or found by its own SVI."""
    weights, noise = 1.3 * WEIGHTS, 0.7

    def model(x=None):
        with numpyro.plate("data", 1):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ weights.T, noise).to_event(1), obs=x)

    settings = {"num_simulations": 300, "num_svi_steps": 400, "num_samples": 250}
    optimizer, loss = numpyro.optim.Adam(0.05), Trace_ELBO(num_particles=4)
    guide, how = AutoNormal(model), {"observed_sites": ["x"], "chain_method": "vectorized"}
    old_key = jax.random.PRNGKey(0)  # it takes no other
    theirs = vsbc_diagnostic(old_key, model, guide, optimizer, loss, **how, **settings)
    case = planted.exact(weights, noise)
    ours = case.posterior.check(KEY, case.data, Calibration(num_simulations=1000)).dataset["pit_z"]
    for u, v in zip(ours.values.T, theirs.probabilities["z"].reshape(-1, 2).T, strict=True):
        for ranks, others in ((u, v), (abs(2 * u - 1), abs(2 * v - 1))):
            assert ks_2samp(ranks, others).pvalue > 1e-3
        assert max(kstest(abs(2 * x - 1), "uniform").pvalue for x in (u, v)) < 1e-4


def observed_in_turn(y, x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        numpyro.sample("y", dist.Normal(z + 2.0 * x, 1.0), obs=y)


def exact_in_turn(y, x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal((y - x) / 3.0, 3.0**-0.5))


def test_what_is_computed_from_an_observation_is_simulated_from_a_simulated_one():
    y, x = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    posterior = Posterior(exact_in_turn, {}, model=observed_in_turn)
    report = posterior.check(jax.random.key(0), (y, x), "calibration", progress_bar=False)
    assert all(finding.ok for finding in report.findings), report


def scaled(x, factor):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with handlers.scale(scale=factor):
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_where_data_are_scaled_otherwise_than_latents_there_is_none():
    """The exact posterior is not that of the latents that data are simulated with."""
    x, factor = np.linspace(-2.0, 2.0, 9).astype(np.float32), np.full(9, 0.1, np.float32)
    guide = AutoAmortizedNormal(scaled, planted.SMALL)
    svi = SVI(scaled, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(KEY, x, factor))
    posterior = Posterior(guide, params, natural_steps=8)
    found = posterior.encode((x, factor))["z"]
    np.testing.assert_allclose(found.scale, (1 + 0.1 / 0.25) ** -0.5, rtol=1e-4)
    with pytest.raises(ValueError, match="observed sites by other factors than its local ones"):
        posterior.check(KEY, (x, factor), "calibration", progress_bar=False)
