"""Which checks run: names, objects with options, and a check of one's own."""

import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import numpy as np
import planted
import pytest
import xarray as xr

from numpyro_vae import Calibration, Collapse, Gap, Importance, Novelty, Predictive
from numpyro_vae.checks import AbstractCheck, Finding
from numpyro_vae.checks.choose import make_check

KEY = jax.random.key(1)
NAMES = ["importance", "gap", "calibration", "collapse", "novelty", "predictive", "globals"]


@pytest.fixture(scope="module")
def case():
    return planted.exact(planted.ORTHOGONAL, 0.7, factor=0.5)


@pytest.fixture(scope="module")
def check(case):
    return partial(case.posterior.check, KEY, case.data[:40])


def ran(report):
    return [made.name for made in report.checks]


@pytest.mark.slow
def test_by_default_the_quick_ones_run(check):
    report = check()
    assert ran(report) == ["importance", "collapse", "predictive"]
    assert not report.skipped


@pytest.mark.slow
def test_all_that_apply_run_if_asked(check):
    report = check("all")
    assert ran(report) == [name for name in NAMES if name not in ("novelty", "globals")]
    assert "no latent sites outside plate 'data'" in report.skipped["globals"]
    assert "pass Novelty(reference)" in report.skipped["novelty"]
    assert "  novelty        not run: it needs reference data; pass Novelty(ref" in str(report)
    assert "<td>novelty</td><td>not run</td>" in report._repr_html_()


@pytest.mark.parametrize("given", ["collapse", ["collapse"], Collapse(), (Collapse(),)])
def test_one_is_given_by_name_or_as_an_object(check, given):
    assert ran(check(given)) == ["collapse"]


def test_what_a_check_computes_does_not_depend_on_the_others(check):
    together = check(("predictive", Importance(), "collapse")).dataset
    for name in ("importance", "collapse", "predictive"):
        alone = check(name).dataset
        xr.testing.assert_identical(
            alone.drop_attrs(), together[list(alone.data_vars)].drop_attrs()
        )


def test_options_are_those_of_the_check(check):
    report = check((Predictive(max_rows=7), Importance(num_samples=200)))
    assert report.checks == (Importance(num_samples=200), Predictive(max_rows=7))
    assert report.dataset.attrs["num_samples"] == 200
    assert np.isfinite(report.dataset["predictive_p"]).sum() == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("importanc", r"checks has 'importanc', expected 'all' alone, one or more of \['import"),
        (("importance", "all"), r"checks has 'all', expected 'all' alone"),
        (("gap", Gap(max_rows=3)), r"checks has 'gap' twice"),
        ((), r"checks is empty, expected 'all' alone, or one or more of \['importance', 'gap'"),
        ("novelty", r"it needs reference data; pass Novelty\(reference\)"),
        (Novelty(np.zeros((20, 4), np.float32)), r"at least 400 rows of reference.*found 20"),
    ],
)
def test_what_cannot_be_run_is_refused(check, given, message):
    with pytest.raises(ValueError, match=message):
        check(given)


def test_a_class_is_no_check():
    with pytest.raises(TypeError, match=r"checks has <class.*Gap'>.*an object such as Gap\("):
        make_check(Gap)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Importance(num_samples=99), r"needs at least 100 draws of each datum, found 99"),
        (lambda: Gap(num_samples=1), r"num_samples is 1, expected at least 2"),
        (lambda: Gap(max_rows=0), r"max_rows is 0, expected at least 1"),
        (lambda: Calibration(num_simulations=1), r"num_simulations is 1, expected at least 2"),
        (lambda: Predictive(max_rows=0), r"max_rows is 0, expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_progress_bar_says_which_check_runs(check, capsys):
    check(("importance", "collapse"), progress_bar=False)
    assert capsys.readouterr() == ("", "")
    check(("importance", "collapse"))
    out, err = capsys.readouterr()
    assert not out
    names = re.findall(r"check: (\w+): +\d+%", err)
    assert list(dict.fromkeys(names)) == ["importance", "collapse"]
    assert "2/2" in err


# -- a check of one's own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shrinkage(AbstractCheck):
    """How far the guide's means are from zero; it has no picture."""

    name: ClassVar[str] = "shrinkage"
    limit: float = 1.0
    draw = None

    def compute(self, subject):
        scores = np.abs(subject.rows.args[0]).max(1)
        scores += float(jax.random.uniform(subject.rng_key))
        return xr.Dataset({"shrinkage": ([subject.plate], scores)}, attrs={"limit": self.limit})

    def find(self, dataset):
        bad = int((dataset["shrinkage"] > dataset.attrs["limit"]).sum())
        yield Finding(
            self.name, not bad, f"{bad} rows are above {self.limit}", "shrink" * bool(bad)
        )


def test_a_check_of_ones_own_runs_after_the_others(check, tmp_path):
    report = check((Shrinkage(limit=1e3), "importance"))
    assert ran(report) == ["importance", "shrinkage"]
    assert "shrinkage      0 rows are above 1000.0" in str(report)
    assert report.dataset["shrinkage"].dims == ("data",)
    report.save(tmp_path / "report.png")  # of the importance check alone
    alone = check(Shrinkage())
    xr.testing.assert_equal(alone.dataset["shrinkage"], report.dataset["shrinkage"])
    with pytest.raises(ValueError, match="no check with a picture"):
        alone.save(tmp_path / "report.png")
