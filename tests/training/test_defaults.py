"""What nobody sets trains: the default encoder at learning rates that people use, and schedules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from models import normal_model
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from scipy import stats

from numpyro_vae import (
    MLP,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ResidualMLP,
    fit,
)
from numpyro_vae.encoders.base import shorten
from numpyro_vae.objectives import ImportanceWeightedELBO
from numpyro_vae.training.convergence import warn_of_losses

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


@pytest.mark.slow
def test_a_global_site_of_counts_is_found_at_a_high_learning_rate():
    svi = SVI(gamma_poisson, AutoAmortizedNormal(gamma_poisson), optax.adam(1e-2), Trace_ELBO())
    result = fit(svi, jax.random.key(0), COUNTS, num_epochs=150, progress_bar=False)
    assert result.losses[:50].max() < 2 * result.losses[0]
    mean, sd = exact_log_beta()
    assert abs(result.params["beta_auto_loc"] - mean) < 0.35 * sd


def test_features_of_outliers_are_little_longer_than_others():
    encoder = MLP(COUNTS, rngs=nnx.Rngs(0))
    norms = jnp.linalg.norm(encoder(jnp.array([3.0, 10.0, 1e4, 1e25])), axis=-1)
    assert np.all(np.diff(norms) > 0)
    assert norms[-1] < 100


@pytest.mark.parametrize("size", [0.0, 1e-10, 1.0, 100.0, 1e25])
def test_features_are_short_and_have_a_gradient(size):
    value, gradient = jax.jvp(shorten, (jnp.full(3, size),), (jnp.ones(3),))
    norm = size * np.sqrt(3)
    np.testing.assert_allclose(jnp.linalg.norm(value), np.arcsinh(norm), rtol=1e-5)
    expected = np.sqrt(3) / np.sqrt(1 + norm**2)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), expected, rtol=1e-3, atol=1e-20)


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


def losses_of(start, stop, num_steps=2000, noise=0.1):
    """Losses that fall by a line over the last tenth of the steps, and are noisy."""
    line = np.append(
        np.full(num_steps - num_steps // 10, start), np.linspace(start, stop, num_steps // 10)
    )
    return (line + noise * np.random.default_rng(0).normal(size=num_steps)).astype(np.float32)


def judge(losses, model=gamma_poisson, loss=Trace_ELBO):
    guide = AutoAmortizedNormal(model)
    guide.setup(COUNTS)
    warn_of_losses(losses, SVI(model, guide, optax.adam(1e-3), loss()), guide.sites)


@pytest.mark.parametrize(
    "losses",
    [
        losses_of(2.0, 1.8),
        losses_of(2.0, 1.98, noise=1e-3),
        losses_of(2.0, 1.0, num_steps=200),
        np.where(np.arange(2000) % 2, losses_of(2.0, 1.8), np.nan),
    ],
)
def test_losses_that_still_fall_are_warned_about(losses):
    with pytest.warns(UserWarning, match="still falling .* by .*more epochs"):
        judge(losses)


@pytest.mark.parametrize(
    "losses",
    [
        losses_of(2.0, 2.2),  # rising
        losses_of(2.0, 1.96),  # by less than the noise
        losses_of(2.0, 1.992, noise=1e-4),  # by next to nothing
        losses_of(2.0, 1.0, num_steps=190),  # too few to judge by
        losses_of(2.0, 1.94, num_steps=300),  # uncertain
        np.zeros(0, np.float32),
    ],
)
def test_losses_are_not_warned_about_without_reason(losses):
    judge(losses)


@pytest.mark.parametrize("loss", [Trace_ELBO, ImportanceWeightedELBO])
def test_a_positive_elbo_of_discrete_data_is_warned_about(loss):
    with pytest.warns(UserWarning, match="ELBO is 0.5.* discrete"):
        judge(losses_of(-0.5, -0.5), loss=loss)
    judge(losses_of(-0.005, -0.005))  # by less than the noise
    judge(losses_of(-0.5, -0.5), normal_model)  # densities may be large
    judge(losses_of(-0.5, -0.5), loss=partial(RenyiELBO, alpha=2.0))  # not known to be a bound


def test_a_fit_that_was_too_short_says_so():
    svi = SVI(normal_model, AutoAmortizedNormal(normal_model), optax.adam(1e-3), Trace_ELBO())
    options = {"num_epochs": 100, "batch_size": 10, "progress_bar": False}
    with pytest.warns(UserWarning, match="still falling"):
        fit(svi, jax.random.key(0), 100 + X, **options)


def test_a_validation_loss_that_is_not_finite_is_warned_about():
    svi = SVI(normal_model, AutoAmortizedNormal(normal_model), optax.adam(1e-3), Trace_ELBO())
    rows = np.concatenate([X[:3], np.full_like(X[:1], 1e30)])
    options = {"num_epochs": 2, "validation": rows, "progress_bar": False}
    with pytest.warns(UserWarning, match="not finite after 2 of 2 epochs, first after epoch 0"):
        fit(svi, jax.random.key(0), X, **options)


@pytest.mark.slow
def test_a_wide_network_learns_many_correlations():
    """It threw them so far in some steps that densities of draws were off without limit."""
    rng, mix = np.random.default_rng(0), np.eye(24) + 1
    x = rng.normal(size=(512, 24)) @ mix + 0.3 * rng.normal(size=(512, 24))

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([24]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ mix, 0.3).to_event(1), obs=x)

    guide = AutoAmortizedMultivariateNormal(model, partial(ResidualMLP, hidden_size=1024))
    svi = SVI(model, guide, optax.adam(1e-3), ImportanceWeightedELBO(1, "stl"))
    options = {"batch_size": 64, "num_epochs": 40, "progress_bar": False}
    losses = fit(svi, jax.random.key(0), x.astype(np.float32), **options).losses
    assert np.isfinite(losses).all()
    assert 38 < losses[-20:].mean() < 400  # of 240,000 at first; minus the evidence is 38.1
