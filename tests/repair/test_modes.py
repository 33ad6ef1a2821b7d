"""Chains that stay in modes of their own: weights say how much each mode is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi

from numpyro_vae import Posterior
from numpyro_vae.repair import methods

KEY, NOISE = jax.random.key(0), 0.1
X = np.array([[4.0, 3.0], [3.5, 4.5], [5.0, 3.0]], np.float32)


def squares(x):
    """Four modes of equal weight, as signs say nothing, and between them nothing."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(jnp.square(z), NOISE).to_event(1), obs=x)


@pytest.fixture(scope="module")
def posterior():
    svi = make_svi(squares)
    return Posterior(svi.guide, svi.get_params(svi.init(KEY, X)))


def test_each_mode_has_its_weight(posterior):
    found = posterior.repair(KEY, X, np.arange(3), method="nuts", num_samples=1000)
    assert found.dataset["passed"].all()
    assert (found.dataset["rhat"] > methods.MAX_RHAT).all()
    assert (found.dataset["khat"] < 0.7).all()
    z = found.groups["posterior"]["z"]
    error = np.sqrt(0.25 * 0.75 / methods.MIN_ESS)
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        shares = (np.sign(z) == signs).all(-1).mean(0)
        np.testing.assert_allclose(shares, 0.25, atol=4 * error)
    exact = np.sqrt(X)  # to half of the noise's variance in X, and the pull of the prior
    np.testing.assert_allclose(np.abs(z).mean(0), exact, atol=0.02)
    np.testing.assert_allclose(np.abs(z).std(0), NOISE / (2 * exact), rtol=0.2)


def test_rows_stay_what_chains_have_made_of_them_where_weights_are_no_better(
    posterior, monkeypatch
):
    monkeypatch.setattr(methods, "MIN_ESS", 1e9)
    found = posterior.repair(KEY, X[:2], np.arange(2), method="nuts", num_samples=100)
    assert not found.dataset["passed"].any()
    assert found.dataset["khat"].isnull().all()
