"""The posterior of the global latents, where the model gives a row no density: there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_vae import AutoAmortizedNormal, Posterior
from numpyro_vae.checks import Globals
from tests.helpers import SMALL, train

KEY = jax.random.key(0)
COUNTS = np.arange(12).astype(np.float32) % 4
BAD = np.where(np.arange(12) == 3, 0.5, COUNTS).astype(np.float32)
MESSAGE = (
    r"No draw of the global sites has a finite importance weight.*'x' has values outside the "
    r"support of its Poisson in 1 of 12 rows of plate 'data' \(rows \[3\]; found 0.5\)"
)


def model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Poisson(jnp.exp(z)), obs=x)


GUIDES = {
    "amortized": lambda: AutoAmortizedNormal(model, SMALL, global_guide=AutoNormal),
    "joint": lambda: AutoMultivariateNormal(model),
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_row_without_density_is_told_and_no_guide_called_fine(name):
    """All weights are alike then, which was taken for a guide that is exact."""
    posterior: Posterior = train(GUIDES[name](), COUNTS, steps=10, particles=1)
    with pytest.raises(ValueError, match=MESSAGE):
        posterior.check(KEY, BAD, Globals(num_samples=100), progress_bar=False)
    with pytest.raises(ValueError, match=MESSAGE):
        posterior.repair_globals(KEY, BAD, method="importance", num_samples=100)


@pytest.mark.slow
def test_the_other_checks_go_on():
    posterior = train(GUIDES["amortized"](), COUNTS, steps=10, particles=1)
    report = posterior.check(KEY, BAD, "all", progress_bar=False)
    assert report.skipped is not None
    assert "has a finite importance weight" in report.skipped["globals"]
    assert report.verdict[3] == 3


def test_the_density_of_joint_draws_is_that_of_numpyro():
    posterior = train(GUIDES["joint"](), COUNTS, steps=10, particles=1)
    with pytest.warns(UserWarning, match="outside the support of its Poisson"):
        tree = posterior.to_datatree(KEY, BAD, 5)
    assert (tree.sample_stats["log_p"] == -np.inf).all()
    assert np.isfinite(tree.sample_stats["log_q"]).all()
