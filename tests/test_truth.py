"""Exact posteriors and evidence are recovered where encoder and family contain them."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from models import EXACT
from numpyro.infer import SVI, TraceMeanField_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, Importance, Posterior, fit


@pytest.fixture(scope="module", params=EXACT)
def trained(request):
    exact = EXACT[request.param]()
    linear = partial(MLP, hidden_sizes=(16,), activation=lambda hidden: hidden, standardize=False)
    guide = AutoAmortizedNormal(exact.model, linear)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 4 * 500))
    svi = SVI(exact.model, guide, optimizer, TraceMeanField_ELBO(num_particles=8))
    result = fit(
        svi, jax.random.key(0), exact.data, batch_size=128, num_epochs=500, progress_bar=False
    )
    return exact, Posterior(guide, result), result


@pytest.mark.slow
def test_loc_is_within_a_twentieth_of_the_posterior_sd(trained):
    exact, posterior, _ = trained
    for name, (loc, _) in posterior.encode(exact.data).items():
        assert (np.abs(loc - exact.loc[name]) / exact.scale[name]).max() <= 0.05


def test_scale_is_within_five_percent(trained):
    exact, posterior, _ = trained
    for name, (_, scale) in posterior.encode(exact.data).items():
        assert np.abs(scale / exact.scale[name] - 1).max() <= 0.05


@pytest.mark.slow
def test_evidence_is_within_two_hundredths_of_a_nat(trained):
    exact, posterior, _ = trained
    found = posterior.check(
        jax.random.key(1), exact.data, checks=(Importance(num_samples=2000), "collapse")
    )
    assert np.abs(found.dataset["log_evidence"].values - exact.log_evidence).max() <= 0.02
    assert (found.verdict == 0).all()


def test_global_posterior(trained):
    exact, posterior, _ = trained
    draws = posterior.sample(jax.random.key(2), exact.data, 4000, var_names=list(exact.globals))
    for name, (loc, scale) in exact.globals.items():
        assert abs(draws[name].mean() - loc) <= 0.1 * scale
        assert abs(draws[name].std() / scale - 1) <= 0.1


def test_draws_have_the_exact_moments(trained):
    exact, posterior, _ = trained
    draws = posterior.sample(jax.random.key(3), exact.data, 4000)
    for name in exact.loc:
        values = np.log(draws[name]) if name == "rate" else draws[name]
        z = (values.mean(0) - exact.loc[name]) / exact.scale[name]
        assert np.sqrt((z**2).mean()) <= 0.05
