"""Posteriors that are not a product over latents: dependencies, full rank, low rank, flows."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import train
from linear_gaussian import LINEAR, elbo, exact
from numpyro import handlers
from numpyro.infer import Trace_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Importance,
)

NUM_DATA = 128
STEP, NOISE = 0.5, 0.5
CHAIN_PRIOR = np.array([[1.0, 1.0], [1.0, 1.0 + STEP**2]])  # of z2 and z1
RNG = np.random.default_rng(0)
X = RNG.normal(0, np.sqrt(1 + STEP**2 + NOISE**2), NUM_DATA).astype(np.float32)
CHAIN = exact(X[:, None], np.array([[0.0, 1.0]]), NOISE, prior=CHAIN_PRIOR)

TRIPLE = RNG.normal(size=(5, 3)) * 1.2
Y = (RNG.normal(size=(NUM_DATA, 3)) @ TRIPLE.T + RNG.normal(size=(NUM_DATA, 5))).astype(np.float32)
FACTORS = exact(Y, TRIPLE, 1.0)


def chain(x):
    with numpyro.plate("data", len(x)):
        z2 = numpyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = numpyro.sample("z1", dist.Normal(z2, STEP))
        numpyro.sample("x", dist.Normal(z1, NOISE), obs=x)


def positive_chain(x):
    """The same chain, with the logarithm of its first latent in the model."""
    with numpyro.plate("data", len(x)):
        z2 = numpyro.sample("z2", dist.LogNormal(0.0, 1.0))
        z1 = numpyro.sample("z1", dist.Normal(jnp.log(z2), STEP))
        numpyro.sample("x", dist.Normal(z1, NOISE), obs=x)


def factor_analysis(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ TRIPLE.T, 1.0).to_event(1), obs=x)


def banana(x, y):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        numpyro.sample("y", dist.Normal(z[..., 1] - z[..., 0] ** 2, 0.2), obs=y)


def gap(posterior, data, log_evidence):
    """The bound's distance from the evidence, in nats per datum."""
    return (log_evidence.sum() - elbo(posterior, *data)) / NUM_DATA


DEPENDENT = {
    "z2 reads z1": (chain, {"z2": ("z1",)}),
    "z1 reads a positive z2": (positive_chain, {"z1": ["z2"]}),
}


@pytest.fixture(scope="module", params=DEPENDENT)
def dependent(request):
    model, dependencies = DEPENDENT[request.param]
    guide = AutoAmortizedNormal(model, LINEAR, dependencies=dependencies)
    # Their Normals are related in no way that an analytic divergence could see.
    return train(guide, X, loss=Trace_ELBO)


def log_if_positive(posterior, draws):
    positive = posterior.guide.model is positive_chain
    return np.stack([np.log(draws["z2"]) if positive else draws["z2"], draws["z1"]], axis=-1)


def test_dependencies_reach_the_evidence(dependent):
    assert abs(gap(dependent, (X,), CHAIN.log_evidence)) <= 0.02


def test_dependencies_reach_the_evidence_of_each_datum(dependent):
    found = dependent.check(jax.random.key(2), X, checks=(Importance(num_samples=500), "collapse"))
    assert np.abs(found.dataset["log_evidence"].values - CHAIN.log_evidence).max() <= 0.02
    assert (found.dataset["ess"] >= 0.98 * 500).all()


def test_draws_are_correlated_as_in_the_posterior(dependent):
    draws = log_if_positive(dependent, dependent.sample(jax.random.key(3), X[:8], 5000))
    for row in range(8):
        assert np.abs(draws[:, row].mean(0) - CHAIN.mean[row]).max() <= 0.1 * CHAIN.sd.min()
        np.testing.assert_allclose(np.cov(draws[:, row].T), CHAIN.covariance, atol=0.02)


def test_the_density_is_that_of_the_sites_in_the_guide(dependent):
    guide, params = dependent.guide, dependent.params
    seeded = handlers.seed(handlers.substitute(guide, data=params), 4)
    trace = handlers.trace(seeded).get_trace(X)
    expected = sum(trace[name]["fn"].log_prob(trace[name]["value"]) for name in ("z1", "z2"))
    encoding = guide.encode(params, X)
    values = {name: trace[name]["value"] for name in ("z1", "z2")}
    if guide.model is positive_chain:
        values["z2"] = jnp.log(values["z2"])
    packed = jnp.stack([values[site.name] for site in encoding.sites], axis=-1)
    constrained, log_det = encoding.constrain(packed)
    found = encoding.log_prob(packed) - log_det
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for name in ("z1", "z2"):
        np.testing.assert_allclose(constrained[name], trace[name]["value"], rtol=1e-5)


def test_the_guide_samples_what_is_read_first():
    for read, reader in (("z1", "z2"), ("z2", "z1")):
        guide = AutoAmortizedNormal(chain, LINEAR, dependencies={reader: (read,)})
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
        names = [name for name in trace if name in ("z1", "z2")]
        assert names == [read, reader]


def test_what_a_dependent_head_says_is_not_known_in_closed_form(dependent):
    with pytest.raises(ValueError, match=r"one by one, is not known in closed form.*read the sit"):
        dependent.encode(X)


def test_mean_field_misses_what_theory_says():
    posterior = train(AutoAmortizedNormal(chain, LINEAR), X)
    found = gap(posterior, (X,), CHAIN.log_evidence)
    assert CHAIN.mean_field_gap() > 0.1
    assert found == pytest.approx(CHAIN.mean_field_gap(), abs=0.02)


def test_full_rank_reaches_the_evidence_of_the_chain():
    guide = AutoAmortizedMultivariateNormal(positive_chain, LINEAR)
    posterior = train(guide, X, loss=Trace_ELBO)
    assert abs(gap(posterior, (X,), CHAIN.log_evidence)) <= 0.02
    draws = log_if_positive(posterior, posterior.sample(jax.random.key(3), X[:4], 5000))
    np.testing.assert_allclose(np.cov(draws[:, 0].T), CHAIN.covariance, atol=0.02)


@pytest.mark.slow
def test_the_gaps_of_factor_analysis():
    """Zero for a full rank, for a rank that suffices, and what theory says for a diagonal."""
    expected = FACTORS.mean_field_gap()
    assert expected > 0.1
    diagonal = train(AutoAmortizedNormal(factor_analysis, LINEAR), Y)
    assert gap(diagonal, (Y,), FACTORS.log_evidence) == pytest.approx(expected, abs=0.02)
    full = AutoAmortizedMultivariateNormal(factor_analysis, LINEAR)
    posterior = train(full, Y, loss=Trace_ELBO)
    assert abs(gap(posterior, (Y,), FACTORS.log_evidence)) <= 0.02
    loc, scale = posterior.encode(Y)["z"]
    assert np.abs(loc - FACTORS.mean).max() <= 0.1 * FACTORS.sd.min()
    assert np.abs(scale / FACTORS.sd - 1).max() <= 0.05
    low = AutoAmortizedLowRankMultivariateNormal(factor_analysis, LINEAR, rank=2)
    posterior = train(low, Y, loss=Trace_ELBO)
    assert abs(gap(posterior, (Y,), FACTORS.log_evidence)) <= 0.02


@pytest.mark.slow
def test_a_flow_bends_where_a_diagonal_cannot():
    """The evidence by quadrature over the first latent, given which the second is Normal."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(NUM_DATA, 2))
    x = z[:, 0] + rng.normal(size=NUM_DATA)
    y = z[:, 1] - z[:, 0] ** 2 + 0.2 * rng.normal(size=NUM_DATA)
    data = (x.astype(np.float32), y.astype(np.float32))
    grid, weights = np.polynomial.hermite_e.hermegauss(200)
    variance = 1 + 0.2**2
    log_y = -0.5 * ((y[:, None] + grid**2) ** 2 / variance + np.log(2 * np.pi * variance))
    log_x = -0.5 * ((x[:, None] - grid) ** 2 + np.log(2 * np.pi))
    evidence = np.log(np.exp(log_x + log_y) @ weights / np.sqrt(2 * np.pi))

    network = {"encoder": lambda inputs, rngs: MLP(inputs, hidden_sizes=(32,), rngs=rngs)}
    options = {"steps": 1500, "loss": Trace_ELBO}
    flow = AutoAmortizedFlow(banana, **network, num_layers=2, hidden_sizes=(16,))
    bent = gap(train(flow, *data, **options), data, evidence)
    straight = gap(train(AutoAmortizedNormal(banana, **network), *data, **options), data, evidence)
    print(f"nats a datum below the evidence: diagonal {straight:.3f}, flow {bent:.3f}")
    assert -0.02 <= bent <= 0.5 * straight
    assert straight >= 0.3


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        ({"z1": ("z2",), "z2": ("z1",)}, r"dependencies= goes in a circle: z\d <- z\d <- z\d"),
        ({"z1": ("z1",)}, "goes in a circle: z1 <- z1"),
        ({"z1": ("z3",)}, r"dependencies= names \['z3'\]; plate 'data' has.*\['z2', 'z1'\]"),
        ({"x": ("z2",)}, r"dependencies= names \['x'\]; plate 'data'"),
    ],
)
def test_dependencies_that_cannot_be(dependencies, message):
    guide = AutoAmortizedNormal(chain, LINEAR, dependencies=dependencies)
    with pytest.raises(ValueError, match=message):
        handlers.seed(guide, 0)(X)
