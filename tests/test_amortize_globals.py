"""`amortize` of models with global latents."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import SMALL

from numpyro_vae import AutoAmortizedNormal, amortize, fit, phases
from numpyro_vae.choices import choose_optimizer, choose_optimizers
from numpyro_vae.inference.rows import Rows

KEY = jax.random.key(0)
NOISE = 0.5
RNG = np.random.default_rng(0)
X = (3 + RNG.normal(size=(600, 1)) + RNG.normal(0, NOISE, (600, 3))).astype(np.float32)
QUIET = {"progress_bar": False}


def with_global(x):
    """The mean of the latents is global, and the deviation of the data a parameter."""
    sd = numpyro.param("sd", NOISE, constraint=dist.constraints.positive)
    b = numpyro.sample("b", dist.Normal(0.0, 10.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(b, 1.0))
        loc = jnp.broadcast_to(z[..., None], x.shape)
        numpyro.sample("x", dist.Normal(loc, sd).to_event(1), obs=x)


def without_global(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        loc = jnp.broadcast_to(z[..., None], x.shape)
        numpyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def test_the_posterior_of_the_globals_is_that_of_all_rows():
    """Also of those that were held out to end training; and it is as narrow as it is to be."""
    guide = AutoAmortizedNormal(with_global, SMALL)
    options = {"guide": guide, "num_steps": 1500, "num_simulation_steps": 0, "natural_steps": 0}
    posterior = amortize(with_global, KEY, X, **options, **QUIET)
    assert posterior.check(KEY, X, "globals", **QUIET).dataset["globals_khat"] < 0.7
    sd = float(posterior.params["sd"])
    variance = (1 + sd**2 / 3) / len(X)
    draws = posterior.sample(KEY, X[:1], 4000)["b"]
    # The best of guides in which latents and their mean are independent has 0.92 of it.
    assert 0.7 * variance < draws.var() < 1.3 * variance
    assert abs(draws.mean() - X.mean()) < 0.5 * variance**0.5


@pytest.mark.parametrize(
    ("num_simulation_steps", "name"), [(20, ".*forward KL.*"), (0, "The globals, on all rows")]
)
def test_a_phase_that_fails_loses_nothing_before_it(monkeypatch, num_simulation_steps, name):
    found = []

    def fail_second(*args, **kwargs):
        found.append(None if len(found) == 1 else fit(*args, **kwargs))
        if found[-1] is None:
            raise FloatingPointError("No step could be taken")
        return found[-1]

    monkeypatch.setattr(phases, "fit", fail_second)
    guide, steps = AutoAmortizedNormal(with_global, SMALL), {"num_steps": 20, "natural_steps": 0}
    steps |= {"num_simulation_steps": num_simulation_steps}
    with pytest.warns(UserWarning, match=f"(?i)what came before it is kept. {name}: No step"):
        posterior = amortize(with_global, KEY, X, guide=guide, **steps, **QUIET)
    network = (params["auto$params"] for params in (posterior.params, found[0].params))
    jax.tree.map(np.testing.assert_array_equal, *network)


def test_only_models_with_global_latents_have_two_rates():
    def made(fn):
        guide = AutoAmortizedNormal(fn, SMALL)
        return choose_optimizers(guide, Rows.read(guide, {}, X, 0))

    assert made(without_global) is choose_optimizer
    params = {name: jnp.zeros(2) for name in ("auto$params", "sd", "b_auto_loc")}
    adam = made(with_global)(100)
    state, grads = adam.init(params), jax.tree.map(jnp.ones_like, params)
    for _ in range(10):
        steps, state = adam.update(grads, state, params)
    found = {name: float(step[0]) for name, step in steps.items()}
    assert found["auto$params"] == found["sd"] < 0
    np.testing.assert_allclose(found["b_auto_loc"], 5 * found["sd"], rtol=1e-5)
