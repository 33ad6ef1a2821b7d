"""The weights of global latents, and the verdicts on their guide."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi, train
from marginals import KEY, LINEAR, NUM_DATA, X, hierarchical, of_any_guide, untrained
from numpyro.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
)
from scipy import stats

from numpyro_vae import (
    AutoAmortizedNormal,
    Globals,
    Posterior,
    fit,
)
from numpyro_vae.checks import NotApplicableError
from numpyro_vae.inference.global_weights import GlobalWeights
from numpyro_vae.inference.marginal import LogDensity

# -- weights --------------------------------------------------------------------------------------


def test_moments_of_weighted_draws_and_their_errors():
    """Draws of N(0, 1) for N(0.3, 1.2^2): repeated, the errors are those that are told."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        z = rng.normal(size=(1000, 1))
        target = stats.norm(0.3, 1.2).logpdf(z[:, 0])
        slope = rng.normal(size=(33, 1)) * 0.05  # an error of the density that tilts it
        density = LogDensity(target + slope[0] * z[:, 0], slope[1:] * z[:, 0], 16)
        weights = GlobalWeights.of({"z": z}, density, stats.norm.logpdf(z[:, 0]), KEY)
        found.append(np.ravel(weights.changes()["z"]))
    shift, shift_mcse, ratio, ratio_mcse = np.transpose(found)
    assert shift.mean() == pytest.approx(0.3, abs=0.02)
    assert ratio.mean() == pytest.approx(1.2, abs=0.03)  # a little less, as tails are cut
    np.testing.assert_allclose(np.median(shift_mcse), shift.std(), rtol=0.2)
    np.testing.assert_allclose(np.median(ratio_mcse), ratio.std(), rtol=0.3)


def test_no_draw_with_a_density_is_an_error():
    density = LogDensity(np.full(1000, -np.inf), np.zeros((32, 1000)), 16)
    with pytest.raises(ValueError, match="No draw of the global sites has a finite"):
        GlobalWeights.of({"z": np.zeros((1000, 1))}, density, np.zeros(1000), KEY)


# -- verdicts -------------------------------------------------------------------------------------


def judged(**options):
    guide = AutoAmortizedNormal(hierarchical, LINEAR, **options)
    posterior = train(guide, X, steps=1500, particles=8, rate=1e-2)
    return posterior, posterior.check(KEY, X, "globals", progress_bar=False)


def test_a_mean_field_guide_is_flagged():
    _, report = judged()
    told = [finding for finding in report.findings if "'mu'" in finding.text]
    assert [finding.ok for finding in told] == [False]
    assert "posterior.repair_globals(rng_key, data)" in str(report)
    exact = np.sqrt((1 + NUM_DATA) / (1 + NUM_DATA / 2))  # 1.41, of which tails are cut
    assert 1.15 < float(report.dataset["globals_ratio_mu"]) < exact + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("global_guide", [AutoNormal, AutoMultivariateNormal])
def test_an_exact_guide_is_not(global_guide, tmp_path):
    posterior, report = judged(condition_on=("mu",), global_guide=global_guide)
    assert all(finding.ok for finding in report.findings)
    assert report.dataset["globals_khat"] < 0.5
    assert report.dataset["globals_ess"] > 950
    assert report.dataset["globals_particles"] == 16
    np.testing.assert_allclose(report.dataset["globals_ratio_mu"], 1.0, atol=0.1)
    report.save(tmp_path / "report.png")
    tree = report.add_to(posterior.to_datatree(KEY, X, 10))
    assert "globals_khat" in tree["checks"]


def test_a_site_of_several_values_has_their_dimensions():
    def wide(x):
        with numpyro.plate("side", 2):
            numpyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        hierarchical(x)

    report = untrained(wide, X, plate="data").check(KEY, X, Globals(200), progress_bar=False)
    assert report.dataset["globals_shift_a"].dims == ("side", "a_dim_0")
    assert "at most, of 6 values" in str(report)


def test_it_is_about_the_rows_of_the_fit():
    svi = make_svi(hierarchical)
    posterior = Posterior(svi.guide, fit(svi, KEY, X, num_epochs=2, progress_bar=False))
    message = "was trained on 40 rows, and these are 30; pass the rows that it was trained on"
    with pytest.raises(NotApplicableError, match=message):
        posterior.check(KEY, X[:30], "globals", progress_bar=False)
    posterior.check(KEY, X, Globals(200), progress_bar=False)


def test_a_model_without_globals_has_none_to_judge():
    def alone(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    posterior = untrained(alone, X)
    with pytest.raises(NotApplicableError, match="no latent sites outside plate 'data'"):
        posterior.check(KEY, X, "globals", progress_bar=False)
    assert not posterior.check(KEY, X, progress_bar=False).skipped


def test_the_quick_checks_say_that_globals_are_not_judged():
    report = untrained(hierarchical, X).check(KEY, X, progress_bar=False)
    assert "pass checks='globals'" in report.skipped["globals"]


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 100 draws"):
        Globals(num_samples=50)


def test_discrete_globals_are_not_judged():
    def discrete(x):
        kind = numpyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        mu = numpyro.sample("mu", dist.Normal(3.0 * kind, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(NotApplicableError, match=r"discrete sites \['kind'\] outside plate 'data'"):
        untrained(discrete, X).check(KEY, X, "globals", progress_bar=False)


# -- guides that are not amortized -----------------------------------------------------------------


def test_a_mean_field_guide_of_all_sites_is_flagged():
    report = of_any_guide(AutoNormal).check(KEY, X, "globals", progress_bar=False)
    found = next(finding for finding in report.findings if "'mu'" in finding.text)
    assert not found.ok
    assert found.advice.startswith("train longer, take a richer guide, or call posterior.repair")
