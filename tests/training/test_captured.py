"""What a model reads beside its arguments is what it is now, as in NumPyro, and not what it was."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_vae import AutoAmortizedNormal, Posterior, fit
from numpyro_vae.model.captured import captured, signature

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=40).astype(np.float32)
SCALE, OPTIONS, WEIGHTS = 1.0, {"scale": 1.0}, np.ones(2)


def normal(x, scale):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, scale), obs=x)


def of_global(x):
    return normal(x, SCALE)


def inner(x):
    return OPTIONS["scale"] * x


def of_called(x):
    return normal(x, inner(1.0))


class Model:
    def __init__(self):
        self.scale, self.calls = 1.0, 0

    def __call__(self, x):
        self.calls += 1
        return normal(x, self.scale)

    def run(self, x):
        return self(x)


def closure():
    scale, weights, options = 1.0, np.ones(2), SimpleNamespace(scale=1.0)

    def model(x):
        return normal(x, scale * weights[0] * options.scale)

    def change_number():
        nonlocal scale
        scale = 2.0

    def change_array():
        weights[0] = 2.0

    def change_attribute():
        options.scale = 2.0

    return model, (change_number, change_array, change_attribute)


def test_what_a_function_reads_is_seen_to_change(monkeypatch):
    called, instance = of_called, Model()
    for fn, change in (
        (of_global, lambda: monkeypatch.setitem(globals(), "SCALE", 2.0)),
        (called, lambda: monkeypatch.setitem(OPTIONS, "scale", 2.0)),
        (partial(called), lambda: monkeypatch.setitem(OPTIONS, "scale", 3.0)),
        (numpyro.handlers.scale(called, 2.0), lambda: monkeypatch.setitem(OPTIONS, "scale", 4.0)),
        (instance, lambda: setattr(instance, "scale", 2.0)),
        (instance.run, lambda: setattr(instance, "scale", 3.0)),
    ):
        before = captured(fn)
        assert captured(fn) == before
        change()
        assert captured(fn) != before


@pytest.mark.parametrize("number", range(3))
def test_what_a_closure_holds_is_seen_to_change(number):
    model, changes = closure()
    before = captured(model)
    changes[number]()
    assert captured(model) != before


@pytest.mark.parametrize("dtype", ["datetime64[D]", "float16", jnp.bfloat16, bool])
def test_an_array_of_any_type_counts_by_what_it_holds(dtype):
    value = np.zeros((2, 3), dtype)[:, ::2]
    before = signature(value)
    assert signature(value.copy()) == before
    value[0, 0] = np.ones((), dtype)
    assert signature(value) != before


def test_a_large_array_counts_as_itself():
    """It may be on disk, where it would take long to read."""
    value = np.broadcast_to(np.float32(0.0), (2**40,))
    assert signature(value) == signature(value) != signature(value[:])


def test_what_a_function_writes_itself_is_no_change():
    model, count, memo = Model(), 0, {}

    def counted(x):
        nonlocal count
        count += 1
        memo["calls"] = count
        return x

    before = captured(model, counted)
    model.calls = counted(5)
    assert captured(model, counted) == before


@pytest.fixture
def scale(monkeypatch):
    """Sets the global that the model reads."""
    return partial(monkeypatch.setitem, globals(), "SCALE")


def make_svi():
    return SVI(of_global, AutoAmortizedNormal(of_global), optax.adam(1e-2), Trace_ELBO())


quick = partial(fit, num_epochs=1, progress_bar=False)


def test_a_second_fit_is_of_the_model_as_it_is_now(scale):
    svi = make_svi()
    before = quick(svi, KEY, X)
    scale(0.1)
    found, expected = quick(svi, KEY, X), quick(make_svi(), KEY, X)
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert abs(found.losses - before.losses).min() > 1.0


@pytest.mark.parametrize("make", [AutoAmortizedNormal, AutoNormal])
def test_a_posterior_is_of_the_model_as_it_is_now(scale, make):
    guide = make(of_global)
    svi = SVI(of_global, guide, optax.adam(1e-2), Trace_ELBO())
    posterior = Posterior(guide, svi.run(KEY, 2, X, progress_bar=False))
    draws = posterior.sample(KEY, X, 3)["z"]
    before = posterior.log_weights(KEY, X, 3)
    scale(0.1)
    expected = dist.Normal(draws, 0.1).log_prob(X) - dist.Normal(draws, 1.0).log_prob(X)
    found = posterior.log_weights(KEY, X, 3) - before
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_static_array_changed_in_place_is_what_it_is_now():
    scale = np.ones(1, np.float32)
    model = lambda x, scale: normal(x, scale[0])  # noqa: E731 - a model may be one
    svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-2), Trace_ELBO(), scale=scale)
    first = quick(svi, KEY, X)
    posterior = Posterior(svi.guide, first)
    before = posterior.log_weights(KEY, X, 3)
    scale[0] = 0.1
    assert abs(posterior.log_weights(KEY, X, 3) - before).max() > 1.0
    assert abs(quick(svi, KEY, X).losses - first.losses).min() > 1.0
