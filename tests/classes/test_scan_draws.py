"""Observations in a scan, of distributions that are made of others."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import RNN, AutoAmortizedNormal, Posterior, fit
from numpyro_vae.model.redraw import redraw, undrawn

pytestmark = pytest.mark.filterwarnings(
    "ignore:shape requires ndarray or scalar arguments, got <class 'dict'>:DeprecationWarning"
)
KEY = jax.random.key(0)
STEPS, ROWS = 3, 2000

FUNCTIONS = {
    "LogNormal": lambda z: dist.LogNormal(0.0 * z, 1.0),
    "expanded": lambda z: dist.LogNormal(0.0, 1.0).expand(z.shape),
    "masked": lambda z: dist.HalfNormal(1.0 + 0.0 * z).mask(z < 9.0),
    "NegativeBinomial2": lambda z: dist.NegativeBinomial2(3.0 + 0.0 * z, 2.0),
    "StudentT": lambda z: dist.StudentT(5.0, 0.0 * z, 1.0),
    "Beta": lambda z: dist.Beta(2.0 + 0.0 * z, 3.0),
    "ZeroInflated": lambda z: dist.ZeroInflatedPoisson(0.2, 3.0 + 0.0 * z),
    "Normal": lambda z: dist.Normal(0.0 * z, 1.0),
}


def sequences(fn, y=None):
    def step(z, seen):
        with numpyro.plate("data", ROWS if y is None else len(y)):
            z = numpyro.sample("z", dist.Normal(0.5 * z, 1.0))
            numpyro.sample("y", fn(z), obs=seen)
        return z, None

    start = jnp.zeros(ROWS if y is None else len(y))
    scan(step, start, None if y is None else y.T, length=STEPS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_step_is_drawn_on_its_own_as_numpyro_draws_it(name):
    def model(y=None):
        sequences(FUNCTIONS[name], y)

    trace = handlers.trace(handlers.seed(redraw(model), 1)).get_trace(jnp.full((ROWS, STEPS), 0.5))
    assert not undrawn(trace)
    found = np.asarray(trace["y"]["value"], float)
    expected = np.asarray(handlers.trace(handlers.seed(model, 2)).get_trace()["y"]["value"], float)
    assert found.shape == expected.shape == (STEPS, ROWS)
    assert abs(np.corrcoef(found) - np.eye(STEPS)).max() < 4.5 / np.sqrt(ROWS)
    for moment in (np.mean, np.std):
        assert moment(found) == pytest.approx(moment(expected), rel=0.1, abs=0.08)


def test_predictions_of_steps_are_independent_given_the_latents():
    def model(y):
        sequences(lambda z: dist.LogNormal(0.3 * z, 0.8), y)

    y = np.random.default_rng(0).lognormal(size=(20, STEPS)).astype(np.float32)
    guide = AutoAmortizedNormal(model, RNN)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    posterior = Posterior(guide, fit(svi, KEY, y, num_epochs=2, progress_bar=False))
    found = np.log(posterior.predict(KEY, y, 2000)["y"]).sum(-1)
    draws = posterior.sample(KEY, y, 2000)["z"]  # (2000, STEPS, 20)
    noise = found - 0.3 * draws.sum(1)
    assert noise.std() == pytest.approx(0.8 * np.sqrt(STEPS), rel=0.03)
