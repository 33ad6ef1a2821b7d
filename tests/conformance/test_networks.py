"""The same network in four frameworks is the same guide: same losses, same posterior."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from common import run
from flax import linen, nnx
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedFlow, AutoAmortizedNormal, Posterior, fit

RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(40, 3)).astype(np.float32)
FIRST, SECOND = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 5), (5, 4)))
BIAS = RNG.normal(size=5).astype(np.float32)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(jnp.pad(z, ((0, 0), (0, 1))), 0.5).to_event(1), obs=x)


class Nnx(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(5, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.first.kernel[...], self.first.bias[...] = FIRST, BIAS
        self.second.kernel[...] = SECOND

    def __call__(self, inputs):
        return self.second(nnx.tanh(self.first(inputs)))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        first = linen.Dense(5, kernel_init=lambda *_: FIRST, bias_init=lambda *_: BIAS)
        return linen.Dense(4, use_bias=False, kernel_init=lambda *_: SECOND)(
            linen.tanh(first(inputs))
        )


class Equinox(eqx.Module):
    first: jax.Array
    bias: jax.Array
    second: jax.Array

    def __call__(self, datum):
        return jnp.tanh(datum @ self.first + self.bias) @ self.second


def init(rng_key, inputs):
    return {"first": jnp.array(FIRST), "bias": jnp.array(BIAS), "second": jnp.array(SECOND)}


def apply(params, inputs):
    return jnp.tanh(inputs @ params["first"] + params["bias"]) @ params["second"]


ENCODERS = {
    "nnx": Nnx,
    "nnx, as a builder": lambda: lambda example_inputs, rngs: Nnx(),
    "linen": Linen,
    "Equinox": lambda: Equinox(*map(jnp.array, (FIRST, BIAS, SECOND))),
    "functions": lambda: (init, apply),
}
FAMILIES = {"diagonal": AutoAmortizedNormal, "flow": AutoAmortizedFlow}


def trained(encoder, family, blocks=None):
    """Train by SVI and by `fit`, from the same heads."""
    guide = FAMILIES[family](model, ENCODERS[encoder]())
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    initial = svi.get_params(svi.init(jax.random.key(0), DATA))["auto$params"]
    given = {"auto$params": {**initial, "blocks": blocks or initial["blocks"]}}
    key = jax.random.key(1)
    run = svi.run(key, 4, jnp.asarray(DATA), init_params=given, progress_bar=False)
    fitted = fit(svi, key, DATA, batch_size=20, num_epochs=2, init_params=given, progress_bar=False)
    return given["auto$params"]["blocks"], run, fitted, Posterior(guide, fitted).encode


@pytest.fixture(scope="module")
def references():
    return {family: trained("nnx", family) for family in FAMILIES}


CASES = [(name, "diagonal") for name in ENCODERS if name != "nnx"] + [("functions", "flow")]


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "family"), CASES)
def test_the_same_weights_give_the_same_losses(encoder, family, references):
    blocks, run, fitted, encode = references[family]
    _, found_run, found_fit, found_encode = trained(encoder, family, blocks)
    np.testing.assert_allclose(found_run.losses, run.losses, rtol=1e-4)
    np.testing.assert_allclose(found_fit.losses, fitted.losses, rtol=1e-4)
    if family == "diagonal":
        found, expected = found_encode(DATA[:7])["z"], encode(DATA[:7])["z"]
        np.testing.assert_allclose(found.loc, expected.loc, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-3)


def test_a_network_without_parameters_in_every_framework():
    """The heads alone are trained then."""

    class Doubled(linen.Module):
        def __call__(self, inputs):
            return 2 * inputs

    class DoubledNnx(nnx.Module):
        def __call__(self, inputs):
            return 2 * inputs

    class DoubledEquinox(eqx.Module):
        def __call__(self, datum):
            return 2 * datum

    functions = (lambda rng_key, inputs: {}, lambda params, inputs: 2 * inputs)
    losses = []
    for encoder in (DoubledNnx(), Doubled(), DoubledEquinox(), functions):
        guide = AutoAmortizedNormal(model, encoder)
        svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(0), DATA))["auto$params"]
        assert not jax.tree.leaves(params.get("encoder", {}))
        blocks = {
            "auto$params": {**params, "blocks": jax.tree.map(jnp.ones_like, params["blocks"])}
        }
        losses.append(svi.evaluate(svi.init(jax.random.key(0), DATA, init_params=blocks), DATA))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_encoding_builds_the_encoder_once():
    """A builder is the user's code, and may be slow: checking parameters needs no second one."""
    built = []

    def build(inputs, *, rngs):
        built.append(inputs.shape)
        return nnx.Linear(3, 4, rngs=rngs)

    guide = AutoAmortizedNormal(model, build)
    params = run(model, guide, DATA, num_steps=1)[1].params
    built.clear()
    guide.encode(params, DATA)
    assert built == [(40, 3)]
