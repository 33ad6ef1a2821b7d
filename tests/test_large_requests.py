"""Requests that do not fit the device are cut along draws; those that fit no memory are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi
from models import hierarchical_model

from numpyro_vae import Posterior, SetEncoder, fit
from numpyro_vae.inference import compiled, encoded, memory, runner

KEY = jax.random.key(0)
X = np.linspace(-1, 1, 6, dtype=np.float32)
NUM_SAMPLES = 1001  # which no number of parts divides


def model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 1e-4), obs=x)


def fitted(model, x=X):
    svi = make_svi(model)
    return Posterior(svi.guide, fit(svi, KEY, x, num_epochs=2, progress_bar=False))


@pytest.fixture(scope="module")
def posterior():
    return fitted(model)


@pytest.fixture
def cut(monkeypatch):
    """Draws of a row no longer fit the device."""
    monkeypatch.setattr(runner, "DRAWS", 400)


@pytest.mark.slow
def test_draws_in_parts_are_draws_of_the_posterior(posterior, cut):
    loc, scale = posterior.encode(X)["z"]
    z = posterior.sample(KEY, X, 4001)["z"]
    np.testing.assert_allclose(z.mean(0), loc, atol=4 * scale.max() / np.sqrt(4001))
    np.testing.assert_allclose(z.std(0), scale, rtol=0.06)
    assert len(np.unique(z)) > 0.99 * z.size  # no part is another one again


@pytest.mark.slow
def test_what_is_computed_of_draws_in_parts_is_of_the_same_draws(posterior, cut):
    draws = posterior.sample(KEY, X, NUM_SAMPLES)
    assert draws["z"].shape == (NUM_SAMPLES, 6)
    assert draws["mu"].shape == (NUM_SAMPLES,)
    np.testing.assert_allclose(posterior.predict(KEY, X, NUM_SAMPLES)["x"], draws["z"], atol=1e-3)
    loc, scale = posterior.encode(X)["z"]
    log_p = dist.Normal(draws["mu"][:, None], 1.0).log_prob(draws["z"])
    log_p += dist.Normal(draws["z"], 1e-4).log_prob(X)
    log_q = dist.Normal(loc, scale).log_prob(draws["z"])
    weights = posterior.log_weights(KEY, X, NUM_SAMPLES)
    np.testing.assert_allclose(weights, log_p - log_q, rtol=1e-3)
    tree = posterior.to_datatree(KEY, X, NUM_SAMPLES, num_particles=2)
    np.testing.assert_allclose(tree.posterior["z"][0], draws["z"], atol=1e-5)
    np.testing.assert_allclose(tree.sample_stats["log_weights"][0], weights, rtol=1e-3)
    np.testing.assert_allclose(tree.posterior_predictive["x"][0], draws["z"], atol=1e-3)
    assert tree.log_likelihood["x"].shape == (1, NUM_SAMPLES, 6)


@pytest.mark.slow
def test_rows_do_not_show_in_draws_in_parts(posterior, cut):
    np.testing.assert_array_equal(
        posterior.sample(KEY, X[:2], NUM_SAMPLES)["z"],
        posterior.sample(KEY, X, NUM_SAMPLES)["z"][:, :2],
    )


def test_parts_are_of_one_size_and_compiled_once(posterior, cut):
    posterior.guide.compiled.clear()
    posterior.sample(KEY, X, NUM_SAMPLES)
    before = dict(posterior.guide.compiled)
    posterior.sample(KEY, X, NUM_SAMPLES)
    assert posterior.guide.compiled == before
    assert {fn._fn._cache_size() for fn in before.values()} == {1}


@pytest.mark.slow
def test_a_check_adds_up_draws_in_parts(posterior, monkeypatch):
    whole = posterior.check(KEY, X, "importance", progress_bar=False).dataset
    monkeypatch.setattr(runner, "DRAWS", 900)
    parts = posterior.check(KEY, X, "importance", progress_bar=False).dataset
    error = np.hypot(whole["elbo_mcse"], parts["elbo_mcse"])
    assert (np.abs(whole["elbo"] - parts["elbo"]) / error).max() < 4
    assert (whole["elbo"] != parts["elbo"]).all()


def test_repaired_draws_in_parts(posterior, cut):
    found = posterior.repair(KEY, X, [1, 4], method="importance", num_samples=NUM_SAMPLES)
    z = found.groups["posterior"]["z"]
    assert z.shape == (NUM_SAMPLES, 2)
    np.testing.assert_allclose(z.mean(0), X[[1, 4]], atol=1e-2)
    np.testing.assert_allclose(found.groups["posterior_predictive"]["x"], z, atol=1e-3)


@pytest.mark.slow
def test_data_taken_whole_are_cut_along_draws(cut):
    group = np.repeat(np.arange(3), [1, 2, 3])

    def grouped(group, y):
        with numpyro.plate("groups", 3):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("elements", len(y)):
            numpyro.sample("y", dist.Normal(z[group], 1e-4), obs=y)

    svi = make_svi(grouped, SetEncoder, segments={"elements": lambda group, y: group})
    result = fit(svi, KEY, (group, X), batch_axes=None, num_epochs=2, progress_bar=False)
    posterior = Posterior(svi.guide, result)
    z = posterior.sample(KEY, (group, X), NUM_SAMPLES)["z"]
    y = posterior.predict(KEY, (group, X), NUM_SAMPLES)["y"]
    np.testing.assert_allclose(y, z[:, group], atol=1e-3)


def test_chunks_of_draws_do_not_show(posterior, monkeypatch):
    weights = posterior.log_weights(KEY, X, 101)
    posterior.guide.compiled.clear()
    monkeypatch.setattr(encoded, "PAIRS", 60)  # ten draws of the rows, which does not divide 101
    np.testing.assert_allclose(posterior.log_weights(KEY, X, 101), weights, rtol=1e-4)
    posterior.guide.compiled.clear()


def test_chunks_are_smaller_where_a_density_makes_large_arrays_of_a_row(monkeypatch):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            series = jnp.exp(z[:, None] - jnp.arange(1000.0))
            numpyro.sample("x", dist.Normal(jnp.sort(series).sum(-1), 1.0), obs=x)

    posterior, chunks, lax_map = fitted(model), [], jax.lax.map

    def watched(fn, draws, *, batch_size):
        chunks.append(batch_size)
        return lax_map(fn, draws, batch_size=batch_size)

    whole = posterior.log_weights(KEY, X, 101)
    posterior.guide.compiled.clear()
    monkeypatch.setattr(encoded, "AT_ONCE", 2**18)  # ten draws of six rows of 1,000 numbers
    monkeypatch.setattr(jax.lax, "map", watched)
    np.testing.assert_allclose(posterior.log_weights(KEY, X, 101), whole, rtol=1e-4)
    assert chunks == [10]


# -- what fits no memory --------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["sample", "predict", "log_weights", "to_datatree", "repair"])
def test_more_than_there_is_memory_is_refused_before_anything_is_computed(monkeypatch, ask):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    posterior = fitted(model)
    monkeypatch.setattr(memory, "available_memory", lambda: 2**30)
    ran, call = [], compiled.Compiled.__call__

    def watched(self, *args):
        found = call(self, *args)
        ran.extend(leaf.size for leaf in jax.tree.leaves(found))
        return found

    monkeypatch.setattr(compiled.Compiled, "__call__", watched)
    message = r"takes [\d,.]+ GiB, and 1\.0 GiB of memory are available.*num_samples=.*in parts"
    arguments = {"repair": {"rows": range(6)}}.get(ask, {})
    with pytest.raises(MemoryError, match=message):
        getattr(posterior, ask)(KEY, X, num_samples=10**9, **arguments)
    assert sum(ran) <= len(X)  # the observed values, at most


def test_draws_of_globals_that_fit_no_memory_are_refused(monkeypatch):
    posterior = fitted(hierarchical_model)
    monkeypatch.setattr(memory, "available_memory", lambda: 2**30)
    with pytest.raises(MemoryError, match=r"takes 3\.7 GiB"):
        posterior.sample(KEY, X, 10**9, var_names=["mu"])


def test_memory_is_that_of_the_system(monkeypatch, tmp_path):
    assert 2**20 < memory.available_memory() < 2**50
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert 2**20 < memory.available_memory() < 2**50
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory.available_memory() is None
    memory.require_memory(2**60)
