"""The log density of global latents, by NumPyro's own of the model without its locals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from marginals import (
    CASES,
    GROUP,
    KEY,
    NUM_DRAWS,
    X,
    found_and_draws,
    grouped,
    grouped_alone,
    hierarchical,
    normal,
    normal_alone,
    of_any_guide,
    untrained,
    without_locals,
)
from numpyro import handlers
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from scipy import stats

from numpyro_vae.checks import NotApplicableError
from numpyro_vae.inference.marginal import log_density


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_density_of_the_globals_is_that_of_the_model_without_its_locals(case):
    model, marginal, options = CASES[case]
    found, draws = found_and_draws(untrained(model, X, **options), X)
    error = found.values - without_locals(marginal, draws, X)
    # A level that all draws share does not change their weights.
    assert abs(error.mean()) <= 0.1 + 4 * found.errors.std()
    assert error.std() <= 0.01 + 2 * found.noise
    assert found.noise <= 0.6


def test_the_density_of_globals_of_groups():
    posterior = untrained(
        grouped,
        X,
        GROUP,
        batch_axes=None,
        plate="group",
        inputs=lambda x, group: jnp.zeros((3, 1)),
        segments={"data": lambda x, group: group},
    )
    found, draws = found_and_draws(posterior, (X, GROUP), particles=1024)
    error = found.values - without_locals(grouped_alone, draws, X, GROUP)
    assert error.std() <= 0.01 + 3 * found.noise
    assert found.noise <= 0.3


def test_the_noise_is_that_of_other_random_numbers():
    posterior = untrained(normal, X)
    runner, rows = posterior._runner, posterior._runner.read(X)
    draws, _ = runner.weigh_globals(KEY, rows, NUM_DRAWS)
    exact = without_locals(normal_alone, draws, X)
    found = [log_density(runner, rows, jax.random.key(seed), draws, 16) for seed in range(40)]
    errors = np.array([one.values - exact for one in found])
    noise = np.sqrt(errors.var(1).mean())
    told = np.sqrt(np.mean([one.noise**2 for one in found]))
    np.testing.assert_allclose(told, noise, rtol=0.35)
    assert abs(errors.mean()) <= 4 * errors.std() / np.sqrt(40)  # and there is no bias


def test_the_density_is_the_same_in_parts(monkeypatch):
    posterior = untrained(normal, X)
    whole, _ = found_and_draws(posterior, X, 16)
    monkeypatch.setattr("numpyro_vae.inference.marginal.CHUNK", 16)
    parts, _ = found_and_draws(posterior, X, 16)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-5)


def test_globals_of_unlike_scales_have_no_density():
    def unlike(x):
        with handlers.scale(scale=2.0):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
        normal(x)

    with pytest.raises(ValueError, match=r"unlike factors, \[1\.0, 2\.0\].*one handlers\.scale"):
        found_and_draws(untrained(unlike, X), X)


# -- the guides of the global sites ---------------------------------------------------------------

AUTOS = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "full rank": AutoMultivariateNormal,
    "low rank": partial(AutoLowRankMultivariateNormal, rank=1),
    "iaf": partial(AutoIAFNormal, num_flows=1, hidden_dims=[4]),
    "bnaf": partial(AutoBNAFNormal, num_flows=1, hidden_factors=[4]),
}


def half_as_wide(family, values, normal):
    return family(jnp.median(normal), normal.std() / 2).log_prob(values)


@pytest.mark.slow
@pytest.mark.parametrize("auto", AUTOS)
def test_draws_come_with_their_log_density(auto):
    """Weighed by a known density, they have its evidence: the mean of p / q is one."""
    posterior = untrained(normal, X, global_guide=AUTOS[auto])
    runner = posterior._runner
    draws, log_q = runner.weigh_globals(KEY, runner.read(X), 4000)
    log_p = half_as_wide(dist.Normal, draws["mu"], draws["mu"])
    log_p += half_as_wide(dist.LogNormal, draws["tau"], jnp.log(draws["tau"]))
    weights = np.exp(np.asarray(log_p - log_q, float))
    assert weights.mean() == pytest.approx(1.0, abs=4 * weights.std() / np.sqrt(4000))
    assert weights.std() < 5


def test_the_density_of_a_normal_guide_is_the_normals():
    posterior = untrained(normal, X)
    draws, log_q = posterior._runner.weigh_globals(KEY, posterior._runner.read(X), 5)
    at = {name: float(posterior.params[f"{name}_auto_loc"]) for name in ("mu", "tau")}
    expected = stats.norm(at["mu"], 0.1).logpdf(draws["mu"])
    expected += stats.lognorm(0.1, scale=np.exp(at["tau"])).logpdf(draws["tau"])
    np.testing.assert_allclose(log_q, expected, rtol=1e-4)


def half_a_point(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(handlers.block(model, hide=["tau"])))
    guide.append(AutoDelta(handlers.block(model, hide=["mu"]), prefix="point"))
    return guide


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "names"), [(AutoDelta, r"\['mu', 'tau'\]"), (half_a_point, r"\['tau'\]")]
)
def test_a_point_has_no_density(make, names):
    posterior = untrained(normal, X, global_guide=make)
    with pytest.raises(NotApplicableError, match=rf"global sites {names} is .*, a point without"):
        posterior.check(KEY, X, "globals", progress_bar=False)
    report = posterior.check(KEY, X, "all", progress_bar=False)
    assert "a point without a density" in report.skipped["globals"]


@pytest.mark.slow
def test_a_guide_of_all_latents_has_their_density():
    """Where rows have no posteriors of their own all latents are weighed, at NumPyro's density."""
    posterior = of_any_guide(AutoMultivariateNormal, 20)
    runner = posterior._runner
    rows = runner.read(X)
    draws, log_q = runner.weigh_globals(KEY, rows, 5)
    assert set(draws) == {"mu", "z"}
    found = log_density(runner, rows, KEY, draws, 16)
    np.testing.assert_allclose(found.values, without_locals(hierarchical, draws, X), rtol=1e-5)
    fn = posterior.guide.guide.get_posterior(posterior.params)
    packed = jnp.concatenate([draws["mu"][:, None], draws["z"]], axis=1)
    np.testing.assert_allclose(log_q, fn.log_prob(packed), rtol=1e-4)
