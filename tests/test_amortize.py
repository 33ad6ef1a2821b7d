"""A trained posterior in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import SMALL
from numpyro.contrib.control_flow import scan

from numpyro_vae import (
    RNN,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ConvNet,
    ResidualMLP,
    amortize,
)
from numpyro_vae.choices import choose_guide

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NOISE = 0.5
Z = RNG.normal(size=(600, 1))
X = (Z + RNG.normal(0, NOISE, (600, 3))).astype(np.float32)
QUIET = {"progress_bar": False}


def model(x, noise=NOISE):
    """Three observations of the sum of two latents, whose joint posterior is known."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 0.5**0.5).expand([2]).to_event(1))
        loc = jnp.broadcast_to(z.sum(-1, keepdims=True), x.shape)
        numpyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)


def exact(x):
    """The mean of either latent, and the covariance of the two."""
    precision = np.eye(2) / 0.5 + 3 / NOISE**2
    covariance = np.linalg.inv(precision)
    return (covariance @ np.full((2, len(x)), x.sum(-1) / NOISE**2)).T, covariance


@pytest.fixture(scope="module")
def posterior():
    return amortize(model, KEY, X, num_steps=600, num_simulation_steps=900, **QUIET)


@pytest.mark.slow
def test_the_posterior_is_the_exact_one(posterior):
    """As nearly as so short a training comes, and Monte Carlo error."""
    mean, covariance = exact(X)
    draws = posterior.sample(jax.random.key(1), X[:100], 2000)["z"]
    sd = covariance[0, 0] ** 0.5
    np.testing.assert_allclose(draws.mean(0), mean[:100], atol=0.25 * sd)
    found = np.mean([np.cov(draws[:, row].T) for row in range(100)], axis=0)
    np.testing.assert_allclose(found, covariance, rtol=0.15)
    report = posterior.check(jax.random.key(2), X[:100], **QUIET)
    assert (report.verdict <= 1).mean() > 0.95


@pytest.mark.slow
def test_the_same_key_gives_the_same_posterior(posterior):
    again = amortize(model, KEY, X, num_steps=600, num_simulation_steps=900, **QUIET)
    jax.tree.map(np.testing.assert_array_equal, posterior.params, again.params)


@pytest.mark.slow
def test_it_says_what_it_does(capsys):
    amortize(model, KEY, X, num_steps=20, num_simulation_steps=10)
    told = capsys.readouterr().out
    assert "AutoAmortizedFlow with ResidualMLP, for ['z'] of 600 rows" in told
    assert "The ELBO of the data: 4 epochs" in told
    assert "The forward KL of simulations: 8 epochs" in told
    assert "The ELBO of simulations: 8 epochs" in told
    assert "60 data" in told  # a tenth is held out, and checked


@pytest.mark.slow
def test_every_choice_can_be_replaced():
    guide = AutoAmortizedNormal(model, SMALL)
    held_out = X[:50]
    posterior = amortize(
        model,
        KEY,
        X,
        guide=guide,
        optimizer=lambda num_steps: optax.sgd(0.0),
        validation=held_out,
        batch_size=60,
        num_steps=20,
        num_simulation_steps=0,
        static_kwargs={"noise": 0.3},
        **QUIET,
    )
    assert posterior.guide is guide
    assert posterior.static_kwargs == {"noise": 0.3}


@pytest.mark.slow
def test_a_model_that_cannot_be_simulated_is_trained_on_the_data(capsys):
    def improper(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            loc = jnp.broadcast_to(z[:, None], x.shape)
            numpyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)

    posterior = amortize(improper, KEY, X, num_steps=20, num_simulation_steps=10)
    assert "No simulations. Site 'z' has an improper prior" in capsys.readouterr().out
    assert np.isfinite(posterior.sample(KEY, X, 2)["z"]).all()


@pytest.mark.slow
def test_simulations_that_do_harm_are_undone(capsys):
    """Those of a prior that does not know the data, which the network then forgets."""
    options = {"guide": AutoAmortizedNormal(model, SMALL), "num_steps": 600, "natural_steps": 0}
    posterior = amortize(model, KEY, X + 8, num_simulation_steps=600, **options)
    assert "better verdicts before: the last 2." in capsys.readouterr().out
    first = amortize(model, KEY, X + 8, num_simulation_steps=0, **options, **QUIET)
    jax.tree.map(np.testing.assert_array_equal, posterior.params, first.params)


@pytest.mark.slow
def test_models_that_take_their_data_whole():
    def selects(x):
        with numpyro.plate("data", len(x), subsample_size=60) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            loc = jnp.broadcast_to(z[:, None], (len(z), 3))
            numpyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x[rows])

    options = {"num_steps": 20, "num_simulation_steps": 5, **QUIET}
    selected = amortize(selects, KEY, X, batch_size=60, **options)
    assert selected.sample(KEY, X, 3)["z"].shape == (3, 600)
    whole = amortize(model, KEY, X[:50], batch_axes=None, **options)
    assert whole.sample(KEY, X[:50], 3)["z"].shape == (3, 50, 2)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([X], {}, "data is a list, expected an array"),
        (X, {"num_steps": 0}, "num_steps is 0"),
        (X[:0], {}, "data is empty"),
        (X * np.nan, {}, "NaN or infinite"),
    ],
)
def test_bad_input(data, options, message):
    with pytest.raises(ValueError, match=message):
        amortize(model, KEY, data, **options, **QUIET)


class TestChoice:
    def of_size(self, size, shape=(3,)):
        def model(x):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
                loc = z.sum(-1).reshape(-1, *[1] * len(shape))
                loc = jnp.broadcast_to(loc, x.shape)
                numpyro.sample("x", dist.Normal(loc, 1.0).to_event(len(shape)), obs=x)

        return choose_guide(model, np.zeros((4, *shape), np.float32))

    def test_the_family_follows_the_number_of_latents(self):
        assert type(self.of_size(1)) is AutoAmortizedFlow
        assert type(self.of_size(16)) is AutoAmortizedFlow
        assert type(self.of_size(17)) is AutoAmortizedMultivariateNormal
        assert type(self.of_size(32)) is AutoAmortizedMultivariateNormal
        assert type(self.of_size(33)) is AutoAmortizedLowRankMultivariateNormal

    @pytest.mark.parametrize(
        ("shape", "encoder"),
        [((3,), ResidualMLP), ((8, 8), ResidualMLP), ((16, 16), ConvNet), ((32, 32, 3), ConvNet)],
    )
    def test_the_encoder_follows_the_shape_of_the_data(self, shape, encoder):
        assert self.of_size(2, shape).encoder is encoder

    def test_masked_latents_are_independent(self):
        def masked(x, there):
            with numpyro.plate("data", len(x)), numpyro.handlers.mask(mask=there):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("w", dist.Normal(0.0, 1.0))
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

        data = (np.zeros(4, np.float32), np.ones(4, bool))
        assert type(choose_guide(masked, data)) is AutoAmortizedNormal

    def test_sequences(self):
        def chain(x):
            def step(z, x):
                with numpyro.plate("data", x.shape[0], dim=-1):
                    z = numpyro.sample("z", dist.Normal(z, 1.0))
                    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
                return z, None

            scan(step, jnp.zeros(x.shape[0]), jnp.moveaxis(x, 1, 0))

        guide = choose_guide(chain, np.zeros((4, 7), np.float32))
        assert guide.encoder is RNN
