"""What is observed of no row is given: of rows that are predicted or simulated too."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import make_svi
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, ForwardKL, Posterior, Simulations, fit
from numpyro_vae.training.simulations import SimulationSource
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import batch_of, trainer_of

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(10.0, 1.0, 2000).astype(np.float32)


def free(x, num_data=None):
    """A mean of all rows, whose prior is far wider than the rows lie around it."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 20.0))
    with numpyro.plate("data", num_data or len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 0.6))
        numpyro.sample("x", dist.Normal(z + mu, 0.8), obs=x)


def observed(mu, x):
    """The same, the mean observed."""
    return handlers.condition(free, data={"mu": mu})(x)


conditioned = handlers.condition(free, data={"mu": jnp.float32(5.0)})


@pytest.fixture(scope="module")
def posterior():
    """Of a guide that is not trained."""
    guide = AutoAmortizedNormal(conditioned)
    svi = SVI(conditioned, guide, optax.adam(1e-2), Trace_ELBO())
    return Posterior(guide, svi.get_params(svi.init(KEY, X)))


def test_predictions_are_those_of_numpyro_given_the_draws(posterior):
    found = posterior.predict(KEY, X, 50)["x"]
    draws = posterior.sample(KEY, X, 50)
    expected = Predictive(conditioned, draws, batch_ndims=1)(KEY, None, len(X))["x"]
    error = 5 * 0.8 / found.size**0.5
    np.testing.assert_allclose((found - draws["z"]).mean(), 5.0, atol=error)
    np.testing.assert_allclose(found.mean(), np.asarray(expected).mean(), atol=2 * error)


def test_new_rows_have_what_is_given(posterior):
    """Their mean is twice that of the rows, their variance that of both Normals."""
    groups = ("posterior_predictive",)
    tree = posterior.to_datatree(KEY, X, 50, groups=groups, marginal=True)
    x = tree.posterior_predictive["x"].values
    np.testing.assert_allclose(x.mean(), 10.0, atol=5 / x.size**0.5)
    np.testing.assert_allclose(x.std(), 1.0, rtol=5 / (2 * x.size) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "axes"), [(conditioned, (X,), 0), (observed, (np.float32(5.0), X), (None, 0))]
)
def test_simulated_rows_have_what_is_given(model, data, axes):
    svi = make_svi(model, loss=ForwardKL())
    simulations = Simulations(len(X), like=data)
    result = fit(svi, KEY, simulations, num_epochs=1, batch_axes=axes, progress_bar=False)
    trainer = trainer_of(svi)
    like = ArraySource(trainer, trainer.read(data, axes), len(X), None)
    plan = SimulationSource(trainer, like, simulations).plan
    order = jnp.arange(len(X))[None]
    table, _ = trainer.draw(plan, result.state, KEY[None], like.first(), order)
    batch = batch_of(table, 0)
    assert set(batch.latents.drawn) == {"z"}
    z, x = np.asarray(batch.latents.drawn["z"]), np.asarray(batch.arrays[-1])
    for found, scale in ((z, 0.6), (x - z, 0.8)):
        np.testing.assert_allclose(found.mean(), 5.0, atol=5 * scale / len(X) ** 0.5)
        np.testing.assert_allclose(found.std(), scale, rtol=5 / (2 * len(X)) ** 0.5)


def test_the_forward_divergence_simulates_given_what_is_given():
    """In `SVI.run` too; the model's prior of the mean would give losses of hundreds."""
    svi = make_svi(conditioned, loss=ForwardKL())
    losses = svi.run(KEY, 300, X, progress_bar=False).losses
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.6**2 * 0.64)  # of z given x
    assert abs(float(losses[-20:].mean()) / len(X) - entropy) < 0.2
