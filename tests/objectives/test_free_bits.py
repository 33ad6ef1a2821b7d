"""Free bits: what is free by site and dimension, and a latent that would collapse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import make_svi
from linear import KEY, X, model
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from numpyro_vae import AutoAmortizedMultivariateNormal, AutoAmortizedNormal, fit
from numpyro_vae.model.plates import minibatch
from numpyro_vae.objectives import AnnealedELBO, FreeBitsELBO

LOCS = jnp.array([[0.1, 2.0, -1.0], [0.2, 1.0, 0.5], [0.0, -1.5, 0.7], [0.1, 0.3, 0.2]])
MUCH = 100.0


def vector_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def vector_guide(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(LOCS, 1.0).to_event(1))


def loss_of(loss, model=vector_model, guide=vector_guide, params=None):
    return float(loss.loss(KEY, params or {}, model, guide, X))


def test_each_dimension_is_free_on_average_over_the_rows():
    divergences = (0.5 * LOCS**2).sum(0)
    assert divergences[0] < len(X) * 0.2 < divergences[2] < divergences[1]
    costs = jnp.maximum(divergences, len(X) * 0.2).sum()
    found = loss_of(FreeBitsELBO(0.2)) - loss_of(AnnealedELBO(0.0))
    np.testing.assert_allclose(found, costs, rtol=1e-5)


def test_below_the_threshold_nothing_pulls_towards_the_prior():
    def guide(x):
        loc = numpyro.param("loc", jnp.zeros(3))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, 1.0).expand([len(x), 3]).to_event(1))

    def grad(loss):
        of_loc = {"loc": jnp.array([0.1, 2.0, -1.0])}
        return jax.grad(lambda p: loss.loss(KEY, p, vector_model, guide, X))(of_loc)["loc"]

    pull = grad(FreeBitsELBO(0.3)) - grad(AnnealedELBO(0.0))
    np.testing.assert_allclose(pull, [0.0, 4 * 2.0, 4 * -1.0], atol=1e-4)


@pytest.mark.parametrize("nats", [0.0, 0.3, MUCH])
def test_rows_that_are_masked_or_weigh_nothing_have_no_free_bits(nats):
    mask = jnp.array([True, False, True, True])
    loss = FreeBitsELBO(nats)

    def masked(fn, x):
        with handlers.mask(mask=mask):
            return fn(x)

    found = loss_of(loss, *(partial(masked, fn) for fn in (vector_model, vector_guide)))
    wrap = partial(minibatch, plate="data", num_data=8)
    weigh = partial(wrap, weights=mask / 2)
    expected = loss_of(loss, weigh(vector_model), weigh(vector_guide))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    twice = loss_of(loss, wrap(vector_model), wrap(vector_guide))
    np.testing.assert_allclose(twice, 2 * loss_of(loss), rtol=1e-5)


def mixed_model(x):
    """A global site; a vector, a constrained and a correlated latent of each datum."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 2.0).expand([2]).to_event(1))
        w = numpyro.sample("w", dist.LogNormal(0.0, 0.5))
        v = numpyro.sample("v", dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)))
        numpyro.sample("x", dist.Normal(z.sum(-1) + w + v.sum(-1), 0.5), obs=x)


@pytest.mark.parametrize("auto", [AutoAmortizedNormal, AutoAmortizedMultivariateNormal])
def test_sites_of_any_kind(auto):
    """With much free, all six values of a datum cost that much, and the global site what it did."""
    guide = auto(mixed_model)
    svi = SVI(mixed_model, guide, optax.adam(1e-2), Trace_ELBO())
    params = svi.get_params(svi.init(KEY, X))
    args = (mixed_model, guide, params)
    by_site = TraceMeanField_ELBO(sum_sites=False).loss(KEY, params, mixed_model, guide, X)
    expected = by_site["x"] + by_site["mu"] + MUCH * 6 * len(X)
    np.testing.assert_allclose(loss_of(FreeBitsELBO(MUCH), *args), expected, rtol=1e-5)
    nothing, elbo = (loss_of(loss, *args) for loss in (FreeBitsELBO(0.0), TraceMeanField_ELBO()))
    assert nothing >= elbo - 1e-3  # a sampled divergence below 0 counts as none


def test_particles_are_averaged_before_they_are_compared():
    """A sampled divergence is compared on average: less than the mean of what single ones cost."""

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Laplace(0.0 * x, 0.7))

    keys = jax.random.split(KEY, 8)
    single = [FreeBitsELBO(0.05).loss(key, {}, model, guide, X) for key in keys]
    assert loss_of(FreeBitsELBO(0.05, num_particles=8), model, guide) < np.mean(single)


def test_negative_free_bits_are_refused():
    with pytest.raises(ValueError, match=r"nats is -0.1, expected a number from 0 on"):
        FreeBitsELBO(-0.1)


# -- a latent that collapses -----------------------------------------------------------------------


@pytest.mark.slow
def test_it_keeps_a_latent_that_the_elbo_loses():
    """The noise of the model is above what the latent explains, so that the best ELBO has none."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    direction = np.array([0.8, -0.6, 0.6])
    x = (truth[:, None] * direction + 0.3 * rng.normal(size=(200, 3))).astype(np.float32)

    def model(x):
        loading = numpyro.param("loading", jnp.array([0.1, 0.1, 0.1]))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[:, None] * loading, 1.6).to_event(1), obs=x)

    found = {}
    for loss in (TraceMeanField_ELBO(), FreeBitsELBO(0.5)):
        svi = make_svi(model, loss=loss)
        result = fit(svi, KEY, x, batch_size=50, num_epochs=100, progress_bar=False)
        loc, upper = svi.guide.quantiles(result.params, [0.5, 0.8413447], x)["z"]
        scale = upper - loc
        divergence = (0.5 * (scale**2 + loc**2 - 1) - jnp.log(scale)).mean()
        found[type(loss).__name__] = divergence, abs(np.corrcoef(loc, truth)[0, 1])
    assert found["TraceMeanField_ELBO"][0] < 0.02
    assert found["FreeBitsELBO"][0] > 0.4
    assert found["FreeBitsELBO"][1] > 0.9
