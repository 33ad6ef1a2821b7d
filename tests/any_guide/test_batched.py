"""NumPyro's guides with a Normal for each batch: by row, if their batches are the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoBatchedLowRankMultivariateNormal,
    AutoBatchedMultivariateNormal,
)

from numpyro_vae import Importance, Posterior
from numpyro_vae.numpyro_internals import batched_parts, batched_site

KEY = jax.random.key(0)
QUIET = {"progress_bar": False}
RNG = np.random.default_rng(0)
LOADINGS = RNG.normal(size=(3, 5)).astype(np.float32)
X = (RNG.normal(size=(20, 3)) @ LOADINGS + RNG.normal(size=(20, 5))).astype(np.float32)
COVARIANCE = np.linalg.inv(np.eye(3) + LOADINGS @ LOADINGS.T)
MEANS = X @ LOADINGS.T @ COVARIANCE
EVIDENCE = dist.MultivariateNormal(0.0, np.eye(5) + LOADINGS.T @ LOADINGS).log_prob(X)


def factors(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ LOADINGS, 1.0).to_event(1), obs=x)


def exact(factor=1.0, shift=0.0):
    tril = np.tile(factor * np.linalg.cholesky(COVARIANCE), (20, 1, 1))
    params = {"auto_loc": MEANS + shift, "auto_scale_tril": tril}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    return Posterior(AutoBatchedMultivariateNormal(factors, batch_ndim=1), params)


@pytest.mark.slow
def test_the_exact_guide_has_the_evidence_as_its_weights():
    posterior = exact()
    weights = posterior.log_weights(KEY, X, 30)
    np.testing.assert_allclose(weights, np.tile(EVIDENCE, (30, 1)), atol=1e-4)
    draws = posterior.sample(KEY, X, 4000)["z"]
    np.testing.assert_allclose(draws.mean(0), MEANS, atol=0.06)
    np.testing.assert_allclose(np.cov(draws[:, 7].T), COVARIANCE, atol=0.05)


@pytest.mark.slow
def test_a_wrong_one_is_flagged_and_repaired_by_row():
    posterior = exact(factor=1.4, shift=0.3)
    found = (report := posterior.check(KEY, X, Importance(2000), **QUIET)).dataset
    away = np.full(3, 0.3)
    kl = 0.5 * (3 * (1.4**2 - 1 - 2 * np.log(1.4)) + away @ np.linalg.inv(COVARIANCE) @ away)
    np.testing.assert_allclose(EVIDENCE - found["elbo"].values, kl, atol=0.15)
    np.testing.assert_allclose(found["log_evidence"], EVIDENCE, atol=0.15)
    assert len(report.flagged) == 20
    repair = posterior.repair(KEY, X, [2, 5], method="importance", num_samples=2000)
    draws = repair.groups["posterior"]["z"]
    np.testing.assert_allclose(draws.mean(0), MEANS[[2, 5]], atol=0.07)
    np.testing.assert_allclose(np.cov(draws[:, 0].T), COVARIANCE, atol=0.06)
    with pytest.raises(ValueError, match="rows"):
        posterior.sample(KEY, X[:9], 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [AutoBatchedMultivariateNormal, AutoBatchedLowRankMultivariateNormal]
)
def test_densities_and_supports_are_numpyros(make):
    """Draws of NumPyro's guide have its density, row by row, on the sites' support."""

    def model(x):
        with numpyro.plate("data", len(x)):
            theta = numpyro.sample("theta", dist.Dirichlet(jnp.ones(4)))
            numpyro.sample("x", dist.Normal(theta @ jnp.arange(4.0), 1.0), obs=x)

    guide, x = make(model, batch_ndim=1), X[:6, 0]
    svi = SVI(model, guide, optax.adam(3e-2), Trace_ELBO())
    posterior = Posterior(guide, svi.run(KEY, 200, x, progress_bar=False))
    theta = posterior.sample(KEY, x, 10)["theta"]
    np.testing.assert_allclose(theta.sum(-1), 1.0, atol=1e-5)
    known = handlers.substitute(handlers.seed(guide, KEY), data=posterior.params)
    normal = handlers.trace(known).get_trace(x)["_auto_latent"]["fn"]
    transform = dist.biject_to(dist.constraints.simplex)
    point = transform.inv(theta)
    log_q = normal.log_prob(point.reshape(10, -1))
    log_q -= transform.log_abs_det_jacobian(point, theta).sum(-1)
    likelihood = dist.Normal(theta @ jnp.arange(4.0), 1.0).log_prob(x)
    expected = (dist.Dirichlet(jnp.ones(4)).log_prob(theta) + likelihood).sum(-1) - log_q
    found = posterior.log_weights(KEY, x, 10)
    assert found.shape == (10, 6)
    np.testing.assert_allclose(found.sum(1), expected, atol=2e-3)


def test_a_site_of_scalars():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.LogNormal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(jnp.log(z), 1.0), obs=x)

    x = X[:, 0]
    params = {"auto_loc": x[:, None] / 2, "auto_scale_tril": jnp.full((20, 1, 1), 0.5**0.5)}
    posterior = Posterior(AutoBatchedMultivariateNormal(model), params)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x)
    np.testing.assert_allclose(posterior.log_weights(KEY, x, 5), [evidence] * 5, atol=1e-4)


def test_of_several_sites_batches_are_not_rows():
    """NumPyro puts one site after another in a vector, and cuts that into equal parts."""

    def model(x):
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    guide, x = AutoBatchedMultivariateNormal(model, batch_ndim=1), X[:4, 0]
    tril = jnp.tile(jnp.array([[1.0, 0.0], [0.99, 0.1]]), (4, 1, 1))
    posterior = Posterior(guide, {"auto_loc": jnp.zeros((4, 2)), "auto_scale_tril": tril})
    with pytest.raises(ValueError, match="jointly for all rows"):
        posterior.log_weights(KEY, x, 3)
    draws = posterior.sample(KEY, x, 4000)
    assert np.corrcoef(draws["a"][:, 0], draws["a"][:, 1])[0, 1] > 0.95
    assert abs(np.corrcoef(draws["a"][:, 0], draws["b"][:, 0])[0, 1]) < 0.1


@pytest.mark.slow
def test_the_batches_of_numpyros_guide():
    """What is taken for granted of it: the first batch has the first site's values."""

    def model(x, sites):
        with numpyro.plate("data", len(x)):
            z = sum(numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in sites)
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = X[:8, 0]
    for sites, expected in (("a", ("a", "data")), ("ab", None)):
        guide = AutoBatchedMultivariateNormal(model, batch_ndim=1)
        assert batched_site(guide) is None
        svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
        params = svi.get_params(svi.init(KEY, x, sites))
        found = batched_site(guide)
        assert (found and found[::2]) == expected
        loc = jnp.arange(8.0 * len(sites)).reshape(8, -1)
        with handlers.substitute(data={**params, "auto_loc": loc}):
            normal, plate = batched_parts(guide, "data")
        assert (normal.batch_shape, plate.name) == ((8,), "data")
        np.testing.assert_array_equal(guide._unpack_latent(loc.reshape(-1))["a"], np.arange(8))
