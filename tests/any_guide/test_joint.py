"""Guides that draw all rows at once, and models without latents of rows."""

import warnings

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDAIS,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoSemiDAIS,
)
from numpyro.infer.util import log_density
from scipy.stats import norm

from numpyro_vae import Posterior
from tests.models import NOISE, hierarchical_model

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
DESIGN = RNG.normal(size=(80, 3)).astype(np.float32)
Y = (DESIGN @ [1.0, 0.0, -1.0] + 0.5 * RNG.normal(size=80)).astype(np.float32)
DATA = (DESIGN, Y)
QUIET = {"progress_bar": False}


def regression(design, y=None):
    """Without a plate: the observed site has a batch."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(design @ slope, 0.5), obs=y)


def in_a_plate(design, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("data", len(design)):
        numpyro.sample("y", dist.Normal(design @ slope, 0.5), obs=y)


def elpd(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of k-hats, of so few draws
        return az.loo(tree).elpd


def exact(design, y):
    """The mean and the covariance of the slopes, and the log evidence."""
    design, y = design.astype(float), y.astype(float)
    covariance = np.linalg.inv(np.eye(3) + design.T @ design / 0.25)
    marginal = 0.25 * np.eye(len(y)) + design @ design.T
    evidence = dist.MultivariateNormal(jnp.zeros(len(y)), jnp.asarray(marginal)).log_prob(y)
    return covariance @ design.T @ y / 0.25, covariance, float(evidence)


def exact_posterior(model, **wrong):
    loc, covariance, _ = exact(*DATA)
    params = {"auto_loc": loc, "auto_scale_tril": np.linalg.cholesky(covariance)} | wrong
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    return Posterior(AutoMultivariateNormal(model), params)


@pytest.mark.parametrize("model", [regression, in_a_plate])
class TestWithoutLatentsOfRows:
    def test_the_exact_guide_passes_and_its_evidence_is_exact(self, model):
        report = exact_posterior(model).check(KEY, DATA, **QUIET)
        assert [finding.ok for finding in report.findings] == [True] * len(report.findings)
        assert "globals" in str(report)

    def test_the_tree_has_numpyros_own_log_likelihood(self, model):
        posterior = exact_posterior(model)
        tree = posterior.to_datatree(KEY, DATA, 50)
        draws = {"slope": tree.posterior["slope"].values[0]}
        expected = log_likelihood(model, draws, *DATA)["y"]
        np.testing.assert_allclose(tree.log_likelihood["y"].values[0], expected, atol=1e-4)
        dim = "data" if model is in_a_plate else "y_dim_0"
        assert tree.log_likelihood["y"].dims == ("chain", "draw", dim)
        assert set(tree.constant_data) == {"design"}
        assert np.isfinite(elpd(tree))

    def test_arviz_corrects_for_a_wrong_guide(self, model):
        """Leave-one-out with `log_p` and `log_q` is that of the exact posterior."""
        loc, covariance, _ = exact(*DATA)
        wide, moved = 1.4 * np.linalg.cholesky(covariance), loc + np.sqrt(np.diag(covariance))
        wrong = exact_posterior(model, auto_scale_tril=wide, auto_loc=moved)
        tree = wrong.to_datatree(KEY, DATA, 4000)
        stats = tree.sample_stats
        found = az.loo_approximate_posterior(tree, stats["log_p"], stats["log_q"])
        expected = 0.0
        for row in range(len(Y)):
            others = np.arange(len(Y)) != row
            loc, covariance, _ = exact(DESIGN[others], Y[others])
            sd = np.sqrt(0.25 + DESIGN[row] @ covariance @ DESIGN[row])
            expected += norm.logpdf(Y[row], DESIGN[row] @ loc, sd)
        assert found.elpd == pytest.approx(expected, abs=0.15)
        assert abs(elpd(tree) - expected) > 0.5

    def test_predictions(self, model):
        predicted = exact_posterior(model).predict(KEY, DATA, 4000)["y"]
        loc, *_ = exact(*DATA)
        np.testing.assert_allclose(predicted.mean(0), DESIGN @ loc, atol=0.05)
        others = exact_posterior(model).predict(KEY, (DESIGN[:5], np.zeros(5, np.float32)), 4000)
        np.testing.assert_allclose(others["y"].mean(0), DESIGN[:5] @ loc, atol=0.05)

    def test_a_guide_that_is_too_narrow_is_flagged_and_repaired(self, model):
        loc, covariance, _ = exact(*DATA)
        wrong = exact_posterior(model, auto_scale_tril=0.4 * np.linalg.cholesky(covariance))
        report = wrong.check(KEY, DATA, **QUIET)
        assert not all(finding.ok for finding in report.findings)
        repaired = wrong.repair_globals(KEY, DATA, num_samples=2000)
        draws = repaired.draws["slope"]
        sd = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose((draws.mean(0) - loc) / sd, 0, atol=0.1)
        np.testing.assert_allclose(draws.std(0) / sd, 1, rtol=0.08)

    def test_what_is_of_rows_is_refused_with_the_reason(self, model):
        posterior = exact_posterior(model)
        for call in (
            lambda: posterior.check(KEY, DATA, "importance", **QUIET),
            lambda: posterior.log_weights(KEY, DATA, 3),
            lambda: posterior.repair(KEY, DATA, [0]),
        ):
            with pytest.raises(ValueError, match="no latent sites in a plate"):
                call()


def test_a_mean_field_guide_of_correlated_slopes():
    design = RNG.normal(size=(80, 1)) + 0.3 * RNG.normal(size=(80, 3))
    data = (design.astype(np.float32), Y)
    guide = AutoNormal(regression)
    svi = SVI(regression, guide, optax.adam(1e-2), Trace_ELBO(8))
    result = svi.run(KEY, 2000, *data, progress_bar=False)
    posterior = Posterior(guide, result)
    assert not all(f.ok for f in posterior.check(KEY, data, **QUIET).findings)
    loc, covariance, _ = exact(*data)
    draws = posterior.repair_globals(KEY, data, num_samples=2000).draws["slope"]
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((draws.mean(0) - loc) / sd, 0, atol=0.1)
    np.testing.assert_allclose(draws.std(0) / sd, 1, rtol=0.08)


X = RNG.normal(1.0, 1.2, 15).astype(np.float32)


def exact_rows():
    """The posterior of ``hierarchical_model``: of ``mu``, then of each row's ``z``."""
    number = len(X)
    precision = np.eye(1 + number) * (1 + 1 / NOISE**2)
    precision[0, 0] = 1 + number
    precision[0, 1:] = precision[1:, 0] = -1
    covariance = np.linalg.inv(precision)
    return covariance @ np.concatenate([[0.0], X / NOISE**2]), covariance


class TestRowsDrawnJointly:
    @pytest.fixture(scope="class")
    @classmethod
    def posterior(cls):
        loc, covariance = exact_rows()
        params = {"auto_loc": loc, "auto_scale_tril": np.linalg.cholesky(covariance)}
        params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
        return Posterior(AutoMultivariateNormal(hierarchical_model), params)

    @pytest.mark.slow
    def test_draws_and_predictions(self, posterior):
        draws, (loc, covariance) = posterior.sample(KEY, X, 4000), exact_rows()
        np.testing.assert_allclose(draws["z"].mean(0), loc[1:], atol=0.05)
        np.testing.assert_allclose(draws["z"].std(0), np.sqrt(np.diag(covariance))[1:], rtol=0.06)
        correlation = np.corrcoef(draws["mu"], draws["z"][:, 0])[0, 1]
        expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        np.testing.assert_allclose(correlation, expected, atol=0.06)
        assert posterior.predict(KEY, X, 5)["x"].shape == (5, 15)

    def test_the_whole_passes_its_check(self, posterior):
        report = posterior.check(KEY, X, **QUIET)
        assert all(finding.ok for finding in report.findings)

    def test_the_log_likelihood_is_given_the_rows_latents(self, posterior):
        tree = posterior.to_datatree(KEY, X, 20)
        z = tree.posterior["z"].values[0]
        expected = dist.Normal(z, NOISE).log_prob(X)
        np.testing.assert_allclose(tree.log_likelihood["x"].values[0], expected, atol=1e-4)

    def test_the_densities_of_the_draws_are_numpyros(self, posterior):
        tree = posterior.to_datatree(KEY, X, 20)
        for number in (0, 7):
            draw = tree.posterior.isel(chain=0, draw=number)
            values = {name: jnp.asarray(draw[name].values) for name in ("mu", "z")}
            log_p, _ = log_density(hierarchical_model, (X,), {}, values)
            loc, covariance = exact_rows()
            latents = np.append(values["mu"], values["z"])
            log_q = dist.MultivariateNormal(loc, covariance).log_prob(latents)
            found = tree.sample_stats.isel(chain=0, draw=number)
            np.testing.assert_allclose(found["log_p"], log_p, atol=1e-3)
            np.testing.assert_allclose(found["log_q"], log_q, atol=1e-3)

    def test_other_rows_are_refused(self, posterior):
        for other in (X[:9], np.concatenate([X, X])):
            with pytest.raises(ValueError, match="rows"):
                posterior.sample(KEY, other, 2)

    def test_rows_have_no_posteriors_of_their_own(self, posterior):
        with pytest.raises(ValueError, match=r"jointly for all rows, from \['_auto_latent'\]"):
            posterior.check(KEY, X, "importance", **QUIET)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        AutoLaplaceApproximation,
        AutoLowRankMultivariateNormal,
        AutoIAFNormal,
        AutoBNAFNormal,
        AutoDAIS,
        AutoSemiDAIS,
    ],
)
def test_every_guide_of_the_whole(make):
    options = [hierarchical_model]
    if make is AutoSemiDAIS:

        def local_model(mu):
            with numpyro.plate("data", len(X)):
                z = numpyro.sample("z", dist.Normal(mu, 1.0))
                numpyro.sample("x", dist.Normal(z, NOISE), obs=X)

        def global_model(x):
            return numpyro.sample("mu", dist.Normal(0.0, 1.0))

        def model(x):
            local_model(global_model(x))

        guide = AutoSemiDAIS(model, local_model, AutoNormal(global_model))
        options = [model]
    else:
        small = {"hidden_factors": [2]} if make is AutoBNAFNormal else {}
        guide = make(hierarchical_model, **small)
    svi = SVI(options[0], guide, optax.adam(3e-2), Trace_ELBO())
    posterior = Posterior(guide, svi.run(KEY, 600, X, progress_bar=False))
    draws, (loc, covariance) = posterior.sample(KEY, X, 500), exact_rows()
    np.testing.assert_allclose(draws["mu"].mean(), loc[0], atol=2 * covariance[0, 0] ** 0.5)
    np.testing.assert_allclose(draws["z"].mean(0), loc[1:], atol=0.7)
    tree = posterior.to_datatree(KEY, X, 100)
    assert np.isfinite(elpd(tree))
    assert posterior.check(KEY, X, "globals", **QUIET).dataset["globals_khat"].notnull().all()


def test_the_covariates_of_rows_drawn_jointly_are_constant_data():
    def model(x, offset):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(offset, 1.0))
            numpyro.sample("x", dist.Normal(z, NOISE), obs=x)

    loc, scale_tril = jnp.zeros(len(X)), jnp.eye(len(X))
    params = {"auto_loc": loc, "auto_scale_tril": scale_tril}
    posterior = Posterior(AutoMultivariateNormal(model), params)
    tree = posterior.to_datatree(KEY, (X, 3 * X), 5)
    assert set(tree.constant_data) == {"offset"}
    assert tree.constant_data["offset"].dims == ("data",)
    np.testing.assert_array_equal(tree.constant_data["offset"], 3 * X)
    assert set(tree.observed_data) == {"x"}


class TestImpossibleRows:
    """What draws all rows jointly computes nothing by row, and tells of them all the same."""

    @pytest.fixture(scope="class")
    @classmethod
    def posterior(cls):
        def model(x, offset):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(offset, 1.0))
                numpyro.sample("x", dist.Poisson(jnp.exp(z)), obs=x)

        params = {"auto_loc": jnp.zeros(len(X)), "auto_scale_tril": jnp.eye(len(X))}
        return Posterior(AutoMultivariateNormal(model), params)

    @pytest.mark.parametrize("method", ["sample", "predict", "to_datatree"])
    @pytest.mark.parametrize("argument", [0, 1])
    def test_are_told_once(self, posterior, method, argument):
        data = [np.arange(15.0) % 4, np.zeros(15)]
        call = getattr(posterior, method)
        call(KEY, tuple(data), 3)
        data[argument][3] = [0.5, np.nan][argument]
        rows = r"1 of 15 rows of plate 'data' \(rows \[3\]"
        message = rf"{['outside the support of its Poisson', 'not numbers'][argument]} in {rows}"
        with pytest.warns(UserWarning, match=message) as told:
            call(KEY, tuple(data), 3)
        assert len(told) == 1

    def test_draws_that_are_not_numbers_are_told(self):
        def guide(x):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(jnp.log(x + 2), 0.45))
            numpyro.sample("mu", dist.Normal(jnp.nanmean(z), 1.0))

        posterior = Posterior(guide, {}, model=hierarchical_model)
        low = np.where(np.arange(15) == 3, -5.0, X)
        for method in (posterior.sample, posterior.predict):
            with pytest.warns(UserWarning, match=r"not numbers in 1 of 15 .*rows \[3\]"):
                method(KEY, low, 3)


def test_a_guide_that_turns_the_model_around():
    """The mean given the rows' latents: it can only be had as a whole."""

    def guide(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.8 * x, 0.45))
        number = len(x)
        numpyro.sample("mu", dist.Normal(z.sum() / (1 + number), (1 + number) ** -0.5))

    posterior = Posterior(guide, {}, model=hierarchical_model)
    assert posterior.sample(KEY, X, 10)["z"].shape == (10, 15)
    with pytest.raises(ValueError, match=r"global sites \['mu'\] given the local ones"):
        posterior.log_weights(KEY, X, 3)
    report = posterior.check(KEY, X, **QUIET)
    assert report.dataset["globals_khat"].notnull()


def test_numpyros_predictive_draws_the_same_from_the_same_distribution():
    posterior = exact_posterior(in_a_plate)
    theirs = Predictive(in_a_plate, posterior.sample(KEY, DATA, 4000))(KEY, DESIGN)["y"]
    ours = posterior.predict(KEY, DATA, 4000)["y"]
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.05)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.06)


def test_nothing_to_tell_apart():
    def model(y):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"Put numpyro\.plate around the observed site"):
        Posterior(AutoNormal(model), {}, batch_axes=None).sample(KEY, jnp.array(1.0), 2)
