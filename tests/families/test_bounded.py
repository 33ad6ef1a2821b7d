"""Latents between two bounds, which a flow sees in coordinates of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from heads import NUM_FEATURES, features, fresh, quick_jit, trained
from jax.scipy.special import log_ndtr
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

from numpyro_vae import AutoAmortizedFlow, data_sets
from numpyro_vae.families import Flow
from numpyro_vae.families.bounded import Bounded, Logits
from numpyro_vae.scales.parameterization import LogScale

HALF = Logits((True, False))


def test_what_is_chosen_is_the_logit_of_phi():
    x = jnp.array([[-1.3, 0.4], [0.7, -2.0]])
    probability = jnp.exp(log_ndtr(x[:, 0]))
    y = HALF(x)
    np.testing.assert_allclose(y[:, 0], jnp.log(probability / (1 - probability)), rtol=1e-5)
    assert (y[:, 1] == x[:, 1]).all()


@pytest.mark.parametrize("x64", [False, True])
def test_values_come_back_far_into_the_tails(x64):
    with jax.enable_x64(x64):
        x = jnp.stack([jnp.linspace(-60.0, 60.0, 121), jnp.linspace(-90.0, 90.0, 121)], -1)
        close = 1e-9 if x64 else 2e-6
        np.testing.assert_allclose(HALF.inv(HALF(x)), x, rtol=close, atol=close)


@pytest.mark.parametrize("inverse", [False, True])
def test_slopes_are_those_of_autodiff(inverse):
    x = jnp.stack([jnp.linspace(-12.0, 12.0, 49), jnp.linspace(-3.0, 3.0, 49)], -1)
    y = HALF(x)
    slopes = jax.vmap(jax.jacobian(HALF._inverse if inverse else HALF))(y if inverse else x)
    found = jnp.log(jnp.abs(jnp.linalg.det(slopes)))
    expected = HALF.log_abs_det_jacobian(x, y) * (-1 if inverse else 1)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_logit_beyond_all_floats_is_finite_and_has_a_gradient():
    y = jnp.array([1e30, 0.5])
    assert HALF.inv(y)[0] == pytest.approx(2e30**0.5, rel=1e-3)
    assert jnp.isfinite(jax.grad(lambda y: HALF._inverse(y).sum())(y)).all()


def test_the_density_of_a_bounded_value_integrates_to_one():
    head = Bounded(trained(Flow(), 2), np.array([True, False]))
    raw = head(features())
    logit, other = np.linspace(-30.0, 30.0, 300), np.linspace(-12.0, 12.0, 240)
    grid = jnp.stack(jnp.meshgrid(logit, other, indexing="ij"), -1)
    density = quick_jit(lambda grid: jnp.exp(head.distribution(raw).log_prob(grid)))(grid)
    assert density.mean() * 60 * 24 == pytest.approx(1, abs=0.02)


def test_draws_have_the_density_that_is_stated():
    head = Bounded(trained(Flow(), 3), np.array([True, False, True]))
    fn = head.distribution(head(features()))
    draws, intermediates = fn.sample_with_intermediates(jax.random.key(0), (1_000,))
    known, unknown = fn.log_prob(draws, intermediates), fn.log_prob(draws)
    np.testing.assert_allclose(known, unknown, atol=5e-3)


def sites_of(sample):
    """Return the local sites that a guide has read off a model."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = sample()
            numpyro.sample("x", dist.Normal(jnp.reshape(z, (len(x), -1)).sum(-1), 1.0), obs=x)

    guide = AutoAmortizedFlow(model)
    with handlers.seed(rng_seed=0):
        guide(jnp.zeros(4))
    return guide.local_sites


BOUNDED = [
    dist.Uniform(-1.0, 3.0),
    dist.Beta(2.0, 3.0),
    dist.Uniform(0.0, 1.0).expand([2]).to_event(1),
    dist.TruncatedNormal(0.0, 1.0, low=-1.0, high=2.0),
    dist.VonMises(0.0, 1.0),
]
UNBOUNDED = [
    dist.Normal(0.0, 1.0),
    dist.LogNormal(0.0, 1.0),
    dist.TruncatedNormal(0.0, 1.0, low=0.0),
    dist.Dirichlet(jnp.ones(3)),
    dist.LKJCholesky(2),
]


@pytest.mark.parametrize("fn", BOUNDED, ids=lambda fn: type(fn).__name__)
def test_sites_between_two_bounds_are_told(fn):
    assert [site.is_bounded for site in sites_of(lambda: numpyro.sample("z", fn))] == [True]


@pytest.mark.parametrize("fn", UNBOUNDED, ids=lambda fn: type(fn).__name__)
def test_others_are_not(fn):
    assert [site.is_bounded for site in sites_of(lambda: numpyro.sample("z", fn))] == [False]


def test_bounds_of_each_data_sets_own_are_told():
    def model(upper, x):
        z = numpyro.sample("z", dist.Uniform(0.0, upper))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedFlow(data_sets(model))
    upper, x = jnp.array([1.0, 2.0, 3.0]), jnp.zeros(3)
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        guide(upper, x)
    [site] = guide.local_sites
    assert site.is_bounded
    assert ((trace["z"]["value"] > 0) & (trace["z"]["value"] < upper)).all()


def test_a_flow_that_knows_nothing_draws_uniform_values():
    head = Bounded(fresh(Flow(parameterization=LogScale(init_scale=1.0)), 2), np.array([True] * 2))
    draws = head.distribution(head(jnp.zeros(NUM_FEATURES))).sample(jax.random.key(0), (4_000,))
    shares = biject_to(constraints.unit_interval)(draws)
    counts = np.histogram(np.asarray(shares[:, 0]), 10, (0, 1))[0]
    assert abs(counts - 400).max() < 5 * np.sqrt(360)
