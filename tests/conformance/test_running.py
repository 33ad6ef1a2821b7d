"""Runs of SVI: stable, continued, compiled, over many data sets; pickles, ArviZ, x64."""

import pickle

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from common import GUIDES, SMALL, X, hierarchical, run
from numpyro import optim
from numpyro.infer import (
    SVI,
    Trace_ELBO,
)
from numpyro.infer.svi import SVIRunResult

from numpyro_vae import AutoAmortizedFlow, AutoAmortizedNormal

by_guide = pytest.mark.parametrize("auto", GUIDES, ids=lambda auto: auto.__name__[13:])
KEY = jax.random.key(1)


def poisoned(x):
    """Its likelihood is NaN where x is above 3."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        scale = jnp.where(x > 3.0, jnp.nan, 1.0)
        numpyro.sample("x", dist.Normal(z, scale, validate_args=False), obs=x)


def test_a_stable_update_keeps_parameters():
    guide = AutoAmortizedNormal(poisoned, SMALL)
    svi = SVI(poisoned, guide, optax.adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), X)
    bad, loss = svi.stable_update(state, X.at[3].set(9.0))
    assert np.isnan(loss)
    jax.tree.map(np.testing.assert_array_equal, svi.get_params(bad), svi.get_params(state))
    good, loss = svi.stable_update(bad, X)
    assert np.isfinite(loss)
    kernels = [
        svi.get_params(s)["auto$params"]["encoder"]["layers"][0]["kernel"] for s in (bad, good)
    ]
    assert (kernels[0] != kernels[1]).any()


def test_initial_parameters():
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    trained = run(hierarchical, guide, X)[1].params
    given = {"auto$params": trained["auto$params"], "mu_auto_loc": jnp.array(2.5)}
    svi = SVI(hierarchical, guide, optax.adam(1e-2), Trace_ELBO())
    found = svi.get_params(svi.init(jax.random.key(3), X, init_params=given))
    assert set(found) == {"auto$params", "mu_auto_loc", "mu_auto_scale"}
    jax.tree.map(np.testing.assert_array_equal, found["auto$params"], trained["auto$params"])
    assert found["mu_auto_loc"] == 2.5
    frozen = SVI(hierarchical, guide, optax.sgd(0.0), Trace_ELBO())
    result = frozen.run(jax.random.key(3), 1, X, init_params=given, progress_bar=False)
    jax.tree.map(np.testing.assert_array_equal, result.params["auto$params"], given["auto$params"])


@pytest.mark.slow
def test_a_run_goes_on_from_a_state_with_and_without_a_progress_bar():
    def new():
        guide = AutoAmortizedNormal(hierarchical, SMALL)
        return SVI(hierarchical, guide, optim.Adam(1e-2), Trace_ELBO())

    def two_runs(progress_bar):
        svi, options = new(), {"progress_bar": progress_bar}
        first = svi.run(jax.random.key(0), 2, X, **options)
        if progress_bar:
            return first.losses
        second = svi.run(jax.random.key(9), 2, X, init_state=first.state, **options)
        return np.concatenate([first.losses, second.losses])

    losses = two_runs(progress_bar=False)
    np.testing.assert_allclose(two_runs(progress_bar=True), losses[:2], rtol=1e-5)
    svi = new()
    state, update = svi.init(jax.random.key(0), X), jax.jit(svi.update)
    for expected in losses:
        np.testing.assert_allclose(svi.evaluate(state, X), expected, rtol=1e-5)
        state, loss = update(state, X)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.slow
def test_many_data_sets_and_seeds_at_once():
    """`vmap` over whole trainings: each is what it is alone."""
    data = jnp.stack([X, X + 1, -2 * X])

    def train(rng_key, x):
        guide = AutoAmortizedNormal(hierarchical, SMALL)
        svi = SVI(hierarchical, guide, optax.adam(1e-2), Trace_ELBO())
        return svi.run(rng_key, 3, x, progress_bar=False).losses

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(train)(keys, data)
    assert together.shape == (3, 3)
    np.testing.assert_allclose(together[1], train(keys[1], data[1]), rtol=1e-4)


@pytest.mark.slow
@by_guide
def test_pickled_guides_and_arviz(auto):
    guide = auto(hierarchical, SMALL)
    svi = SVI(hierarchical, guide, optax.adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), X)
    result = SVIRunResult(svi.get_params(state), state, jnp.zeros(1))
    again = pickle.loads(pickle.dumps(guide))
    draws, expected = (g.sample_posterior(KEY, result.params, X) for g in (again, guide))
    jax.tree.map(np.testing.assert_array_equal, draws, expected)
    tree = az.from_numpyro_svi(svi, svi_result=result, model_args=(X,), num_samples=5)
    assert tree.posterior["z"].shape == (5, 12)
    assert tree.posterior["mu"].shape == (5,)
    assert tree.observed_data["x"].shape == (12,)


@pytest.mark.slow
@pytest.mark.parametrize("auto", [AutoAmortizedNormal, AutoAmortizedFlow])
def test_the_loss_in_double_precision(auto):
    with jax.enable_x64(True):
        x = np.linspace(-2, 2, 12)
        wide = auto(hierarchical, SMALL)
        svi = SVI(hierarchical, wide, optax.adam(1e-2), Trace_ELBO())
        loss = svi.evaluate(svi.init(jax.random.key(0), x), x)
        assert loss.dtype == np.float64
        assert np.isfinite(loss)


def test_an_ensemble_is_one_guide_with_several_sets_of_parameters():
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    svi = SVI(hierarchical, guide, optax.adam(1e-2), Trace_ELBO())
    svi.init(jax.random.key(0), X)  # sets up NumPyro's guide of the global site, outside vmap
    members = jax.vmap(lambda key: svi.get_params(svi.init(key, X)))(jax.random.split(KEY, 3))
    draws = jax.vmap(lambda params: guide.sample_posterior(KEY, params, X)["z"])(members)
    one = jax.tree.map(lambda leaf: leaf[1], members)
    expected = guide.sample_posterior(KEY, one, X)["z"]
    np.testing.assert_allclose(draws[1], expected, rtol=1e-4, atol=1e-5)
    assert (draws[0] != draws[1]).all()
