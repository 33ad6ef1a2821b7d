"""Plates within plates, plates across plates, and what the encoder says step by step or by site."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import train
from linear_gaussian import LINEAR, elbo, exact
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import (
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Importance,
    Posterior,
    fit,
)

NUM_GROUPS, NUM_ITEMS, NOISE = 64, 3, 0.7
RNG = np.random.default_rng(0)
# Of each group: its own latent, then those of its items, which vary around it.
PRIOR = np.ones((NUM_ITEMS + 1, NUM_ITEMS + 1)) + np.diag([0.0] + [1.0] * NUM_ITEMS)
X = RNG.multivariate_normal(np.zeros(NUM_ITEMS), PRIOR[1:, 1:] + NOISE**2 * np.eye(3), NUM_GROUPS)
X = X.astype(np.float32)
NESTED = exact(X, np.eye(NUM_ITEMS, NUM_ITEMS + 1, k=1), NOISE, prior=PRIOR)


def nested(x):
    with numpyro.plate("groups", len(x), dim=-2):
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        with numpyro.plate("items", x.shape[1], dim=-1):
            v = numpyro.sample("v", dist.Normal(u, 1.0))
            numpyro.sample("x", dist.Normal(v, NOISE), obs=x)


def nested_columns(x):
    """The same with a group in each column."""
    groups = numpyro.plate("groups", len(x), dim=-1)
    with groups:
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
    with numpyro.plate("items", x.shape[1], dim=-2), groups:
        v = numpyro.sample("v", dist.Normal(u, 1.0))
        numpyro.sample("x", dist.Normal(v, NOISE), obs=x.T)


@pytest.fixture(scope="module", params=[nested, nested_columns])
def full_rank(request):
    guide = AutoAmortizedMultivariateNormal(request.param, LINEAR, plate="groups")
    return train(guide, X, loss=Trace_ELBO)


@pytest.mark.slow
def test_both_levels_have_the_exact_posterior(full_rank):
    encoded = full_rank.encode(X)
    loc = np.concatenate([np.reshape(encoded[name].loc, (NUM_GROUPS, -1)) for name in "uv"], 1)
    assert np.abs((loc - NESTED.mean) / NESTED.sd).max() <= 0.1
    found = full_rank.check(jax.random.key(1), X, checks=(Importance(num_samples=500), "collapse"))
    assert np.abs(found.dataset["log_evidence"].values - NESTED.log_evidence).max() <= 0.02


def test_draws_of_both_levels_vary_together(full_rank):
    draws = full_rank.sample(jax.random.key(2), X, 4000)
    columns = full_rank.guide.model is nested_columns
    assert draws["u"].shape == (4000, NUM_GROUPS) if columns else (4000, NUM_GROUPS, 1)
    assert draws["v"].shape[1:] == ((NUM_ITEMS, NUM_GROUPS) if columns else X.shape)
    u, v = draws["u"].reshape(4000, -1), draws["v"]
    v = np.swapaxes(v, 1, 2) if columns else v
    packed = np.concatenate([u[:, :, None], v], axis=2)
    for row in (0, 40):
        np.testing.assert_allclose(np.cov(packed[:, row].T), NESTED.covariance, atol=0.04)


def test_mean_field_of_both_levels_in_minibatches():
    guide = AutoAmortizedNormal(nested, LINEAR, plate="groups")
    svi = SVI(nested, guide, optax.adam(optax.cosine_decay_schedule(1e-2, 800)), Trace_ELBO(8))
    options = {"batch_size": 32, "num_epochs": 400, "progress_bar": False}
    posterior = Posterior(guide, fit(svi, jax.random.key(0), X, **options))
    encoded = posterior.encode(X)
    sd = np.diag(np.linalg.inv(NESTED.covariance)) ** -0.5  # each as if it knew the others
    for name, part in {"u": slice(0, 1), "v": slice(1, 4)}.items():
        loc, scale = (values.reshape(NUM_GROUPS, -1) for values in encoded[name])
        assert np.abs((loc - NESTED.mean[:, part]) / NESTED.sd[part]).max() <= 0.1
        assert np.abs(scale / sd[part] - 1).max() <= 0.1


@pytest.mark.slow
def test_items_that_read_their_group_reach_the_evidence():
    guide = AutoAmortizedNormal(nested, LINEAR, plate="groups", dependencies={"v": ("u",)})
    posterior = train(guide, X, loss=Trace_ELBO)
    assert abs(elbo(posterior, X) - NESTED.log_evidence.sum()) <= 0.02 * NUM_GROUPS


NUM_USERS, NUM_FILMS = 20, 12
RATINGS = (
    RNG.normal(size=(NUM_USERS, 1))
    + RNG.normal(size=NUM_FILMS)
    + NOISE * RNG.normal(size=(NUM_USERS, NUM_FILMS))
).astype(np.float32)


def ratings(x):
    with numpyro.plate("users", x.shape[0], dim=-2):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("films", x.shape[1], dim=-1):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("users", x.shape[0], dim=-2), numpyro.plate("films", x.shape[1], dim=-1):
        numpyro.sample("x", dist.Normal(a + b, NOISE), obs=x)


@pytest.mark.slow
def test_two_plates_with_an_encoder_each():
    films = partial(AutoAmortizedNormal, encoder=LINEAR, plate="films", prefix="films")
    guide = AutoAmortizedNormal(ratings, LINEAR, plate="users", global_guide=films)
    posterior = train(guide, RATINGS, steps=1500)
    assert {"auto$params", "films$params"} <= set(posterior.params)
    loadings = np.concatenate(
        [np.kron(np.eye(NUM_USERS), np.ones((NUM_FILMS, 1))), np.tile(np.eye(NUM_FILMS), (20, 1))],
        axis=1,
    )
    expected = exact(RATINGS.reshape(1, -1), loadings, NOISE)
    sd = np.diag(np.linalg.inv(expected.covariance)) ** -0.5
    users = posterior.encode(RATINGS)["a"]
    median = guide.median(posterior.params, RATINGS)
    loc = np.concatenate([np.ravel(median["a"]), median["b"]])
    np.testing.assert_allclose(np.ravel(users.loc), loc[:NUM_USERS], atol=1e-5)
    assert np.abs((loc - expected.mean[0]) / expected.sd).max() <= 0.1
    draws = posterior.sample(jax.random.key(1), RATINGS, 4000)
    assert draws["a"].shape == (4000, NUM_USERS, 1)
    assert draws["b"].shape == (4000, NUM_FILMS)
    found = np.concatenate([draws["a"].std(0)[:, 0], draws["b"].std(0)])
    np.testing.assert_allclose(found, sd, rtol=0.2)
    assert abs((found / sd).mean() - 1) <= 0.03


class ByItem(nnx.Module):
    """Features of each item, of whatever number."""

    def __init__(self, example_inputs, *, rngs):
        self.linear = nnx.Linear(1, 4, rngs=rngs)

    def __call__(self, inputs):
        return self.linear(inputs[..., None])


def items(x):
    with numpyro.plate("groups", len(x), dim=-2), numpyro.plate("items", x.shape[1], dim=-1):
        v = numpyro.sample("v", dist.Normal(0.0, 1.0))
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(v + w.sum(-1), NOISE), obs=x)


@pytest.mark.slow
def test_features_by_step_serve_any_number_of_steps():
    """A latent and a vector for each item: the family is one over the values of a step."""
    guide = AutoAmortizedMultivariateNormal(items, ByItem, plate="groups")
    posterior = train(guide, X, loss=Trace_ELBO)
    expected = exact(X.reshape(-1, 1), np.ones((1, 3)), NOISE).log_evidence.sum()
    assert abs(elbo(posterior, X) - expected) <= 0.02 * NUM_GROUPS
    more = np.concatenate([X, X[:, :1]], axis=1)
    for data in (X, more):
        encoded = posterior.encode(data)
        assert encoded["v"].loc.shape == data.shape
        assert encoded["w"].loc.shape == (*data.shape, 2)
        np.testing.assert_allclose(encoded["v"].loc, data / (3 + NOISE**2), atol=0.05)
        np.testing.assert_allclose(encoded["w"].loc[..., 1], data / (3 + NOISE**2), atol=0.05)


class BySite(nnx.Module):
    """Features of their own for each site."""

    def __init__(self, example_inputs, *, rngs):
        self.linear = nnx.Linear(1, 4, rngs=rngs)
        self.other = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, inputs):
        return {"a": self.linear(inputs["x"][:, None]), "b": self.other(inputs["y"])}


@pytest.mark.slow
def test_features_by_site_of_a_multivariate_family_are_blocks_of_their_own():
    def model(x, y):
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(a, NOISE), obs=x)
            total = jnp.broadcast_to(b.sum(-1, keepdims=True), b.shape)
            numpyro.sample("y", dist.Normal(total, NOISE).to_event(1), obs=y)

    data = (X[:, 0], X[:, 1:])
    guide = AutoAmortizedMultivariateNormal(model, BySite)
    posterior = train(guide, *data, loss=Trace_ELBO)
    first = exact(X[:, :1], np.ones((1, 1)), NOISE).log_evidence
    second = exact(X[:, 1:], np.ones((2, 2)), NOISE).log_evidence
    assert abs(elbo(posterior, *data) - first.sum() - second.sum()) <= 0.02 * NUM_GROUPS
    encoded, moved = posterior.encode(data), posterior.encode((data[0], data[1] + 1))
    np.testing.assert_array_equal(moved["a"].loc, encoded["a"].loc)
    assert np.abs(moved["b"].loc - encoded["b"].loc).min() > 0.1
    draws = posterior.sample(jax.random.key(1), data, 4000)
    correlation = [np.corrcoef(draws["b"][:, row].T)[0, 1] for row in range(NUM_GROUPS)]
    apart = [np.corrcoef(draws["a"][:, row], draws["b"][:, row, 0])[0, 1] for row in range(8)]
    assert np.mean(correlation) < -0.5
    assert np.abs(apart).max() < 0.1


def test_plates_that_could_both_be_local_must_be_named():
    with pytest.raises(ValueError, match=r"Several plates hold latent sites.*'groups'.*'items'"):
        numpyro.handlers.seed(AutoAmortizedNormal(nested, LINEAR), 0)(jnp.asarray(X))
