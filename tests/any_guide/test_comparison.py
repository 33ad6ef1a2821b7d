"""Guides beside each other, and beside MCMC."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from numpyro.infer.importance import psis_diagnostic
from scipy import stats

from numpyro_vae import Importance, Posterior, Reference, compare, plot_comparison
from tests.models import EXACT, hierarchical_model, normal_model

KEY = jax.random.key(0)
X = EXACT["normal-normal"]().data[:50]
QUIET = {"progress_bar": False}
VARIANCE = 0.2  # of the exact posterior


def guide(x, shift=0.0, factor=1.0):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0.8 * x + shift, factor * VARIANCE**0.5))


def bounded(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("near", jnp.where(jnp.abs(z) < 20, 0.0, -jnp.inf))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def posterior_of(**wrong):
    return Posterior(partial(guide, **wrong), {}, model=normal_model)


def exact_draws(number=4000):
    rng = np.random.default_rng(0)
    return {"z": 0.8 * X + VARIANCE**0.5 * rng.normal(size=(4, number // 4, len(X)))}


class TestReference:
    @pytest.mark.parametrize(
        ("wrong", "error", "ratio"),
        [({}, 0, 1), ({"shift": 0.5}, 0.5 / VARIANCE**0.5, 1), ({"factor": 0.5}, 0, 0.5)],
    )
    def test_errors_are_those_that_were_made(self, wrong, error, ratio):
        check = Reference(exact_draws(), num_samples=4000)
        report = posterior_of(**wrong).check(KEY, X, check, **QUIET)
        found = report.dataset
        np.testing.assert_allclose(found["mean_error_z"], error, atol=0.12)
        np.testing.assert_allclose(found["sd_ratio_z"], ratio, rtol=0.06)
        apart = error if error else abs(1 - ratio) * np.sqrt(2 / np.pi)
        np.testing.assert_allclose(found["wasserstein_z"], apart, atol=0.12)
        assert all(finding.ok for finding in report.findings) is not bool(wrong)
        assert found["mean_error_z"].dims == ("data",)

    @pytest.mark.slow
    def test_an_mcmc_run_and_a_guide_of_the_whole(self):
        mcmc = MCMC(NUTS(hierarchical_model), num_warmup=300, num_samples=1200, **QUIET)
        x = X[:12]
        mcmc.run(jax.random.key(1), x)
        exact = AutoMultivariateNormal(hierarchical_model)
        precision = np.block([[1 + 12, -np.ones((1, 12))], [-np.ones((12, 1)), 5 * np.eye(12)]])
        covariance = np.linalg.inv(precision.astype(float))
        loc = covariance @ np.concatenate([[0.0], 4 * x])
        params = {"auto_loc": loc, "auto_scale_tril": np.linalg.cholesky(covariance)}
        params = {name: np.float32(value) for name, value in params.items()}
        report = Posterior(exact, params).check(KEY, x, Reference(mcmc), **QUIET)
        assert abs(report.dataset["mean_error_mu"]) < 0.25
        assert abs(report.dataset["mean_error_z"]).max() < 0.25
        assert [f.ok for f in report.findings if "values of site" in f.text] == [True, True]

    def test_a_reference_that_has_not_converged_is_not_trusted(self):
        draws = exact_draws()["z"] + np.arange(4)[:, None, None]
        report = posterior_of().check(KEY, X, Reference({"z": draws}), **QUIET)
        assert any("r-hats" in finding.text for finding in report.findings)

    def test_one_chain_has_an_r_hat_too(self):
        drifting = exact_draws()["z"].reshape(1, 4000, -1) + np.linspace(0, 2, 4000)[None, :, None]
        report = posterior_of().check(KEY, X, Reference({"z": drifting}), **QUIET)
        assert any("r-hats" in finding.text for finding in report.findings)

    def test_it_has_a_picture(self, tmp_path):
        report = posterior_of().check(KEY, X, Reference(exact_draws()), **QUIET)
        report.save(tmp_path / "report.html")
        assert "reference" in (tmp_path / "report.html").read_text()

    @pytest.mark.parametrize(
        ("draws", "message"),
        [({"w": np.zeros((2, 3))}, "no draws of the sites"), ({"z": np.zeros((2, 9, 7))}, "shape")],
    )
    def test_other_draws_are_refused(self, draws, message):
        with pytest.raises(ValueError, match=message):
            posterior_of().check(KEY, X, Reference(draws), **QUIET)

    def test_an_mcmc_that_was_not_run(self):
        mcmc = MCMC(NUTS(normal_model), num_warmup=1, num_samples=1)
        with pytest.raises(ValueError, match="Run it first"):
            posterior_of().check(KEY, X, Reference(mcmc), **QUIET)

    def test_what_is_no_reference(self):
        with pytest.raises(TypeError, match="expected a numpyro"):
            Reference(3.0)


class TestCompare:
    @pytest.mark.slow
    def test_bounds_gaps_and_verdicts(self):
        wrong = {"exact": {}, "shifted": {"shift": 0.5}, "narrow": {"factor": 0.2}}
        posteriors = {name: posterior_of(**how) for name, how in wrong.items()}
        found = compare(posteriors, KEY, X, (Importance(2000), "gap"))
        table = found.table
        kl = {
            "exact": 0.0,
            "shifted": 0.125 / VARIANCE,
            "narrow": -np.log(0.2) + 0.04 / 2 - 0.5,
        }
        assert table.index.tolist() == sorted(kl, key=kl.get)
        np.testing.assert_allclose(table["elbo_diff"], sorted(kl.values()), atol=0.02)
        np.testing.assert_allclose(table["gap_amortization"], sorted(kl.values()), atol=0.03)
        evidence = stats.norm(0, 1.25**0.5).logpdf(X).mean()
        np.testing.assert_allclose(table.loc["exact", "log_evidence"], evidence, atol=1e-4)
        assert table.loc["exact", "fine"] == 1
        assert table.loc["narrow", "fine"] == 0
        assert (table["dse"] < 0.02).all()
        assert "shifted" in str(found)
        assert len(plot_comparison(found).get_yticks()) == 3

    @pytest.mark.slow
    def test_a_guide_of_the_whole_beside_one_of_rows(self):
        """The same distribution, said of the whole and by row, has the same bound and k-hat."""
        loc, scale = 0.8 * X + 0.2, np.full(len(X), 1.2 * VARIANCE**0.5)
        params = {"auto_loc": loc, "auto_scale_tril": np.diag(scale)}
        params = {name: np.float32(value) for name, value in params.items()}
        whole = Posterior(AutoMultivariateNormal(normal_model), params)
        by_row = posterior_of(shift=0.2, factor=1.2)
        found = compare({"exact": posterior_of(), "rows": by_row, "whole": whole}, KEY, X)
        table = found.table
        evidence = stats.norm(0, 1.25**0.5).logpdf(X).mean()
        kl = 0.04 / 2 / VARIANCE + (1.44 - 1) / 2 - np.log(1.2)
        np.testing.assert_allclose(table.loc["exact", "joint_elbo"], evidence, atol=1e-4)
        for name in ("rows", "whole"):
            bound = table.loc[name]
            error = 4 * bound["joint_mcse"]
            np.testing.assert_allclose(bound["joint_elbo"], evidence - kl, atol=error)
            np.testing.assert_allclose(bound["joint_diff"], kl, atol=error)
            assert error < 0.1 * kl
        assert table.loc["exact", "joint_khat"] == -np.inf
        rows = ["elbo", "elbo_diff", "dse", "log_evidence", "fine", "reliable", "bad"]
        assert table.loc["whole", rows].isna().all()
        assert table.drop("whole").notna().to_numpy().all()
        assert "whole: The rows have no posteriors of their own" in str(found)
        assert "globals_khat" in found.reports["whole"].dataset
        ax = plot_comparison(found)
        assert [label.get_text() for label in ax.get_yticklabels()] == list(table.index)
        assert any("all rows jointly, k-hat" in text.get_text() for text in ax.texts)

    @pytest.mark.slow
    def test_the_bound_of_the_whole_is_numpyros(self):
        """With a global site, whose guide is part of the bound."""

        def guide(x):
            mu = numpyro.sample("mu", dist.Normal(0.1, 0.4))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(0.8 * x + 0.1 * mu, 0.5))

        posterior, x = Posterior(guide, {}, model=hierarchical_model), X[:8]
        found = compare({"one": posterior}, KEY, x).table.loc["one"]
        loss = Trace_ELBO(num_particles=4000).loss(KEY, {}, hierarchical_model, guide, x)
        atol = 5 * found["joint_mcse"]
        np.testing.assert_allclose(found["joint_elbo"], -loss / len(x), atol=atol)
        of_global = 0.5 * (0.4**2 + 0.1**2 - 1) - np.log(0.4)  # the divergence, of all rows at once
        given = found["elbo"] - of_global / len(x)
        np.testing.assert_allclose(found["joint_elbo"], given, atol=atol)
        assert of_global / len(x) > atol
        stated = psis_diagnostic(KEY, {}, hierarchical_model, guide, x, num_particles=4000)
        assert abs(found["joint_khat"] - stated) < 0.35

    def test_points_have_no_place(self):
        point = Posterior(AutoDelta(normal_model), {"z_auto_loc": np.zeros_like(X)})
        found = compare({"exact": posterior_of(), "point": point}, KEY, X)
        assert found.table.index.tolist() == ["exact"]
        assert "point: The guide is a point at the local sites ['z']" in str(found)

    def test_a_guide_without_weights_has_a_row_and_the_others_stay(self):
        far = Posterior(partial(guide, shift=50.0), {}, model=bounded)
        both = {"far": far, "exact": Posterior(guide, {}, model=bounded)}
        found = compare(both, KEY, X)
        table = found.table
        assert table.index.tolist() == ["exact", "far"]
        assert table.loc["far", ["joint_elbo", "joint_diff"]].tolist() == [-np.inf, np.inf]
        assert table.loc["far", ["fine", "reliable", "bad"]].tolist() == [0, 0, 1]
        assert table.loc["far", ["elbo", "elbo_diff", "dse", "log_evidence"]].isna().all()
        alone = compare({"exact": both["exact"]}, KEY, X).table
        kept = table.columns != "seconds"
        np.testing.assert_array_equal(table.loc["exact", kept], alone.loc["exact", kept])
        assert "far: No row is to be trusted" in str(found)
        assert "50 rows have zero importance weight everywhere" in str(found)
        assert "not to be trusted      50  (100.0%)" in str(found.reports["far"])
        assert found.reports["far"].flagged_of(far._runner.read(X).fingerprint).size == 50
        assert len(plot_comparison(found).get_yticks()) == 2

    def test_a_guide_that_cannot_be_checked_is_named_and_the_others_stay(self):
        other = Posterior(AutoDelta(normal_model), {"z_auto_loc": np.zeros(30, np.float32)})
        found = compare({"other": other, "exact": posterior_of()}, KEY, X)
        assert found.table.index.tolist() == ["exact"]
        with pytest.raises(ValueError, match="30") as alone:
            compare({"other": other}, KEY, X)
        assert found.skipped == {"other": str(alone.value)}

    def test_global_points_leave_the_rows(self):
        def guide(x):
            mu = numpyro.sample("mu", dist.Delta(0.3))
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(0.8 * x + 0.2 * mu, VARIANCE**0.5))

        found = compare({"one": Posterior(guide, {}, model=hierarchical_model)}, KEY, X)
        assert np.isnan(found.table.loc["one", "joint_elbo"])
        assert found.table.loc["one", "fine"] == 1
        assert "the global sites ['mu'] is guide, a point" in found.skipped["one"]
        assert len(plot_comparison(found).get_yticks()) == 1

    @pytest.mark.slow
    def test_a_check_that_does_not_apply_costs_no_row(self):
        def student(x):
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.StudentT(30.0, 0.8 * x, VARIANCE**0.5))

        both = {"exact": posterior_of(), "t": Posterior(student, {}, model=normal_model)}
        found = compare(both, KEY, X, (Importance(500), "gap"))
        assert found.table["fine"].tolist() == [1, 1]
        assert np.isnan(found.table.loc["t", "gap_amortization"])
        assert found.reports["t"].dataset.attrs["num_samples"] == 500
        assert "are no Normals" in found.skipped["t"]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="posteriors is empty"):
            compare({}, KEY, X)
        with pytest.raises(TypeError, match="of type list, expected a dict"):
            inspect.unwrap(compare)([posterior_of()], KEY, X)  # without the tests' own type checks
        with pytest.raises(TypeError, match=r"'one'.*expected a Posterior"):
            compare({"one": guide}, KEY, X)
        with pytest.raises(ValueError, match="without 'importance'"):
            compare({"one": posterior_of()}, KEY, X, "collapse")
