"""How often a model is run, and what is compiled."""

from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
KEY = jax.random.key(0)


class Counting:
    """A model with a decoder, and how often its Python has run."""

    def __init__(self):
        self.calls = 0
        self.decoder = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        self.calls += 1
        decode = nnx_module("decoder", self.decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def since(self):
        """How often since the last time."""
        calls, self.calls = self.calls, 0
        return calls


def make(model):
    guide = AutoAmortizedNormal(model, partial(MLP, hidden_sizes=(4,)))
    return SVI(model, guide, optax.adam(1e-2), Trace_ELBO())


@contextmanager
def compilations():
    """Collects the compilations of a block."""
    found, is_open = [], True

    def listen(event, duration, **_):
        if is_open and event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    is_open = False


quick = partial(fit, batch_size=20, num_epochs=2, progress_bar=False)


def test_fit_runs_the_model_twice_and_a_second_fit_compiles_nothing():
    model = Counting()
    svi = make(model)
    first = quick(svi, KEY, X)
    assert model.since() <= 2
    quick(svi, jax.random.key(1), X + 1)
    with compilations() as compiled:
        again = quick(svi, KEY, X)
    assert (model.since(), compiled) == (0, [])
    np.testing.assert_array_equal(first.losses, again.losses)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def test_the_counter_can_count():
    with compilations() as compiled:
        jax.jit(lambda x: x + len(compiled))(X).block_until_ready()
    assert compiled


def test_another_objective_or_optimizer_compiles_anew():
    svi = make(Counting())
    one = quick(svi, KEY, X).losses
    svi.loss = Trace_ELBO(num_particles=2)
    assert not np.array_equal(quick(svi, KEY, X).losses, one)


def test_the_bounds_of_a_parameter_are_those_of_this_fit():
    """A constraint made of the data is no constant of what was compiled before."""

    def model(x):
        top = numpyro.param(
            "top", x.max() - 0.5, constraint=dist.constraints.interval(x.max() - 1, x.max())
        )
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(top, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = make(model)
    options = {"num_epochs": 2, "progress_bar": False, "batch_axes": None}
    for shift in (0.0, 10.0):
        x = jnp.linspace(0.0, 1.0, 20) + shift
        top = fit(svi, KEY, x, **options).params["top"]
        assert shift <= top <= 1 + shift
    expected = fit(make(model), KEY, x, **options).params["top"]
    np.testing.assert_allclose(top, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_support_of_a_global_site_is_that_of_this_fit():
    """NumPyro's guide of global sites keeps the support that it has seen."""

    def model(x):
        top = numpyro.sample("top", dist.Uniform(x.min(), x.max()))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(top, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = make(model)
    for shift in (0.0, 10.0):
        x = jnp.linspace(0.0, 1.0, 20) + shift
        result = fit(svi, KEY, x, num_epochs=2, progress_bar=False)
        top = Posterior(svi.guide, result).sample(KEY, x, 50)["top"]
        assert (top > shift).all()
        assert (top < 1 + shift).all()
        fresh = fit(make(model), KEY, x, num_epochs=2, progress_bar=False)
        np.testing.assert_array_equal(result.losses, fresh.losses)


def test_global_sites_compile_once():
    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi, x = make(model), X[:, 0]
    result = quick(svi, KEY, x)
    Posterior(svi.guide, result).sample(KEY, x, 5)
    with compilations() as compiled:
        again = quick(svi, KEY, x)
        Posterior(svi.guide, again).sample(KEY, x, 5)
    assert compiled == []


def test_a_posterior_runs_the_model_once_and_a_second_one_compiles_nothing():
    model = Counting()
    svi = make(model)
    result = quick(svi, KEY, X)
    model.since()
    calls = {
        "encode": (lambda posterior: posterior.encode(X), 1),
        "sample": (lambda posterior: posterior.sample(KEY, X, 5), 0),
        "log_weights": (lambda posterior: posterior.log_weights(KEY, X, 5), 1),
    }
    for name, (call, most) in calls.items():
        call(Posterior(svi.guide, result))
        assert model.since() <= most, name
    for name, (call, _) in calls.items():
        with compilations() as compiled:
            call(Posterior(svi.guide, result))
        assert (model.since(), compiled) == (0, []), name


@pytest.mark.parametrize("num_rows", [60, 600])
def test_more_rows_run_the_model_no_more_often(num_rows):
    model = Counting()
    svi = make(model)
    result = quick(svi, KEY, X)
    model.since()
    Posterior(svi.guide, result).encode(np.resize(X, (num_rows, 3)))
    assert model.since() <= 2
