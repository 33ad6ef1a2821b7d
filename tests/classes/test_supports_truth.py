"""Constrained latents: densities that integrate to one, and evidence as quadrature has it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import train
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import Trace_ELBO
from scipy import stats
from scipy.special import logsumexp

from numpyro_vae import (
    MLP,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Importance,
    Posterior,
)

NUM_DATA = 32
RNG = np.random.default_rng(0)

PRIORS = {
    "scalar": dist.Normal(0.0, 1.0),
    "positive": dist.Gamma(6.0, 4.0),
    "unit": dist.Beta(2.0, 3.0),
    "interval": dist.Uniform(-2.0, 3.0),
    "simplex": dist.Dirichlet(jnp.ones(3)),
    "ordered": dist.TransformedDistribution(
        dist.Normal(jnp.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
    ),
    "corr_cholesky": dist.LKJCholesky(3, 2.0),
    "matrix": dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(2),
}
# The value of a site that the data depend on, and quadrature nodes over its support.
ONE_DIMENSIONAL = {
    "scalar": np.linspace(-8, 8, 4001),
    "positive": np.exp(np.linspace(-14, 5, 8001)),
    "unit": 1 / (1 + np.exp(-np.linspace(-16, 16, 8001))),
    "interval": -2 + 5 / (1 + np.exp(-np.linspace(-16, 16, 8001))),
}
UNCONSTRAINED = {"simplex": 2, "ordered": 3, "corr_cholesky": 3, "matrix": 6}


def many(x):
    """One local site of each support."""
    with numpyro.plate("data", len(x)):
        values = {name: numpyro.sample(name, prior) for name, prior in PRIORS.items()}
        size = len(x)
        total = sum(value.reshape(size, -1).sum(-1) for value in values.values())
        numpyro.sample("x", dist.Normal(total, 1.0), obs=x)


def one(prior):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", prior)
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return model


X = RNG.normal(size=NUM_DATA).astype(np.float32)
SMALL = {"encoder": lambda inputs, rngs: MLP(inputs, hidden_sizes=(16,), rngs=rngs)}


@pytest.fixture(scope="module", params=[AutoAmortizedNormal, AutoAmortizedMultivariateNormal])
def mixed(request):
    """With random parameters, so that no location or scale is what it starts at."""
    guide = request.param(many, **SMALL)

    @jax.jit
    def params(key):
        trace = handlers.trace(handlers.seed(guide, key)).get_trace(X)
        found = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        noise = iter(jax.random.split(key, 100))
        return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(noise), x.shape), found)

    return Posterior(guide, params(jax.random.key(0)))


def log_q(guide, params, values):
    """The guide's density of a draw on the constrained spaces."""
    encoding = guide.encode(params, X)
    rows = [
        biject_to(encoding.run.support(site)).inv(values[site.name]).reshape(NUM_DATA, -1)
        for site in encoding.sites
    ]
    packed = jnp.concatenate(rows, axis=-1)
    return encoding.log_prob(packed) - encoding.constrain(packed)[1]


def test_every_draw_is_in_its_support(mixed):
    draws = mixed.sample(jax.random.key(0), X, 50)
    assert set(draws) == set(PRIORS)
    for name, prior in PRIORS.items():
        assert draws[name].shape == (50, NUM_DATA, *prior.event_shape)
        assert np.all(prior.support(draws[name])), name


def test_the_unconstrained_sizes_add_up(mixed):
    sizes = {site.name: site.datum_size(mixed.guide.plate) for site in mixed.guide.local_sites}
    assert sizes == {name: UNCONSTRAINED.get(name, 1) for name in PRIORS}


def test_the_density_is_that_of_the_sites(mixed):
    """Of the guide's trace, an auxiliary joint site included."""
    guide = mixed.guide

    @jax.jit
    def both(params):
        seeded = handlers.seed(handlers.substitute(guide, data=params), 4)
        trace = handlers.trace(seeded).get_trace(X)
        sampled = {name: site for name, site in trace.items() if site["type"] == "sample"}
        expected = sum(site["fn"].log_prob(site["value"]) for site in sampled.values())
        values = {name: site["value"] for name, site in sampled.items()}
        return log_q(guide, params, values), expected

    np.testing.assert_allclose(*both(mixed.params), rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_log_weights_are_model_over_guide(mixed):
    """By hand: the model's density of a draw over the guide's, on the constrained spaces."""

    @jax.jit
    def expected(params, values):
        total = sum(value.reshape(NUM_DATA, -1).sum(-1) for value in values.values())
        log_p = dist.Normal(total, 1.0).log_prob(X)
        log_p += sum(PRIORS[name].log_prob(value) for name, value in values.items())
        return log_p - log_q(mixed.guide, params, values)

    draws = mixed.sample(jax.random.key(5), X, 3)
    for number, found in enumerate(mixed.log_weights(jax.random.key(5), X, 3)):
        values = {name: draws[name][number] for name in PRIORS}
        np.testing.assert_allclose(found, expected(mixed.params, values), rtol=1e-3, atol=2e-2)


def test_the_density_of_each_site_integrates_to_one():
    guide = AutoAmortizedNormal(many, **SMALL)
    # Without the ends, where rounding leaves the support.
    nodes = {name: x[1:-1, None].astype(np.float32) for name, x in ONE_DIMENSIONAL.items()}

    @jax.jit
    def log_densities():
        trace = handlers.trace(handlers.seed(guide, 4)).get_trace(X)
        return {name: trace[name]["fn"].log_prob(jnp.asarray(x)) for name, x in nodes.items()}

    for name, log_density in log_densities().items():
        mass = np.trapezoid(np.exp(np.asarray(log_density, float)), nodes[name], axis=0)
        np.testing.assert_allclose(mass, 1.0, atol=5e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["positive", "unit"])
def test_evidence_is_that_of_quadrature(name):
    prior, nodes = PRIORS[name], ONE_DIMENSIONAL[name][1:-1]
    x = np.asarray(prior.sample(jax.random.key(0), (NUM_DATA,))) + 0.5 * RNG.normal(size=NUM_DATA)
    x = x.astype(np.float32)
    posterior = train(AutoAmortizedNormal(one(prior), **SMALL), x, loss=Trace_ELBO)
    log_joint = stats.norm(nodes, 0.5).logpdf(x[:, None]) + np.asarray(prior.log_prob(nodes))
    widths = np.gradient(nodes)
    expected = logsumexp(log_joint, b=widths, axis=1)
    found = posterior.check(
        jax.random.key(1), x, checks=(Importance(num_samples=20_000), "collapse")
    )
    error = found.dataset["log_evidence"].values - expected
    # A Normal has lighter tails than the logarithm of a Gamma, so a few draws weigh much.
    assert np.abs(error).max() <= 0.04
    assert abs(error.mean()) <= 0.005
    # The bound is below it, by what a Normal on the unconstrained scale cannot be.
    gap = expected - found.dataset["elbo"].values
    assert gap.min() > -0.02
    assert gap.mean() < 0.1
