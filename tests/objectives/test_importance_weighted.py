"""The importance-weighted bound: its value is NumPyro's, its gradients are written by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.lax import stop_gradient
from linear import KEY, PARAMS, X, draws, guide, latents, log_guide, log_joint, model
from numpyro import handlers
from numpyro.infer import RenyiELBO

from numpyro_vae.objectives import ImportanceWeightedELBO

GRADIENTS = ("plain", "stl", "dreg")
by_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def by_hand(gradient, params, num_particles=5):
    """Minus the gradient of the bound, from the formulas in the papers."""
    noise = draws(KEY, num_particles)

    def log_weights(params, density, z):
        return log_joint(params, z) - log_guide(density, z)

    z = latents(params, noise)
    weights = jax.nn.softmax(log_weights(params, params, z), axis=0)
    if gradient == "plain":

        def bound(params):
            found = log_weights(params, params, latents(params, noise))
            return jax.nn.logsumexp(found, axis=0).sum()

        return jax.grad(lambda params: -bound(params))(params)
    power = 2 if gradient == "dreg" else 1
    by_draw = jax.grad(lambda z: log_weights(params, params, z).sum())(z)

    def surrogate(params):
        of_guide = (stop_gradient(weights**power * by_draw) * latents(params, noise)).sum()
        return -of_guide - (weights * log_joint(params, stop_gradient(z))).sum()

    return jax.grad(surrogate)(params)


@by_gradient
def test_its_value_is_that_of_numpyro(gradient):
    found = ImportanceWeightedELBO(6, gradient).loss(KEY, PARAMS, model, guide, X)
    expected = RenyiELBO(num_particles=6).loss(KEY, PARAMS, model, guide, X)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@by_gradient
def test_its_gradient_is_that_of_the_paper(gradient):
    loss = ImportanceWeightedELBO(5, gradient)
    found = jax.grad(lambda params: loss.loss(KEY, params, model, guide, X))(PARAMS)
    expected = by_hand(gradient, PARAMS)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_particles_one_by_one_are_those_at_once():
    for gradient in GRADIENTS:
        losses = [
            ImportanceWeightedELBO(3, gradient, vectorize_particles=how).loss(
                KEY, PARAMS, model, guide, X
            )
            for how in (True, False)
        ]
        np.testing.assert_allclose(*losses, rtol=1e-6)


@by_gradient
def test_sites_that_depend_on_each_other_in_the_guide(gradient):
    """The gradient is unbiased for `plain` and `dreg`, which agree on average."""

    def model(x):
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(b, 0.7), obs=x)

    def guide(x):
        slope = numpyro.param("slope", 0.2)
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(slope * x, 0.9))
            numpyro.sample("b", dist.Normal(slope * x + 0.5 * a, 0.9))

    def grad(gradient, key):
        loss = ImportanceWeightedELBO(3, gradient)
        return jax.grad(lambda s: loss.loss(key, {"slope": s}, model, guide, X))(0.2)

    keys = jax.random.split(KEY, 4_000)
    plain, found = (
        np.asarray(jax.jit(jax.vmap(partial(grad, name)))(keys)) for name in ("plain", gradient)
    )
    error = np.sqrt((plain.var() + found.var()) / len(keys))
    if gradient == "stl":  # biased, and known to be
        assert abs(plain.mean() - found.mean()) > 4 * error
    else:
        assert abs(plain.mean() - found.mean()) < 4 * error


def signal_to_noise(gradient, num_particles, num_keys=500):
    def grad(key):
        loss = ImportanceWeightedELBO(num_particles, gradient)
        of_slope = {**PARAMS, "slope": jnp.array(0.45)}
        return jax.grad(lambda params: loss.loss(key, params, model, guide, X))(of_slope)["slope"]

    found = np.asarray(jax.jit(jax.vmap(grad))(jax.random.split(KEY, num_keys)))
    return abs(found.mean()) / found.std()


def test_the_signal_of_the_guide_drowns_in_noise_unless_doubly_reparameterized():
    """Tucker et al. (2019), figure 1: with 64 times the particles."""
    plain, dreg = (
        signal_to_noise(name, 64) / signal_to_noise(name, 1) for name in ("plain", "dreg")
    )
    assert plain < 0.5
    assert dreg > 1.0


def test_a_site_without_a_reparameterized_sampler_is_refused():
    def discrete(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            if x is not None:
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'z' of the guide.*Train with ReweightedWakeSleep"):
        ImportanceWeightedELBO(2).loss(KEY, {}, discrete, handlers.block(discrete, hide=["x"]), X)


def test_an_unknown_gradient_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="gradient is 'path', expected one of"):
        ImportanceWeightedELBO(2, *["path"])
