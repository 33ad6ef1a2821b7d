"""What the checks compute, where the answer is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from scipy.special import logsumexp
from scipy.stats import kstest, norm

from numpyro_vae import Calibration, Gap, Importance, Novelty
from numpyro_vae.checks import importance
from numpyro_vae.inference import psis
from numpyro_vae.inference.psis import khat_threshold, pareto_khat

KEY = jax.random.key(1)
NOISE = 0.7
PRECISION = 1 + 2 / NOISE**2  # of either latent: two of the data tell of it


def narrow(factor):
    return planted.exact(planted.ORTHOGONAL, NOISE, factor=factor)


@pytest.fixture(scope="module", params=[1.0, 0.8])
def checked(request):
    case = narrow(request.param)
    checks = (Gap(num_samples=4000), Calibration(num_simulations=2000), "collapse")
    return request.param, case.posterior.check(KEY, case.data, checks).dataset


@pytest.mark.slow
def test_the_gap_of_a_wrong_scale_is_the_network_s(checked):
    """KL of Normals with a ratio of scales, for two latents; the family could do better."""
    factor, found = checked
    expected = 2 * (factor**2 / 2 - 0.5 - np.log(factor))
    gap, error = found["gap_amortization"].values, found["gap_amortization_mcse"].values
    looked = np.isfinite(gap)
    assert looked.sum() == 256
    assert np.abs(gap - expected)[looked].max() <= 0.02 + 5 * error[looked].max()
    assert np.abs(found["gap_approximation"].values[looked]).max() <= 0.005
    np.testing.assert_allclose(
        found["gap_inference"], found["gap_amortization"] + found["gap_approximation"], atol=1e-9
    )
    assert (found["refined_converged"].values[looked] == 1).all()


def test_coverage_is_that_of_the_wrong_scale(checked):
    factor, found = checked
    levels = np.array([0.5, 0.8, 0.95])
    expected = 2 * norm.cdf(factor * norm.ppf((1 + levels) / 2)) - 1
    error = np.sqrt(expected * (1 - expected) / found.sizes["simulation"])
    for covered in found["coverage_z"].values.T:
        assert (np.abs(covered - expected) <= 4 * error + 0.01).all()


def test_contraction_and_scores_are_those_of_the_wrong_scale(checked):
    factor, found = checked
    np.testing.assert_allclose(found["contraction_z"], 1 - factor**2 / PRECISION, atol=0.05)
    np.testing.assert_allclose(found["z_score_z"].std("simulation"), 1 / factor, rtol=0.06)


def test_ranks_are_uniform_if_the_guide_is_right(checked):
    factor, found = checked
    for ranks in (found["tarp"].values, *abs(2 * found["pit_z"].values.T - 1)):
        assert (kstest(ranks, "uniform").pvalue > 1e-3) == (factor == 1)


def test_information_is_that_of_a_linear_channel(checked):
    """Of an exact guide half the logarithm of how much each latent's variance shrinks."""
    factor, found = checked
    if factor == 1:
        exact = np.log(PRECISION)
        assert abs(float(found["mutual_information"]) - exact) <= 0.15
        assert abs(float(found["aggregate_divergence"])) <= 0.2
    activity = 1 - factor**2 / (PRECISION - 1 + factor**2)
    np.testing.assert_allclose(found["activity_z"], activity, atol=0.05)


def test_novelty_is_a_valid_p_value():
    case = planted.healthy()
    new = planted.simulate(planted.ORTHOGONAL, NOISE, 1000)
    found = case.posterior.check(KEY, new, Novelty(case.reference))
    p = found.dataset["novelty"].values
    for level in (0.01, 0.05, 0.2):
        error = np.sqrt(level / len(new)) + np.sqrt(level / (len(case.reference) / 2))
        assert (p <= level).mean() <= level + 3 * error
    assert p.min() >= 2 / (len(case.reference) + 1) - 1e-9


def test_predictive_p_values_are_in_the_middle_if_the_model_is_right():
    case = planted.healthy()
    found = case.posterior.check(KEY, case.data, "predictive").dataset["predictive_p"]
    p = found.values[np.isfinite(found.values)]
    assert p.size == 256
    assert abs(p.mean() - 0.5) <= 0.05
    assert (np.minimum(p, 1 - p) < 0.05).mean() <= 0.1  # at most twice, and in fact less often


# -- draws that are added up as they come ---------------------------------------------------------


@pytest.mark.parametrize("number", [100, 250, 1000, 5300])
def test_sums_are_those_of_all_draws_at_once(number):
    rng = np.random.default_rng(0)
    log_weights = 2.0 * rng.standard_t(3, (number, 7)) - 5000
    sums = importance.Sums.start(7, psis.tail_length(number) + 1)
    for start in range(0, number, 700):
        sums = sums.add(jnp.asarray(log_weights[start : start + 700], jnp.float32))
    found = importance.summarize(jax.device_get(sums))
    exact = log_weights.astype(np.float32).astype(float)
    weights = np.exp(exact - exact.max(0))
    evidence = logsumexp(exact, axis=0) - np.log(number)
    relative = np.exp(exact - evidence)
    np.testing.assert_allclose(found["elbo"], exact.mean(0), atol=1e-3)
    np.testing.assert_allclose(
        found["elbo_mcse"], exact.std(0, ddof=1) / np.sqrt(number), rtol=1e-3
    )
    np.testing.assert_allclose(found["log_evidence"], evidence, atol=1e-3)
    np.testing.assert_allclose(
        found["log_evidence_mcse"], relative.std(0, ddof=1) / np.sqrt(number), rtol=1e-3
    )
    np.testing.assert_allclose(found["ess"], weights.sum(0) ** 2 / (weights**2).sum(0), rtol=1e-3)
    np.testing.assert_allclose(found["khat"], pareto_khat(exact), atol=1e-3)


def test_khat_of_the_tail_is_that_of_arviz_for_all_weights():
    from arviz_stats.base import array_stats

    log_weights = np.random.default_rng(0).standard_t(4, (3000, 5))
    expected = array_stats.psislw(-log_weights.T, axis=-1)[1]
    np.testing.assert_allclose(pareto_khat(log_weights), expected, rtol=1e-6)


def test_a_hundred_thousand_draws_are_kept_as_their_tail():
    case = planted.healthy()
    found = case.posterior.check(KEY, case.data[:3], Importance(num_samples=100_000))
    assert found.dataset["ess"].values.min() > 99_000
    assert found.dataset.attrs["khat_threshold"] == khat_threshold(100_000)
    assert psis.tail_length(100_000) == 948
