"""Models that NumPyro's own autoguides serve: plates, sites, parameters, networks, arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from common import GUIDES, SMALL, X, hierarchical, run, start
from flax import linen, nnx
from numpyro import handlers
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive, Trace_ELBO

from numpyro_vae import AutoAmortizedDelta, AutoAmortizedNormal, Posterior, fit

by_guide = pytest.mark.parametrize("auto", GUIDES, ids=lambda auto: auto.__name__[13:])


@by_guide
def test_deterministic_sites(auto):
    guide = auto(hierarchical, SMALL)
    params = start(hierarchical, guide, X)
    draws = guide.sample_posterior(jax.random.key(1), params, X[:5], sample_shape=(2, 3))
    assert draws["mu"].shape == (2, 3)
    np.testing.assert_allclose(draws["mean"], draws["z"] + draws["w"], rtol=1e-5)


@by_guide
def test_a_plate_that_subsamples(auto):
    """`numpyro.subsample` takes the rows that the guide has encoded."""

    def model(x):
        with numpyro.plate("data", len(x), subsample_size=5):
            rows = numpyro.subsample(x, event_dim=0)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=rows)

    guide = auto(model, SMALL)
    params = start(model, guide, X)
    guide_trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
    model_trace = handlers.trace(handlers.replay(handlers.seed(model, 1), guide_trace))
    model_trace = model_trace.get_trace(X)
    np.testing.assert_array_equal(model_trace["x"]["value"], X[guide_trace["data"]["value"]])
    assert guide.sample_posterior(jax.random.key(1), params, X)["z"].shape == (12,)


@pytest.mark.slow
def test_create_plates():
    def model(x, num_data=100):
        with numpyro.plate("data", num_data, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def create_plates(x, num_data=100):
        indices = num_data - 1 - jnp.arange(len(x))  # the last ones
        with handlers.substitute(data={"data": indices}):
            return numpyro.plate("data", num_data, subsample_size=len(x))

    guide = AutoAmortizedNormal(model, SMALL, create_plates=create_plates)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), X)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X[:5])
    np.testing.assert_array_equal(trace["data"]["value"], [99, 98, 97, 96, 95])
    assert trace["z"]["scale"] == 20.0
    # The full size is the model's own, of the call: half the data, half the loss.
    whole, half = (svi.update(state, X, num_data=n)[1] for n in (100, 50))
    assert float(whole) == pytest.approx(2 * float(half), rel=1e-5)


def test_a_plate_of_another_size_than_at_set_up():
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    svi = SVI(hierarchical, guide, optax.adam(1e-2), Trace_ELBO())
    state, loss = svi.update(svi.init(jax.random.key(0), X), X[:5])
    assert np.isfinite(loss)
    assert np.isfinite(svi.evaluate(state, X))


def test_parameters_and_networks_in_the_model():
    linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def model(x):
        sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
        first = nnx_module("first", linear)
        second = flax_module("second", linen.Dense(1), input_shape=(1,))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            mean = second(first(z[:, None]))[:, 0]
            numpyro.sample("x", dist.Normal(mean, sigma), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    before = svi.get_params(svi.init(jax.random.key(0), X))
    assert set(before) == {"sigma", "first$params", "second$params", "auto$params"}
    fitted = fit(svi, jax.random.key(0), np.asarray(X), num_epochs=3, progress_bar=False)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, dict(fitted.params))
    for name in before:
        assert any(jax.tree.leaves(changed[name])), name


@pytest.mark.slow
def test_keyword_and_static_arguments():
    """Arguments that change the model's Python, bound in the SVI or passed in every call."""

    def model(x, *, shift, num_latents=1, kind="normal"):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([num_latents]).to_event(1))
            prior = {"normal": dist.Normal, "laplace": dist.Laplace}[kind]
            numpyro.sample("x", prior(z.sum(-1) + shift, 0.5), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO(), num_latents=3, kind="laplace")
    result = svi.run(jax.random.key(0), 3, X, shift=0.1, progress_bar=False)
    static = {"num_latents": 3, "kind": "laplace"}
    draws = guide.sample_posterior(jax.random.key(1), result.params, X, shift=0.1, **static)
    assert draws["z"].shape == (12, 3)
    data = {"x": np.asarray(X), "shift": 0.1}
    axes = {"x": 0, "shift": None}
    fitted = fit(svi, jax.random.key(0), data, batch_axes=axes, num_epochs=2, progress_bar=False)
    posterior = Posterior(guide, fitted)
    assert posterior.sample(jax.random.key(1), data, 4)["z"].shape == (4, 12, 3)


def test_a_model_bound_with_partial_and_a_method():
    class Model:
        scale = 0.5

        def __call__(self, x):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("x", dist.Normal(z, self.scale), obs=x)

    def model(x, scale):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, scale), obs=x)

    bound = partial(model, scale=0.5)
    instance = Model()
    _, found = run(bound, AutoAmortizedNormal(bound, SMALL), X)
    _, expected = run(instance, AutoAmortizedNormal(instance, SMALL), X)
    np.testing.assert_array_equal(found.losses, expected.losses)


def test_predictive_without_the_observations():
    """The guide reads the data; the model, run on its draws, predicts them."""

    def model(x, observe=True):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.1), obs=x if observe else None)

    guide = AutoAmortizedDelta(model, SMALL, inputs=lambda x, observe=True: x)
    _, result = run(model, guide, X, num_steps=200)
    predictive = Predictive(model, guide=guide, params=result.params, num_samples=50)
    found = predictive(jax.random.key(1), X, observe=False)["x"]
    assert np.abs(found.mean(0) - X).mean() < 0.5
