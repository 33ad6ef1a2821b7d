"""What nobody sets trains: the default encoder at learning rates that people use, and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from models import normal_model
from numpyro.infer import SVI, Trace_ELBO
from scipy import stats

from numpyro_vae import MLP, AutoAmortizedNormal, fit
from numpyro_vae.encoders.base import MAX_NORM

RNG = np.random.default_rng(1)
COUNTS = RNG.poisson(RNG.gamma(2.0, 1.0, 800)).astype(np.float32)
X = jnp.linspace(-2.0, 2.0, 40)


def gamma_poisson(counts):
    """Rates of rows, and one of rates."""
    beta = numpyro.sample("beta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("row", len(counts)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, beta))
        numpyro.sample("counts", dist.Poisson(rate), obs=counts)


def exact_log_beta():
    """Mean and standard deviation of log beta, on a grid; a row's rate integrates out."""
    log_beta = np.linspace(-1.0, 1.0, 2001)
    beta = np.exp(log_beta)
    values, repeats = np.unique(COUNTS, return_counts=True)
    density = stats.nbinom.logpmf(values[:, None], 2.0, beta / (1 + beta))
    log_prob = stats.gamma.logpdf(beta, 2.0) + log_beta + repeats @ density
    weights = np.exp(log_prob - log_prob.max())
    mean = np.average(log_beta, weights=weights)
    return mean, np.sqrt(np.average((log_beta - mean) ** 2, weights=weights))


def test_a_global_site_of_counts_is_found_at_a_high_learning_rate():
    svi = SVI(gamma_poisson, AutoAmortizedNormal(gamma_poisson), optax.adam(1e-2), Trace_ELBO())
    result = fit(svi, jax.random.key(0), COUNTS, num_epochs=150, progress_bar=False)
    assert result.losses[:50].max() < 2 * result.losses[0]
    mean, sd = exact_log_beta()
    assert abs(result.params["beta_auto_loc"] - mean) < 0.35 * sd


def test_features_of_outliers_are_no_longer_than_others():
    encoder = MLP(COUNTS, rngs=nnx.Rngs(0))
    norms = jnp.linalg.norm(encoder(jnp.array([1.0, 1e4, 1e25])), axis=-1)
    np.testing.assert_allclose(norms[1:], MAX_NORM, rtol=1e-3)
    assert norms[0] < MAX_NORM


@pytest.mark.parametrize("accumulation_size", [1, 7])
def test_an_optimizer_that_reads_the_loss_trains(accumulation_size):
    """Its state has an infinite loss until it has seen as many steps."""
    plateau = optax.contrib.reduce_on_plateau(0.5, patience=3, accumulation_size=accumulation_size)
    optimizer = optax.chain(optax.adam(1e-2), plateau)
    svi = SVI(normal_model, AutoAmortizedNormal(normal_model), optimizer, Trace_ELBO())
    options = {"batch_size": 10, "num_epochs": 30, "progress_bar": False}
    result = fit(svi, jax.random.key(0), X, **options)
    assert np.isfinite(result.losses).all()
    state = result.state.optim_state[1][1][1]
    assert state.scale < 1
    assert result.losses[-20:].mean() < result.losses[:20].mean()
