"""Checks against NumPyro's diagnostics, where they answer the same question and where they do not.

`psis_diagnostic` returns one k-hat, that of the joint weights of all data. `vsbc_diagnostic` fits a
guide anew for each simulation, and tests whether posteriors are biased.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import make_svi
from numpyro.infer import Trace_ELBO, psis_diagnostic
from numpyro.infer.calibration import vsbc_diagnostic

from numpyro_vae import Calibration, Importance, Posterior

NOISE = 0.5
SD = 1 / np.sqrt(1 + NOISE**-2)  # of the exact posterior
NUM_SAMPLES, NUM_SIMULATIONS = 4000, 300
KEY = jax.random.key(0)


def model(x=None):
    with numpyro.plate("data", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


class Network(nnx.Module):
    """The exact posterior, with errors in units of its standard deviation."""

    def __init__(self, bias=0.0, scale=1.0):
        self.bias, self.scale = nnx.Param(jnp.asarray(bias)), nnx.Param(jnp.asarray(scale))

    def __call__(self, x):
        loc = x * (SD / NOISE) ** 2 + self.bias[...] * SD
        return loc[:, None], jnp.full((len(x), 1), jnp.log(self.scale[...] * SD))


def svi_with(**errors):
    """An SVI whose guide is as it is initialized, also after steps."""
    return make_svi(model, Network(**errors), loss=Trace_ELBO(), optimizer=optax.sgd(0.0))


def khats(num_data, scale, num_keys):
    """For each key the k-hats of all rows, and NumPyro's of the rows together."""
    x = np.linspace(-1.0, 2.0, num_data, dtype=np.float32)
    svi = svi_with(scale=scale)
    params = svi.get_params(svi.init(KEY, x))
    posterior, check = Posterior(svi.guide, params), Importance(NUM_SAMPLES)
    keys, size = jax.random.split(KEY, num_keys), {"num_particles": NUM_SAMPLES}
    ours = [posterior.check(key, x, check, progress_bar=False).dataset["khat"] for key in keys]
    numpyros = [psis_diagnostic(key, params, model, svi.guide, x, **size) for key in keys]
    return np.array(ours), np.array(numpyros)


@pytest.mark.parametrize("scale", [0.6, 0.9])
def test_the_khat_of_a_single_datum_is_the_joint_one(scale):
    """Both estimate the tail's shape, here one minus the ratio of the variances."""
    ours, numpyros = khats(1, scale, 10)
    error = np.sqrt((ours.var(ddof=1) + numpyros.var(ddof=1)) / 10)
    assert abs(ours.mean() - numpyros.mean()) <= 3 * error
    assert abs(ours.mean() - (1 - scale**2)) <= 0.1
    assert error <= 0.06


@pytest.mark.slow
def test_the_joint_khat_grows_with_the_data_and_that_of_a_row_does_not():
    (few, joint_few), (many, joint_many) = khats(1, 0.8, 2), khats(200, 0.8, 2)
    assert joint_few.max() < 0.7
    assert joint_many.min() > 1.0
    assert abs(many.mean() - few.mean()) <= 0.15
    assert (many < 0.7).mean() >= 0.99


@pytest.mark.parametrize(
    ("errors", "is_calibrated", "is_unbiased"),
    [({}, True, True), ({"bias": 0.5}, False, False), ({"scale": 0.5}, False, True)],
    ids=["exact", "biased", "too narrow"],
)
def test_ranks_agree_and_more_than_bias_is_tested(errors, is_calibrated, is_unbiased):
    svi = svi_with(**errors)
    found = vsbc_diagnostic(
        jax.random.PRNGKey(0),  # it takes no others
        model,
        svi.guide,
        numpyro.optim.SGD(0.0),
        Trace_ELBO(),
        observed_sites=["x"],
        num_simulations=NUM_SIMULATIONS,
        num_svi_steps=1,
        num_samples=250,
    )
    assert (found.ks_pvalues["z"].item() > 0.001) == is_unbiased
    x = np.zeros(NUM_SIMULATIONS, np.float32)
    posterior = Posterior(svi.guide, svi.get_params(svi.init(KEY, x)))
    report = posterior.check(KEY, x, Calibration(NUM_SIMULATIONS), progress_bar=False)
    assert all(finding.ok for finding in report.findings) == is_calibrated
    ours, numpyros = report.dataset["pit_z"].values, found.probabilities["z"]
    error = np.sqrt((ours.var() + numpyros.var()) / NUM_SIMULATIONS)
    assert abs(ours.mean() - numpyros.mean()) <= 3 * error
    assert ours.std() == pytest.approx(numpyros.std(), rel=0.15)
