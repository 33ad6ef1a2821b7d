"""Objectives, and both modes of differentiation: as with any guide of NumPyro's."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from common import GUIDES, SMALL, X, hierarchical, start
from numpyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from numpyro_vae import AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal

by_guide = pytest.mark.parametrize("auto", GUIDES, ids=lambda auto: auto.__name__[13:])
KEY = jax.random.key(1)

OBJECTIVES = {
    "trace": Trace_ELBO(),
    "trace, particles": Trace_ELBO(num_particles=3),
    "trace, in turn": Trace_ELBO(num_particles=3, vectorize_particles=False),
    "mean field": TraceMeanField_ELBO(num_particles=2),
    "graph": TraceGraph_ELBO(num_particles=2),
    "enum": TraceEnum_ELBO(num_particles=2),
    "Renyi": RenyiELBO(num_particles=3),
    "Renyi, alpha": RenyiELBO(alpha=2.0, num_particles=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_a_gradient(objective):
    """Of the joint guide, which has an auxiliary site; `test_guide.py` has the plain one."""
    loss, guide = OBJECTIVES[objective], AutoAmortizedMultivariateNormal(hierarchical, SMALL)
    params = start(hierarchical, guide, X)
    real = {name: value for name, value in params.items() if name != "mu_auto_scale"}

    @jax.jit
    def value_and_grad(real):
        fixed = {"mu_auto_scale": params["mu_auto_scale"]}
        return jax.value_and_grad(
            lambda real: loss.loss(KEY, {**fixed, **real}, hierarchical, guide, X)
        )(real)

    value, grads = value_and_grad(real)
    assert np.isfinite(value)
    for path, grad in jax.tree.leaves_with_path(grads["auto$params"]):
        assert np.isfinite(grad).all(), path
    assert any((grad != 0).any() for grad in jax.tree.leaves(grads["auto$params"]["encoder"]))


@pytest.mark.slow
@by_guide
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_elbo_by_site(auto, num_particles):
    guide = auto(hierarchical, SMALL)
    params = start(hierarchical, guide, X)
    by_site = Trace_ELBO(num_particles=num_particles, sum_sites=False)
    found = by_site.loss(KEY, params, hierarchical, guide, X)
    assert set(found) - {"_auto_z_w_latent"} == {"mu", "z", "w", "x"}
    total = Trace_ELBO(num_particles=num_particles).loss(KEY, params, hierarchical, guide, X)
    np.testing.assert_allclose(sum(found.values()), total, rtol=1e-5)


def test_mean_field_elbo_by_site():
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    params = start(hierarchical, guide, X)
    found = TraceMeanField_ELBO(sum_sites=False).loss(KEY, params, hierarchical, guide, X)
    assert set(found) == {"mu", "z", "w", "x"}
    total = TraceMeanField_ELBO().loss(KEY, params, hierarchical, guide, X)
    np.testing.assert_allclose(sum(found.values()), total, rtol=1e-5)


def test_particles_in_turn_are_those_at_once():
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    params = start(hierarchical, guide, X)
    losses = [
        Trace_ELBO(num_particles=3, vectorize_particles=how).loss(
            KEY, params, hierarchical, guide, X
        )
        for how in (True, False)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("auto", [AutoAmortizedNormal, AutoAmortizedFlow])
def test_forward_mode_differentiation(auto):
    """A model with a loop that reverse mode cannot differentiate."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            up = jax.lax.while_loop(lambda y: y.min() < 2, lambda y: y + 1, z)
            numpyro.sample("x", dist.Normal(up, 0.5), obs=x)

    tiny = partial(SMALL, hidden_sizes=(2,))
    svi = SVI(model, auto(model, tiny), optax.adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), X[:3])
    after, loss = svi.update(state, X[:3], forward_mode_differentiation=True)
    assert np.isfinite(loss)
    before, after = (svi.get_params(s)["auto$params"]["encoder"] for s in (state, after))
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after))
    assert any(changed)


@pytest.mark.slow
def test_forward_mode_is_reverse_mode():
    guide = AutoAmortizedNormal(hierarchical, partial(SMALL, hidden_sizes=(2,)))
    svi = SVI(hierarchical, guide, optax.sgd(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), X)
    forward, reverse = (
        svi.get_params(svi.update(state, X, forward_mode_differentiation=mode)[0])
        for mode in (True, False)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), forward, reverse)
