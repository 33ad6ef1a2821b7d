"""Data in any units, and rows in any order, train alike."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, TraceMeanField_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit

Z = np.random.default_rng(0).normal(size=200)
X = Z + 0.5 * np.random.default_rng(1).normal(size=200)


def train(x, unit=1.0, shift=0.0, optimizer=optax.adam, num_epochs=60):
    """Fit latents of unit scale to data in other units; return the posterior and the losses."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(shift + unit * z, 0.5 * unit), obs=x)

    guide = AutoAmortizedNormal(model, partial(MLP, hidden_sizes=(16,)))
    svi = SVI(model, guide, optimizer(1e-2), TraceMeanField_ELBO())
    options = {"batch_size": 50, "num_epochs": num_epochs, "progress_bar": False}
    result = fit(svi, jax.random.key(0), x, **options)
    return Posterior(guide, result), result.losses


@pytest.fixture(scope="module")
def plain():
    return train(X.astype(np.float32))


def test_data_of_1e8_train_as_data_of_1(plain):
    _, losses = train((1e8 * X).astype(np.float32), unit=1e8)
    np.testing.assert_allclose(losses - np.log(1e8), plain[1], atol=0.02)


def test_bytes_train():
    pixels = np.clip(128 + 40 * X, 0, 255).astype(np.uint8)
    loc = train(pixels, unit=40.0, shift=128.0)[0].encode(pixels)["z"].loc
    exact = (pixels - 128.0) / 40 * 0.8
    assert np.abs(loc - exact).mean() < 0.1


def test_rows_in_the_order_of_their_values_train(plain):
    _, losses = train(np.sort(X).astype(np.float32))
    assert abs(losses[-20:].mean() - plain[1][-20:].mean()) < 0.05


def test_weights_may_decay(plain):
    decaying = partial(optax.adamw, weight_decay=0.1)
    _, losses = train(X.astype(np.float32) + 1000, shift=1000.0, optimizer=decaying)
    assert abs(losses[-20:].mean() - plain[1][-20:].mean()) < 0.1
