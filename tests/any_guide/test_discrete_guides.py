"""Discrete latents under guides of any kind: what is enumerable exactly is the referee."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.special import logsumexp
from numpyro import handlers
from numpyro.infer import SVI, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.util import log_density

from numpyro_vae import Importance, Posterior, compare

KEY = jax.random.key(0)
QUIET = {"progress_bar": False}
X = np.random.default_rng(0).normal(0.0, 2.0, 12).astype(np.float32)
LOCS, PROBS = jnp.array([-2.0, 0.0, 2.0]), jnp.array([0.2, 0.5, 0.3])
LOGITS = jnp.log(PROBS) + dist.Normal(LOCS, 1.25**0.5).log_prob(X[:, None])  # of y given x
EVIDENCE = logsumexp(LOGITS, axis=-1)
MEANS = (LOCS + 4 * X[:, None]) / 5  # of z given y and x
MEAN = (jax.nn.softmax(LOGITS) * MEANS).sum(-1)


def clusters(x):
    with numpyro.plate("data", len(x)):
        y = numpyro.sample("y", dist.Categorical(PROBS))
        z = numpyro.sample("z", dist.Normal(LOCS[y], 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def marked(x):
    infer = {"y": {"enumerate": "parallel"}}
    handlers.infer_config(clusters, config_fn=lambda msg: infer.get(msg["name"], {}))(x)


def exact(x):
    logits = jnp.log(PROBS) + dist.Normal(LOCS, 1.25**0.5).log_prob(x[:, None])
    with numpyro.plate("data", len(x)):
        y = numpyro.sample("y", dist.Categorical(logits=logits))
        numpyro.sample("z", dist.Normal((LOCS[y] + 4 * x) / 5, 5**-0.5))


def wrong(x):
    with numpyro.plate("data", len(x)):
        y = numpyro.sample("y", dist.Categorical(logits=0.5 * x[:, None] * LOCS))
        numpyro.sample("z", dist.StudentT(9.0, 0.3 * LOCS[y] + 0.7 * x, 0.6))


def without_y(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0.8 * x, 0.6))


@pytest.mark.parametrize("model", [clusters, marked])
def test_the_exact_guide_has_the_evidence_as_its_weights(model):
    posterior = Posterior(exact, {}, model=model)
    weights = posterior.log_weights(KEY, X, 30)
    np.testing.assert_allclose(weights, np.tile(EVIDENCE, (30, 1)), atol=1e-5)


@pytest.mark.parametrize("guide", [wrong, without_y])
def test_weights_are_sums_of_numpyros_densities(guide):
    posterior = Posterior(guide, {}, model=clusters)
    draws = posterior.sample(KEY, X, 20)["z"]
    found = posterior.log_weights(KEY, X, 20)

    def one(fn, z, row, y):
        data = jnp.asarray(X)[row][None]
        return log_density(fn, (data,), {}, {"z": z[row][None], "y": y[None]})[0]

    def summed(fn):
        given = jax.vmap(lambda z, row, y: one(fn, z, row, y), (None, None, 0))
        given = jax.vmap(jax.vmap(given, (None, 0, None)), (0, None, None))
        return given(draws, jnp.arange(len(X)), jnp.arange(3))

    log_q = logsumexp(summed(guide), axis=-1) if guide is wrong else summed(guide)[..., 0]
    expected = logsumexp(summed(clusters), axis=-1) - log_q
    np.testing.assert_allclose(found, expected, atol=1e-4)


class TestWrong:
    @pytest.fixture(scope="class")
    @classmethod
    def posterior(cls):
        return Posterior(wrong, {}, model=clusters)

    @pytest.mark.slow
    def test_it_is_checked_and_repaired(self, posterior):
        report = posterior.check(KEY, X, **QUIET)
        found = report.dataset
        np.testing.assert_allclose(found["log_evidence"], EVIDENCE, atol=0.1)
        assert len(report.flagged)
        repair = posterior.repair(KEY, X, [0, 5], method="importance", num_samples=2000)
        assert not repair.remaining.size
        draws = repair.groups["posterior"]
        np.testing.assert_allclose(draws["z"].mean(0), MEAN[jnp.array([0, 5])], atol=0.06)
        shares = np.stack([(draws["y"] == value).mean(0) for value in range(3)], -1)
        np.testing.assert_allclose(shares, jax.nn.softmax(LOGITS)[jnp.array([0, 5])], atol=0.05)

    @pytest.mark.slow
    def test_probabilities_and_the_tree(self, posterior):
        found = posterior.probabilities(KEY, X, 20, num_particles=500)["y"]
        np.testing.assert_allclose(found, jax.nn.softmax(LOGITS), atol=0.02)
        tree = posterior.to_datatree(KEY, X, 20)
        assert tree.posterior["y"].dims == ("chain", "draw", "data")
        weights = posterior.log_weights(KEY, X, 20)
        np.testing.assert_allclose(tree.sample_stats["log_weights"][0], weights, atol=1e-4)


@pytest.mark.slow
def test_a_guide_that_leaves_them_out_trained_by_enumeration():
    def guide(x):
        slope = numpyro.param("slope", 0.5)
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(slope * x, scale))

    svi = SVI(marked, guide, optax.adam(3e-2), TraceEnum_ELBO())
    result = svi.run(KEY, 300, X, progress_bar=False)
    posterior = Posterior(guide, result, model=marked)
    found = posterior.check(KEY, X, Importance(2000), **QUIET).dataset
    many = SVI(marked, guide, optax.adam(3e-2), TraceEnum_ELBO(num_particles=2000))
    many.init(KEY, X)
    loss = float(many.evaluate(result.state, X))
    error = np.sqrt(2 * (found["elbo_mcse"].values ** 2).sum())
    np.testing.assert_allclose(found["elbo"].sum(), -loss, atol=4 * error)
    np.testing.assert_allclose(found["log_evidence"], EVIDENCE, atol=0.05)


@pytest.mark.slow
def test_guides_with_them_and_without_and_of_all_rows_are_compared():
    whole = AutoMultivariateNormal(handlers.block(marked, hide=["y"]))
    params = {"auto_loc": 0.8 * X, "auto_scale_tril": 0.6 * np.eye(len(X), dtype=np.float32)}
    posteriors = {
        "exact": Posterior(exact, {}, model=clusters),
        "without": Posterior(without_y, {}, model=clusters),
        "whole": Posterior(whole, params, model=clusters),
    }
    table = compare(posteriors, KEY, X).table
    assert table.index[0] == "exact"
    np.testing.assert_allclose(table["joint_elbo"]["exact"], EVIDENCE.mean(), atol=1e-4)
    same = table.loc[["without", "whole"]]
    difference = np.diff(same["joint_elbo"])[0]
    assert abs(difference) < 4 * np.hypot(*same["joint_mcse"])


def test_infinitely_many_values_cannot_be_summed_over():
    def model(x):
        with numpyro.plate("data", len(x)):
            k = numpyro.sample("k", dist.Poisson(2.0))
            numpyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("k", dist.Poisson(jnp.exp(0.1 * x)))

    with pytest.raises(ValueError, match=r"Site 'k'.*infinitely many values cannot.*: marginalize"):
        Posterior(guide, {}, model=model).check(KEY, X, **QUIET)


def test_nothing_is_left_to_approximate():
    def model(x):
        with numpyro.plate("data", len(x)):
            y = numpyro.sample("y", dist.Categorical(PROBS))
            numpyro.sample("x", dist.Normal(LOCS[y], 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Categorical(logits=x[:, None] * LOCS))

    posterior = Posterior(guide, {}, model=model)
    logits = jnp.log(PROBS) + dist.Normal(LOCS, 1.0).log_prob(X[:, None])
    report = posterior.check(KEY, X, "importance", **QUIET)
    np.testing.assert_allclose(report.dataset["elbo"], logsumexp(logits, -1), atol=1e-5)
    assert not report.flagged.size
    found = posterior.probabilities(KEY, X, 1, num_particles=1)["y"]
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=1e-5)
    assert posterior.sample(KEY, X, 5)["y"].shape == (5, 12)
