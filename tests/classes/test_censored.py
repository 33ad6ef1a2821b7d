"""Censored distributions, of which NumPyro draws values that are not censored."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Predictive, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, Calibration, Posterior, amortize, fit
from numpyro_vae.checks import NotApplicableError

KEY = jax.random.key(0)
LIMIT = 1.0


def survival(t, censored):
    with numpyro.plate("patient", len(t)):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        base = dist.Exponential(rate[:, None])
        numpyro.sample("t", dist.RightCensoredDistribution(base, censored).to_event(1), obs=t)


def intervals(bounds):
    with numpyro.plate("data", len(bounds)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        fn = dist.IntervalCensoredDistribution(dist.Normal(z, 1.0), False, False)
        numpyro.sample("y", fn, obs=bounds)


def censor(made):
    return jnp.minimum(made["t"], LIMIT), jnp.asarray(made["t"] > LIMIT, jnp.int32)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0.0, 0.5, (400, 1))
    return censor({"t": (rng.exponential(size=(400, 4)) / rate).astype(np.float32)})


@pytest.fixture(scope="module")
def posterior(data):
    guide = AutoAmortizedNormal(survival)
    svi = SVI(survival, guide, optax.adam(1e-2), Trace_ELBO())
    return Posterior(guide, fit(svi, KEY, data, num_epochs=60, progress_bar=False))


def test_simulated_values_that_are_not_censored_are_not_compared_with_the_data(posterior, data):
    for check in ("calibration", "predictive"):
        with pytest.raises(NotApplicableError, match="Site 't' has a censored distribution"):
            posterior.check(KEY, data, check, progress_bar=False)


def test_calibration_is_of_simulations_that_are_censored(posterior, data):
    check = Calibration(to_data=censor)
    report = posterior.check(KEY, data, check, progress_bar=False)
    assert all(finding.ok for finding in report.findings), report


@pytest.mark.slow
def test_a_network_is_not_trained_on_simulations_that_are_not_censored(data, capsys):
    options = {"num_steps": 2, "num_simulation_steps": 3, "guide": AutoAmortizedNormal(survival)}
    amortize(survival, KEY, data, **options)
    assert "No simulations. Site 't' has a censored distribution" in capsys.readouterr().out
    amortize(survival, KEY, data, **options, to_data=censor)
    assert "No simulations" not in capsys.readouterr().out


def test_predictions_of_intervals_are_those_of_numpyro():
    low = np.random.default_rng(0).normal(size=50).astype(np.float32)
    bounds = np.stack([low, low + 0.3], -1)
    guide = AutoAmortizedNormal(intervals)
    svi = SVI(intervals, guide, optax.adam(1e-2), Trace_ELBO())
    posterior = Posterior(guide, fit(svi, KEY, bounds, num_epochs=2, progress_bar=False))
    found = posterior.predict(KEY, bounds, 2000)["y"]
    draws = posterior.sample(KEY, bounds, 2000)
    model = numpyro.handlers.uncondition(intervals)
    expected = Predictive(model, draws, batch_ndims=1)(KEY, jnp.asarray(bounds))["y"]
    assert found.shape == expected.shape == (2000, 50)
    error = (found.mean(0) - expected.mean(0)) / (expected.std(0) * np.sqrt(2 / 2000))
    assert abs(error).max() < 4.5
    tree = posterior.to_datatree(KEY, bounds, 10)
    assert tree.posterior_predictive["y"].dims == ("chain", "draw", "data")
    assert tree.observed_data["y"].shape == (50, 2)
