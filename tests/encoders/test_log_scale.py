"""Counts are read on a log scale, so that a datum of large counts is not far from the others."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

from numpyro_vae import Masked, ResidualMLP
from numpyro_vae.choices import choose_guide

RNG = np.random.default_rng(0)


def features(inputs, **options):
    return ResidualMLP(inputs, hidden_size=8, rngs=nnx.Rngs(0), **options)(inputs)


def test_the_features_are_those_of_the_logarithms():
    x = RNG.poisson(3.0, (20, 5)).astype(np.float32)
    x[0] = 1000.0
    np.testing.assert_allclose(features(x, log_scale=True), features(jnp.log1p(x)), rtol=1e-5)
    assert not np.allclose(features(x, log_scale=True), features(x))


def test_negative_values_keep_their_sign():
    x = RNG.normal(size=(20, 5)).astype(np.float32)
    logs = jnp.sign(x) * jnp.log1p(jnp.abs(x))
    np.testing.assert_allclose(features(x, log_scale=True), features(logs), rtol=1e-4, atol=1e-5)


def test_what_is_masked_does_not_count():
    x, there = RNG.poisson(3.0, (20, 5)).astype(np.float32), RNG.random((20, 5)) < 0.5
    some, others = (Masked(np.where(there, x, fill), there) for fill in (-7.0, 1e9))
    np.testing.assert_array_equal(features(some, log_scale=True), features(others, log_scale=True))


@pytest.mark.parametrize(
    ("likelihood", "log_scale"),
    [
        (lambda z: dist.Poisson(jnp.exp(z)).to_event(1), True),
        (lambda z: dist.NegativeBinomialLogits(2.0, z).to_event(1), True),
        (lambda z: dist.MultinomialLogits(z, 3), True),
        (lambda z: dist.Binomial(3, logits=z).to_event(1), False),
        (lambda z: dist.Normal(z, 1.0).to_event(1), False),
    ],
)
def test_it_is_chosen_for_counts_without_a_bound(likelihood, log_scale):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            numpyro.sample("x", likelihood(z), obs=x)

    encoder = choose_guide(model, np.ones((5, 3), np.float32)).encoder
    assert getattr(encoder, "keywords", {}) == ({"log_scale": True} if log_scale else {})


def test_it_is_not_chosen_beside_other_values():
    def model(x, y):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Poisson(jnp.exp(z)), obs=x)
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert (
        choose_guide(model, (np.ones(5, np.float32), np.ones(5, np.float32))).encoder is ResidualMLP
    )
