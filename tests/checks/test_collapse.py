"""Divergences of guides that draw jointly, from priors of which they are known exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi

from numpyro_vae import MLP, Posterior, fit

KEY = jax.random.key(0)
STEPS, NUM_DATA = 4, 100
WALK = np.minimum.outer(np.arange(1, STEPS + 1), np.arange(1, STEPS + 1)).astype(float)
MIX = np.tril(np.ones((STEPS, STEPS)))
PRIORS = {
    "a walk": (lambda: dist.GaussianRandomWalk(1.0, num_steps=STEPS), WALK, np.eye(STEPS)),
    "a product": (lambda: dist.Normal(0, 1).expand([STEPS]).to_event(1), np.eye(STEPS), MIX),
}


def exact(prior, mix, x):
    """Divergences of the posteriors from the prior: of all latents, and of each by itself."""
    precision = np.linalg.inv(prior)
    covariance = np.linalg.inv(precision + mix.T @ mix)
    mean = x @ mix @ covariance
    log_det = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(covariance)[1]
    trace = np.trace(precision @ covariance)
    joint = 0.5 * (trace - STEPS + log_det + np.einsum("ni,ij,nj->n", mean, precision, mean))
    variance = np.diag(covariance)
    return joint, 0.5 * (variance + mean**2 - 1 - np.log(variance))


@pytest.mark.parametrize("name", PRIORS)
def test_divergences_of_a_joint_guide_add_up_to_that_of_all_latents(name):
    prior, covariance, mix = PRIORS[name]

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", prior())
            mean = jnp.einsum("ij,...j->...i", mix.astype(np.float32), z)
            numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    scale = mix @ covariance @ mix.T + np.eye(STEPS)
    x = np.random.default_rng(0).multivariate_normal(np.zeros(STEPS), scale, NUM_DATA)
    svi = make_svi(model, partial(MLP, hidden_sizes=(4,)))
    result = fit(svi, KEY, x.astype(np.float32), num_epochs=2, progress_bar=False)
    posterior = Posterior(svi.guide, result, natural_steps=8)  # which makes it exact
    report = posterior.check(KEY, x.astype(np.float32), "collapse", progress_bar=False)
    found, (joint, apart) = report.dataset, exact(covariance, mix, x)
    if name == "a product":
        np.testing.assert_allclose(found["kl_z"], apart, atol=1e-3)
    else:  # all of the divergence is that of the site as a whole
        np.testing.assert_allclose(found["total_correlation"], 0, atol=1e-4)
    total = found["kl_z"].values.reshape(NUM_DATA, -1).sum(1) + found["total_correlation"].values
    # 32 draws of a row, whose log q - log p varies by about one nat for each latent.
    np.testing.assert_allclose(total.mean(), joint.mean(), atol=4 * np.sqrt(STEPS / 32 / NUM_DATA))
    rest = joint.mean() - float(found["mutual_information"])
    np.testing.assert_allclose(float(found["aggregate_divergence"]), rest, atol=0.15)
    assert report.findings[0].ok
