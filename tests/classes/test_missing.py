"""Entries that are missing: the posterior given the others, and what it says of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import train
from linear_gaussian import exact
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)

NUM_DATA, NOISE = 160, 0.8
LOADINGS = np.array([1.0, -0.7, 0.5])
RNG = np.random.default_rng(0)
X = np.outer(RNG.normal(size=NUM_DATA), LOADINGS) + NOISE * RNG.normal(size=(NUM_DATA, 3))
# All patterns, that of a row without any value too.
PATTERNS = np.array([[i & 1, i & 2, i & 4] for i in range(8)]) > 0
MASK = PATTERNS[np.arange(NUM_DATA) % 8]
X = np.where(MASK, X, 7.0).astype(np.float32)
VARIANCE = 1 / (1 + MASK @ LOADINGS**2 / NOISE**2)
MEAN = (MASK * X) @ LOADINGS / NOISE**2 * VARIANCE
ENCODER = partial(MLP, hidden_sizes=(32, 16), activation=nnx.tanh)


def masked_plates(x, mask):
    """Masked by a handler, entry by entry in a plate of their own."""
    with numpyro.plate("data", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("features", 3, dim=-1), handlers.mask(mask=mask):
            numpyro.sample("x", dist.Normal(z * LOADINGS, NOISE), obs=x)


def masked_event(x, mask):
    """Masked within the event."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        fn = dist.Normal(z[:, None] * LOADINGS, NOISE).mask(mask)
        numpyro.sample("x", fn.to_event(1), obs=x)


def evidence():
    """With the entries that are missing removed, row by row."""
    return np.array(
        [
            exact(row[None, there], LOADINGS[there, None], NOISE).log_evidence[0]
            if there.any()
            else 0.0
            for row, there in zip(X, MASK, strict=True)
        ]
    )


@pytest.fixture(scope="module", params=[masked_plates, masked_event])
def trained(request):
    guide = AutoAmortizedNormal(request.param, ENCODER, plate="data")
    return train(guide, X, MASK, steps=2500, rate=1e-2)


@pytest.mark.slow
def test_the_posterior_is_the_one_without_those_entries(trained):
    loc, scale = (np.ravel(values) for values in trained.encode((X, MASK))["z"])
    error = (loc - MEAN) / np.sqrt(VARIANCE)
    assert np.sqrt((error**2).mean()) <= 0.05
    assert np.abs(error).max() <= 0.25
    assert np.sqrt(((scale / np.sqrt(VARIANCE) - 1) ** 2).mean()) <= 0.05


def test_the_evidence_is_the_one_without_those_entries(trained):
    found = trained.check(jax.random.key(1), (X, MASK), checks=("importance", "collapse"))
    assert np.abs(found.dataset["log_evidence"].values - evidence()).max() <= 0.02


def test_a_row_without_values_has_the_prior(trained):
    empty = ~MASK.any(1)
    draws = trained.sample(jax.random.key(2), (X, MASK), 4000)["z"].reshape(4000, -1)[:, empty]
    assert abs(draws.mean()) <= 0.05
    assert abs(draws.std() - 1) <= 0.05


def test_predictions_of_missing_entries_have_the_exact_moments(trained):
    drawn = trained.predict(jax.random.key(3), (X, MASK), 4000)["x"]
    spread = np.sqrt(np.outer(VARIANCE, LOADINGS**2) + NOISE**2)
    error = (drawn.mean(0) - np.outer(MEAN, LOADINGS)) / spread
    assert np.sqrt((error**2)[~MASK].mean()) <= 0.05
    assert np.abs(drawn.std(0) / spread - 1)[~MASK].mean() <= 0.03


@pytest.mark.parametrize("stands_there", [0.0, -50.0, np.nan])
def test_what_stands_in_missing_entries_is_not_read(trained, stands_there):
    guide, params = trained.guide, trained.params

    @jax.jit
    def locs(x):
        return guide.encode(params, x, MASK).marginal(lambda fn: fn.mean)

    changed = np.where(MASK, X, stands_there).astype(np.float32)
    np.testing.assert_array_equal(locs(changed), locs(X))


@pytest.mark.parametrize("stands_there", [0.0, -50.0])
def test_what_stands_in_missing_entries_changes_neither_bound_nor_gradient(trained, stands_there):
    guide, params = trained.guide, trained.params

    @jax.jit
    def bound(params, x):
        return Trace_ELBO().loss(jax.random.key(0), params, guide.model, guide, x, MASK)

    changed = np.where(MASK, X, stands_there).astype(np.float32)
    expected, found = (jax.value_and_grad(bound, (0, 1))(params, x) for x in (X, changed))
    np.testing.assert_array_equal(found[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, found[1][0], expected[1][0])
    assert (np.asarray(expected[1][1])[~MASK] == 0).all()
    assert (np.asarray(expected[1][1])[MASK] != 0).all()


def test_nan_that_the_model_fills_never_reaches_the_guide():
    """The default inputs are what the model observes; those read from an argument hold the NaN."""

    def model(x):
        there = ~jnp.isnan(x)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(z[:, None] * LOADINGS, NOISE).mask(there)
            numpyro.sample("x", fn.to_event(1), obs=jnp.where(there, x, 0.0))

    holes = np.where(MASK, X, np.nan).astype(np.float32)
    filled = np.where(MASK, X, 0.0).astype(np.float32)
    posterior = train(AutoAmortizedNormal(model, ENCODER), holes, steps=50)
    again = train(AutoAmortizedNormal(masked_event, ENCODER), filled, MASK, steps=50)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(posterior.params))
    jax.tree.map(np.testing.assert_array_equal, posterior.params, again.params)


@pytest.mark.slow
def test_masked_rows_of_a_multivariate_family():
    """Two latents that vary together, in rows of which some see only one of two values."""
    loadings = np.array([[1.0, 1.0], [1.0, -0.3]])
    there = np.ones((NUM_DATA, 2), bool)
    there[::2, 1] = False

    def model(x, mask):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            fn = dist.Normal(z @ loadings.T, NOISE).mask(mask)
            numpyro.sample("x", fn.to_event(1), obs=x)

    x = RNG.normal(size=(NUM_DATA, 2)).astype(np.float32)
    guide = AutoAmortizedMultivariateNormal(model, ENCODER)
    posterior = train(guide, x, there, steps=1500, rate=1e-2, loss=Trace_ELBO)
    found = posterior.check(jax.random.key(1), (x, there), checks=("importance", "collapse"))
    evidence = found.dataset["log_evidence"].values
    part = exact(x[::2, :1], loadings[:1], NOISE)
    np.testing.assert_allclose(evidence[::2], part.log_evidence, atol=0.02)
    whole = exact(x[1::2], loadings, NOISE)
    np.testing.assert_allclose(evidence[1::2], whole.log_evidence, atol=0.02)
    draws = posterior.sample(jax.random.key(2), (x, there), 4000)["z"]
    for start, expected in enumerate((part, whole)):
        found = np.mean([np.cov(draws[:, row].T) for row in range(start, NUM_DATA, 2)], axis=0)
        np.testing.assert_allclose(found, expected.covariance, atol=0.06)


def obs_masked(x, mask):
    """NumPyro's own imputation, in which a missing entry is a latent site of its own."""
    with numpyro.plate("data", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("features", 3, dim=-1):
            numpyro.sample("x", dist.Normal(z * LOADINGS, NOISE), obs=x, obs_mask=mask)


@pytest.mark.slow
def test_obs_mask_makes_latents_of_missing_entries():
    """The guide serves them; given z they have the density that the model draws them from."""
    guide = AutoAmortizedNormal(
        obs_masked, ENCODER, plate="data", dependencies={"x_unobserved": ("z",)}
    )
    posterior = train(guide, X, MASK, steps=2500, rate=1e-2, loss=Trace_ELBO)
    draws = posterior.sample(jax.random.key(2), (X, MASK), 4000)
    z = draws["z"].reshape(4000, -1)
    error = (z.mean(0) - MEAN) / np.sqrt(VARIANCE)
    assert np.sqrt((error**2).mean()) <= 0.08
    assert np.sqrt(((z.std(0) / np.sqrt(VARIANCE) - 1) ** 2).mean()) <= 0.08
    spread = np.sqrt(np.outer(VARIANCE, LOADINGS**2) + NOISE**2)
    imputed = draws["x_unobserved"]
    error = (imputed.mean(0) - np.outer(MEAN, LOADINGS)) / spread
    assert np.sqrt((error**2)[~MASK].mean()) <= 0.08
    assert np.abs(imputed.std(0) / spread - 1)[~MASK].mean() <= 0.05


@pytest.mark.slow
def test_missing_entries_vary_with_the_latents_of_their_row():
    """One multivariate Normal of z and of the entries that are missing, which vary by row."""
    guide = AutoAmortizedMultivariateNormal(obs_masked, ENCODER, plate="data")
    posterior = train(guide, X, MASK, steps=2500, rate=1e-2, loss=Trace_ELBO)
    found = posterior.check(jax.random.key(1), (X, MASK), checks="importance").dataset
    assert np.abs(found["log_evidence"].values - evidence()).max() <= 0.05
    assert (found["khat"].values < 0.5).all()
    draws = posterior.sample(jax.random.key(2), (X, MASK), 4000)
    z, imputed = draws["z"].reshape(4000, -1), draws["x_unobserved"]
    centred = (z - z.mean(0))[..., None] * (imputed - imputed.mean(0))
    error = centred.mean(0) - np.outer(VARIANCE, LOADINGS)
    assert np.abs(error[~MASK]).mean() <= 0.05


def test_a_flow_does_not_know_the_density_of_some_latents():
    guide = AutoAmortizedFlow(obs_masked, ENCODER, plate="data")
    svi = SVI(obs_masked, guide, optax.adam(1e-2), Trace_ELBO())
    with pytest.raises(ValueError, match=r"masks some of the local sites \['z', 'x_unobserved'\]"):
        svi.init(jax.random.key(0), X, MASK)


@pytest.mark.slow
def test_repair_of_rows_with_missing_entries():
    guide = AutoAmortizedMultivariateNormal(obs_masked, ENCODER, plate="data")
    posterior = train(guide, X, MASK, steps=30, rate=1e-2, loss=Trace_ELBO)
    report = posterior.check(jax.random.key(1), (X, MASK), checks="importance")
    assert report.flagged.any()
    repair = posterior.repair(jax.random.key(2), (X, MASK), report)
    assert not repair.remaining.size
