"""Guides that are not ours, in minibatches."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_vae import Posterior, fit

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 1.1, 60).astype(np.float32)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def selecting(x, size=20):
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])


def of_a_batch(x):
    loc = numpyro.param("loc", jnp.zeros(len(x)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, 0.5))


def by_slope(x):
    slope = numpyro.param("slope", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, 5**-0.5))


def constant(x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, 1.0))


def train(model, guide, **options):
    svi = SVI(model, guide, optax.adam(5e-2), Trace_ELBO())
    return fit(svi, KEY, X, progress_bar=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, lambda model: of_a_batch])
def test_parameters_of_a_batch_are_not_those_of_each_batch_in_turn(make):
    with pytest.raises(ValueError, match=r"of the 20 rows of a batch.*batch_axes=None"):
        train(model, make(model), batch_size=20, num_epochs=1)
    assert np.isfinite(train(model, make(model), batch_axes=None, num_epochs=2).losses).all()


def test_guides_with_parameters_of_each_row_learn_them_from_data_taken_whole():
    loc = train(model, AutoNormal(model), batch_axes=None, num_epochs=200).params["z_auto_loc"]
    assert np.corrcoef(loc, X)[0, 1] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoNormal, lambda model: of_a_batch])
def test_parameters_of_all_rows_at_once_are_each_those_of_one_row(make):
    """By default as well, where there are fewer rows than in a batch."""
    guide = make(model)
    result = train(model, guide, num_epochs=300)
    loc = Posterior(guide, result, model=model).encode(X)["z"].loc
    np.testing.assert_allclose(loc, 0.8 * X, atol=0.35)


@pytest.mark.parametrize("filtered", ["error", "default"])
def test_rows_that_the_model_selects_have_parameters_of_their_own(filtered):
    """Whether or not NumPyro's warning of a plate that is short of rows ends a run."""
    with warnings.catch_warnings():
        warnings.simplefilter(filtered)
        guide = AutoNormal(selecting)
        result = train(selecting, guide, batch_size=15, num_epochs=400)
    loc = Posterior(guide, result).encode(X)["z"].loc
    np.testing.assert_allclose(loc, 0.8 * X, atol=0.35)
    assert np.corrcoef(loc, X)[0, 1] > 0.98


def test_what_looks_at_the_data_or_is_the_same_for_all_is_trained():
    result = train(model, by_slope, batch_size=20, num_epochs=150)
    np.testing.assert_allclose(result.params["slope"], 0.8, atol=0.1)
    assert np.isfinite(train(model, constant, batch_size=20, num_epochs=2).losses).all()
