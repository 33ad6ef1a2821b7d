"""Deterministic sites are functions of the posterior's draws and the data, wherever they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi
from numpyro.distributions import constraints
from numpyro.infer import Predictive, Trace_ELBO

from numpyro_vae import Posterior, fit

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 1.1, 7).astype(np.float32)
ROWS_AT = {"transposed": 1, "column": 0}  # the axis of the rows in a value


def model(x):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    numpyro.sample("flat", dist.ImproperUniform(constraints.real, (), ()))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        x_ = numpyro.sample("x", dist.Normal(z + b, 0.5), obs=x)
        numpyro.deterministic("residual", x_ - z)
        numpyro.deterministic("constant", 2 * b)
        numpyro.deterministic("transposed", jnp.stack([z, 2 * z]))
        numpyro.deterministic("column", jnp.stack([z, 2 * z], -1))
        numpyro.deterministic("pairs", z[:, None] - z)
    numpyro.deterministic("total", z.sum())
    numpyro.deterministic("of the data", x.mean() + b)
    with numpyro.plate("groups", 3):
        numpyro.deterministic("first", z[:3] + b)


@pytest.fixture(scope="module")
def posterior():
    svi = make_svi(model, loss=Trace_ELBO())
    return Posterior(svi.guide, fit(svi, KEY, X, num_epochs=1, progress_bar=False))


@pytest.mark.slow
def test_a_tree_has_what_predictive_computes(posterior):
    tree = posterior.to_datatree(KEY, X, 20)
    drawn = {name: tree["posterior"][name].values[0] for name in ("b", "flat", "z")}
    names = list(posterior.guide.sites.deterministic)
    predictive = Predictive(model, drawn, params=posterior.params, return_sites=names)
    for name, expected in predictive(KEY, X).items():
        if name in ROWS_AT:
            expected = np.moveaxis(expected, 1 + ROWS_AT[name], 1)
        np.testing.assert_allclose(tree["posterior"][name].values[0], expected, rtol=1e-5)
    assert tree["posterior"]["pairs"].dims == ("chain", "draw", "data", "pairs_dim_0")
    assert tree["posterior"]["first"].dims == ("chain", "draw", "groups")
    assert tree["posterior"]["total"].dims == ("chain", "draw")


def test_predictions_have_those_with_a_value_for_each_row(posterior):
    found = posterior.predict(KEY, X, 5)
    assert {name: x.shape[1:] for name, x in found.items()} == {
        "x": (7,),
        "residual": (7,),
        "transposed": (7, 2),
        "column": (7, 2),
    }
    draws = posterior.sample(KEY, X, 5)
    np.testing.assert_allclose(found["residual"], X - draws["z"], atol=1e-6)
    assert np.abs(found["x"] - X).min() > 0


@pytest.mark.slow
def test_events_that_broadcast_are_served_and_predicted_one_by_one():
    """Each of three values of a row has a density, and a prediction, of its own."""

    def spread(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x)

    x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    svi = make_svi(spread, loss=Trace_ELBO())
    posterior = Posterior(svi.guide, fit(svi, KEY, x, num_epochs=1, progress_bar=False))
    found, draws = posterior.predict(KEY, x, 4000)["x"], posterior.sample(KEY, x, 4000)["z"]
    noise = (found - draws[..., None])[:, 0]
    np.testing.assert_allclose(noise.std(0), 0.5, rtol=0.05)
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.06
    log_p = dist.Normal(draws[..., None], 0.5).log_prob(x).sum(-1) + dist.Normal().log_prob(draws)
    encoding = posterior.encode(x)["z"]
    log_q = dist.Normal(encoding.loc, encoding.scale).log_prob(draws)
    np.testing.assert_allclose(posterior.log_weights(KEY, x, 4000), log_p - log_q, atol=2e-4)


@pytest.mark.slow
def test_a_site_that_mixes_the_rows_is_of_all_of_them():
    """More rows than a batch has: each less the mean of all, and their running sum."""

    def mixing(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.deterministic("own", 2 * z)
            numpyro.deterministic("centered", z - z.mean())
            numpyro.deterministic("sum", jnp.cumsum(z))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = np.random.default_rng(0).normal(size=600).astype(np.float32)
    svi = make_svi(mixing, loss=Trace_ELBO())
    posterior = Posterior(svi.guide, fit(svi, KEY, x, num_epochs=1, progress_bar=False))
    group = posterior.to_datatree(KEY, x, 5, groups="posterior")["posterior"]
    z = group["z"].values[0]
    np.testing.assert_allclose(group["own"].values[0], 2 * z, rtol=1e-6)
    np.testing.assert_allclose(group["centered"].values[0], z - z.mean(1)[:, None], atol=1e-5)
    np.testing.assert_allclose(group["sum"].values[0], np.cumsum(z, 1), atol=1e-3)
    assert group["centered"].dims == ("chain", "draw", "data")
    assert set(posterior.predict(KEY, x, 2)) == {"x", "own"}


def improper(x):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        numpyro.sample("x", dist.Normal(z + b, 0.5), obs=x)
    numpyro.deterministic("twice", 2 * b)


def test_a_value_that_reads_no_local_latent_needs_no_draw_from_their_prior():
    svi = make_svi(improper, loss=Trace_ELBO())
    posterior = Posterior(svi.guide, fit(svi, KEY, X, num_epochs=1, progress_bar=False))
    tree = posterior.to_datatree(KEY, X, 20, groups=["posterior"])
    np.testing.assert_allclose(tree["posterior"]["twice"], 2 * tree["posterior"]["b"])
