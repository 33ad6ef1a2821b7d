"""Models of y given x, and of both: what the encoder is told decides what it can know."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi, train
from linear_gaussian import LINEAR, elbo, exact
from numpyro.infer import Trace_ELBO

from numpyro_vae import AutoAmortizedMultivariateNormal, Fusion, Posterior, fit

NUM_DATA, NOISE = 128, 0.6
RNG = np.random.default_rng(0)
W, B = RNG.normal(size=(3, 2)), RNG.normal(size=(3, 2))
X = RNG.normal(size=(NUM_DATA, 2)).astype(np.float32)
Y = RNG.normal(size=(NUM_DATA, 2)) @ W.T + X @ B.T + NOISE * RNG.normal(size=(NUM_DATA, 3))
Y = Y.astype(np.float32)

A = np.array([[1.0, 0.5], [-0.5, 1.0]])
Z = RNG.normal(size=(NUM_DATA, 2))
LEFT = (Z @ A.T + NOISE * RNG.normal(size=(NUM_DATA, 2))).astype(np.float32)
RIGHT = (Z @ W.T + NOISE * RNG.normal(size=(NUM_DATA, 3))).astype(np.float32)

FUSION = partial(
    Fusion, encoders={"x": LINEAR, "y": LINEAR}, hidden_sizes=(8,), activation=lambda hidden: hidden
)


def conditional(x, y):
    """x is given, not modelled."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(z @ W.T + x @ B.T, NOISE).to_event(1), obs=y)


def joint(x, y):
    """Two views of the same latent."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ A.T, NOISE).to_event(1), obs=x)
        numpyro.sample("y", dist.Normal(z @ W.T, NOISE).to_event(1), obs=y)


def first_view(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ A.T, NOISE).to_event(1), obs=x)


GIVEN_X = exact(Y - X @ B.T, W, NOISE)
BOTH = exact(np.concatenate([LEFT, RIGHT], axis=1), np.concatenate([A, W]), NOISE)
CASES = {
    "arguments": (conditional, LINEAR, lambda x, y: {"x": x, "y": y}, (X, Y), GIVEN_X),
    "arguments, fused": (conditional, FUSION, lambda x, y: {"x": x, "y": y}, (X, Y), GIVEN_X),
    "two observed sites": (joint, LINEAR, None, (LEFT, RIGHT), BOTH),
    "two observed sites, fused": (joint, FUSION, None, (LEFT, RIGHT), BOTH),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_posterior_is_exact(case):
    model, encoder, inputs, data, expected = CASES[case]
    guide = AutoAmortizedMultivariateNormal(model, encoder, inputs=inputs)
    posterior = train(guide, *data, loss=Trace_ELBO)
    loc, scale = posterior.encode(data)["z"]
    assert np.abs((loc - expected.mean) / expected.sd).max() <= 0.1
    assert np.abs(scale / expected.sd - 1).max() <= 0.05
    assert abs(elbo(posterior, *data) - expected.log_evidence.sum()) <= 0.02 * NUM_DATA


def test_what_the_encoder_is_not_told_it_cannot_know():
    """By default it reads what is observed: x is not, and matters."""
    guide = AutoAmortizedMultivariateNormal(conditional, LINEAR)
    posterior = train(guide, X, Y, loss=Trace_ELBO)
    assert elbo(posterior, X, Y) < GIVEN_X.log_evidence.sum() - 0.2 * NUM_DATA


def test_one_view_predicts_the_other():
    """A second guide, of the model of one view, and the joint model's prediction from it."""
    posterior = train(AutoAmortizedMultivariateNormal(first_view, LINEAR), LEFT, loss=Trace_ELBO)
    draws = posterior.sample(jax.random.key(1), LEFT, 4000)["z"]
    noise = NOISE * np.random.default_rng(2).normal(size=(4000, NUM_DATA, 3))
    found = draws @ W.T + noise
    alone = exact(LEFT, A, NOISE)
    covariance = W @ alone.covariance @ W.T + NOISE**2 * np.eye(3)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((found.mean(0) - alone.mean @ W.T) / sd).max() <= 0.12
    spread = np.array([np.cov(found[:, row].T) for row in range(NUM_DATA)]).mean(0)
    np.testing.assert_allclose(spread, covariance, atol=0.05 * sd.max() ** 2)
    covered = np.abs((RIGHT - found.mean(0)) / found.std(0)) < 1.645
    assert abs(covered.mean() - 0.9) <= 0.05


def test_predictions_follow_what_is_given():
    guide = AutoAmortizedMultivariateNormal(
        conditional, LINEAR, inputs=lambda x, y: {"x": x, "y": y}
    )
    posterior = train(guide, X, Y, steps=400, loss=Trace_ELBO)
    drawn = posterior.predict(jax.random.key(1), (X, Y), 1000)["y"]
    spread = np.sqrt(np.diag(W @ GIVEN_X.covariance @ W.T) + NOISE**2)
    expected = GIVEN_X.mean @ W.T + X @ B.T
    assert np.sqrt((((drawn.mean(0) - expected) / spread) ** 2).mean()) <= 0.1
    np.testing.assert_allclose(drawn.std(0).mean(0), spread, rtol=0.05)


@pytest.mark.slow
def test_without_observations_latents_are_of_their_prior():
    """y given x alone is B x + W z with z of its prior; what needs a posterior is refused."""

    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            loc = numpyro.deterministic("loc", z @ W.T + x @ B.T + b)
            numpyro.sample("y", dist.Normal(loc, NOISE).to_event(1), obs=y)

    svi = make_svi(model, loss=Trace_ELBO())
    data = {"x": X, "y": Y}
    result = fit(svi, jax.random.key(0), data, num_epochs=1, progress_bar=False)
    posterior, given = Posterior(svi.guide, result), {"x": X[:3]}
    found = posterior.predict(jax.random.key(1), given, 4000)
    loc = result.params["b_auto_loc"] + X[:3] @ B.T
    np.testing.assert_allclose(found["y"].mean(0), loc, atol=0.15)
    variance = (W**2).sum(1) + NOISE**2 + result.params["b_auto_scale"] ** 2
    np.testing.assert_allclose(found["y"].var(0), np.tile(variance, (3, 1)), rtol=0.12)
    np.testing.assert_allclose((found["y"] - found["loc"]).std(0), NOISE, rtol=0.05)
    tree = posterior.to_datatree(jax.random.key(1), given, 2000)
    assert set(tree.children) == {"posterior", "posterior_predictive", "constant_data"}
    np.testing.assert_allclose(tree["posterior"]["z"].std(), 1.0, rtol=0.03)
    with pytest.raises(ValueError, match=r"Nothing is observed in plate 'data'.*predict"):
        posterior.log_weights(jax.random.key(1), given, 10)
