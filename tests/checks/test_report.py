"""The report: what a person reads, what ArviZ reads, and models and data that are refused."""

import base64
import html
import io
import re
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import numpyro
import numpyro.distributions as dist
import planted
import pytest
import rich.console
import xarray as xr
from flax import nnx
from helpers import train
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import (
    AutoAmortizedDelta,
    AutoAmortizedNormal,
    Calibration,
    Posterior,
    Report,
    plot_collapse,
    plot_khat,
)
from numpyro_vae.checks import Finding

KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def case():
    return planted.exact(planted.ORTHOGONAL, 0.7, factor=0.5)


@pytest.fixture(scope="module")
def report(case):
    coords = {"data": np.arange(100, 140)}
    checks = ("importance", "gap", Calibration(num_simulations=200), "collapse", "predictive")
    return case.posterior.check(KEY, case.data[:40], checks, coords=coords)


def test_a_person_reads_one_sentence_for_each_finding(report):
    text = str(report)
    number = len(report.flagged)
    assert 0 < number <= 40
    assert f"! {number} of 40 rows have draws that are not usable as they are; repair them" in text
    assert "k-hat < 0.67, divergence <= 0.1 nats: use the draws as they are" in text
    assert "0 of 2 dimensions of site 'z' have collapsed to the prior" in text
    assert {finding.check for finding in report.findings} == {
        "importance",
        "gap",
        "calibration",
        "collapse",
        "predictive",
    }
    assert all(bool(finding.advice) != finding.ok for finding in report.findings)


def test_the_same_advice_is_given_once():
    findings = [Finding("collapse", False, f"site {name}", "warm up") for name in "ab"]
    text = str(Report(xr.Dataset(attrs={"num_data": 3}), (*findings, Finding("gap", True, "none"))))
    assert [line.split("!")[-1].strip() for line in text.splitlines()[1:3]] == [
        "site a",
        "site b; warm up",
    ]


def test_the_terminal_gets_a_table_and_a_pipe_plain_text(report):
    out = io.StringIO()
    rich.console.Console(file=out, width=200).print(report)
    piped = out.getvalue()
    assert "\x1b" not in piped
    assert "importance" in piped
    out = io.StringIO()
    rich.console.Console(file=out, width=200, force_terminal=True).print(report)
    assert "\x1b" in out.getvalue()
    page = report._repr_html_()
    assert page.count("<tr>") == len(report.findings)
    assert "k-hat &gt; 1" in page
    for shown in (piped, page):
        for label in ("fine", "reweight", "borderline", "not to be trusted"):
            assert re.search(rf"{label} +\d+ ", shown)


def test_arviz_opens_it_again_and_draws_the_ranks(case, report, tmp_path):
    tree = case.posterior.to_datatree(KEY, case.data[:40], 50, coords={"data": np.arange(100, 140)})
    report.add_to(tree).to_netcdf(tmp_path / "tree.nc")
    with az.from_netcdf(tmp_path / "tree.nc") as tree:
        xr.testing.assert_equal(tree.checks.to_dataset(), report.dataset)
        assert tree.checks["data"].values[0] == 100
        assert tree.prior_sbc["z"].dims == ("chain", "draw", "z_dim_0")
        az.plot_ecdf_pit(tree, var_names=["z"], backend="none")


def test_a_page_has_the_words_and_the_pictures(report, tmp_path):
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    encoded = re.search(r"data:image/png;base64,([^']+)'", page)
    assert encoded
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded[1])))
    assert min(pixels.shape[:2]) > 500
    for finding in report.findings:
        assert html.escape(finding.text) in page
    report.save(str(tmp_path / "report.png"))
    assert matplotlib.image.imread(tmp_path / "report.png").shape == pixels.shape
    with pytest.raises(ValueError, match=r"no check with a picture"):
        Report(report.dataset).save(tmp_path / "report.png")


def test_a_part_of_a_report_is_one(report, tmp_path):
    part = report.isel(data=slice(10))
    assert str(part).startswith("10 data, 1000 draws of each")
    assert not part.findings  # they are about all
    np.testing.assert_array_equal(part.verdict, report.verdict[:10])
    part.save(tmp_path / "part.png")


def test_a_part_of_a_report_leaves_the_whole_as_it_was(report):
    report.isel(data=slice(10))
    assert report.dataset.attrs["num_data"] == 40
    known = report.dataset["fingerprint"].values
    np.testing.assert_array_equal(report.flagged_of(known), report.flagged)  # `repair` asks for it


def test_verdicts_need_the_importance_check(case):
    report = case.posterior.check(KEY, case.data, "collapse")
    assert str(report).startswith("300 data")
    with pytest.raises(ValueError, match="The importance check was not run"):
        case.posterior.repair(KEY, case.data, report)


@pytest.mark.parametrize(
    ("plot", "message"),
    [(plot_khat, r"importance check was not run"), (plot_collapse, r"collapse check was not run")],
)
def test_a_picture_needs_its_check(report, plot, message):
    with pytest.raises(ValueError, match=message):
        plot(Report(report.dataset[["tarp"]]))


# -- what is refused ------------------------------------------------------------------------------


def own_network(inputs, *, rngs):
    """A network of the user's, which does not look at what it is given."""
    return nnx.Sequential(nnx.Linear(inputs.shape[-1], 8, rngs=rngs), jnp.tanh)


def four(x, covariates):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None] * jnp.ones(4), 0.5).to_event(1), obs=x)


@pytest.fixture(scope="module")
def of_covariates():
    """A posterior whose network reads something else than the model observes."""
    guide = AutoAmortizedNormal(four, own_network, inputs=lambda x, covariates: covariates)
    svi = SVI(four, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    data = np.ones((30, 4), np.float32), np.ones((30, 3), np.float32)
    return Posterior(guide, svi.run(KEY, 5, *data, progress_bar=False))


@pytest.mark.parametrize("shape", [(9, 3), (9,), (9, 4, 2), (9, 1)])
def test_data_of_another_shape_are_refused(of_covariates, shape):
    data = np.ones(shape, np.float32), np.ones((9, 3), np.float32)
    found = re.escape(f"argument 0 has shape {shape}, where it had (30, 4)")
    for call in (of_covariates.check, partial(of_covariates.repair, rows=[0])):
        with pytest.raises(ValueError, match=rf"{found}.*Pass data of the shape it was trained on"):
            call(KEY, data)


def test_data_that_only_the_network_cannot_read_are_refused(of_covariates):
    data = np.ones((9, 4), np.float32), np.ones((9, 2), np.float32)
    with pytest.raises(ValueError, match=r"argument 1 has shape \(9, 2\), where it had \(30, 3\)"):
        of_covariates.check(KEY, data)


def test_an_error_has_its_own_words_if_the_shape_is_not_to_blame(of_covariates):
    data = np.ones((9, 4), np.float32), np.ones((9, 3), np.float32)
    with pytest.raises(ValueError, match=r"^There is no row 9"):
        of_covariates.repair(KEY, data, [9])


FEW = {"steps": 5, "rate": 1e-2, "loss": Trace_ELBO, "particles": 1}
X = np.linspace(-1, 1, 50).astype(np.float32)


def test_points_cannot_be_checked():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    posterior = train(AutoAmortizedDelta(model), X, **FEW)
    with pytest.raises(ValueError, match=r"has no density, so there are no importance weights"):
        posterior.check(KEY, X)


@pytest.mark.slow
def test_an_improper_prior_cannot_be_simulated_from():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    posterior = train(AutoAmortizedNormal(model), X, **FEW)
    message = r"Site 'z' has an improper prior, so data cannot be simulated.*Give it a proper prior"
    with pytest.raises(ValueError, match=message):
        posterior.check(KEY, X, "calibration")
    report = posterior.check(KEY, X, "all")
    assert "improper prior" in report.skipped["calibration"]


def test_data_that_the_model_transforms_need_to_be_made_again():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=jnp.log(x))

    x = np.exp(X)
    posterior = train(AutoAmortizedNormal(model), x, **FEW)
    with pytest.raises(ValueError, match=r"site 'x' are not one of the model's arg.*Pass Calib"):
        posterior.check(KEY, x, "calibration")
    remade = Calibration(num_simulations=50, to_data=lambda made: np.exp(made["x"]))
    found = posterior.check(KEY, x, remade)
    assert found.dataset.sizes["simulation"] >= 50


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (dist.Delta(5.0), r"50 rows have zero importance weight everywhere.*row 0"),
        (
            dist.Normal(0.0, jnp.nan, validate_args=False),
            r"50 rows have log weights that are not finite.*row 0",
        ),
    ],
)
def test_rows_without_weights_are_refused(likelihood, message):
    def model(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", likelihood, obs=x)

    guide = AutoAmortizedNormal(model)
    params = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    with numpyro.validation_enabled(is_validate=False):
        posterior = Posterior(guide, params.get_params(params.init(KEY, X)))
        with pytest.raises(ValueError, match=message):
            posterior.check(KEY, X, "importance")
