"""Checks written to Zarr in parts: the report of data in memory, also if a run was killed."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.infer.autoguide import AutoDelta

from numpyro_vae.checks import (
    Finding,
    Importance,
    NotApplicableError,
    Novelty,
    Predictive,
    RowwiseCheck,
    open_report,
)
from numpyro_vae.inference import regions
from tests.stores.store_cases import KEY, ROWS, drawn, fitted, kill, to_zarr

DATA = drawn()


@pytest.fixture(scope="module")
def posterior():
    return fitted(DATA)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of eight rows, of which four are looked at together."""
    monkeypatch.setattr(regions, "PART_ROWS", 8)
    monkeypatch.setattr("numpyro_vae.inference.runner.ROWS", 4)
    monkeypatch.setattr("numpyro_vae.checks.base.SLICE", 8)


def check(posterior, data, checks=None, **options):
    return posterior.check(KEY, data, checks, progress_bar=False, **options)


def require_same(report, known):
    assert str(report) == str(known)
    assert report.checks == known.checks
    assert report.skipped == known.skipped
    xr.testing.assert_identical(report.dataset.load(), known.dataset)


@pytest.mark.slow
def test_the_report_on_disk_is_that_in_memory(posterior, tmp_path):
    path = tmp_path / "report.zarr"
    report = check(posterior, DATA, store=path)
    known = check(posterior, DATA)
    require_same(report, known)
    require_same(check(posterior, DATA, store=path), known)
    np.testing.assert_array_equal(report.flagged, known.flagged)
    found = open_report(path)
    assert str(found).splitlines() == str(known).splitlines()
    require_same(found, known)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_of_rows_that_are_on_disk_themselves(posterior, tmp_path):
    stored = {"x": to_zarr(DATA["x"], tmp_path), "y": DATA["y"]}
    report = check(posterior, stored, store=tmp_path / "report.zarr")
    known = check(posterior, DATA).dataset
    xr.testing.assert_allclose(report.dataset.load(), known, rtol=1e-2, atol=1e-3)
    posterior.repair(KEY, stored, report, method="importance", num_samples=20)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_stopped(posterior, tmp_path, monkeypatch):
    path = tmp_path / "report.zarr"
    kill(lambda: check(posterior, DATA, store=path), 3)
    with pytest.raises(ValueError, match="There is no report at"):
        open_report(path)
    looked, of_rows = [], Importance.of_rows
    monkeypatch.setattr(
        Importance, "of_rows", lambda *args: (looked.append(args[1].rows), of_rows(*args))[1]
    )
    report = check(posterior, DATA, store=path)
    assert [int(rows.chosen[0]) for rows in looked] == [24, 32]
    require_same(report, check(posterior, DATA))


@pytest.mark.slow
def test_all_checks_and_coordinates(posterior, tmp_path):
    reference = drawn(400)
    checks = ["collapse", Novelty(reference), Predictive(max_rows=10), "calibration"]
    coords = {"cells": [f"cell {n}" for n in range(ROWS)]}
    report = check(posterior, DATA, checks, store=tmp_path / "a", coords=coords)
    known = check(posterior, DATA, checks, coords=coords)
    xr.testing.assert_equal(report.dataset.load(), known.dataset)
    assert str(report) == str(known)
    again = open_report(tmp_path / "a")
    assert str(again) == str(known)
    assert Predictive(max_rows=10) in again.checks
    other = [*checks[:2], Predictive(max_rows=11), checks[3]]
    with pytest.raises(ValueError, match=r"the check predictive was Predictive\(max_rows=10\)"):
        check(posterior, DATA, other, store=tmp_path / "a", coords=coords)


@dataclass(frozen=True)
class Length(RowwiseCheck):
    """A check of one's own."""

    name: ClassVar[str] = "length"
    applies: bool = True

    def of_rows(self, subject):
        if not self.applies:
            raise NotApplicableError("there are no lengths")
        numbers = subject.rows.chosen
        return xr.Dataset({"length/of": ([subject.plate], np.sqrt(numbers))})

    def of_all(self, subject, dataset):
        return xr.Dataset({"length_mean": dataset["length/of"].mean()})

    def find(self, dataset):
        yield Finding(self.name, True, f"the mean is {float(dataset['length_mean']):.3f}")

    draw = None


def test_a_check_of_ones_own_and_names_with_a_slash(posterior, tmp_path):
    report = check(posterior, DATA, Length(), store=tmp_path / "a")
    require_same(report, check(posterior, DATA, Length()))
    assert "length/of" in report.dataset
    with pytest.raises(ValueError, match=r"The checks \['length'\] are your own: pass them"):
        open_report(tmp_path / "a")
    require_same(open_report(tmp_path / "a", [Length()]), report)
    with pytest.raises(NotApplicableError, match="there are no lengths"):
        check(posterior, DATA, Length(applies=False), store=tmp_path / "b")


def test_what_is_no_report_is_refused(posterior, tmp_path):
    posterior.to_datatree(KEY, DATA, 3, groups="posterior", store=tmp_path / "tree.zarr")
    for path in (tmp_path / "tree.zarr", tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match="There is no report at"):
            open_report(path)
    with pytest.raises(ValueError, match="has other results: kind was DataTree"):
        check(posterior, DATA, store=tmp_path / "tree.zarr")


def test_a_guide_without_a_density_is_said_to_have_none(tmp_path):
    def model(x, y):
        with numpyro.plate("cells", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    from numpyro_vae import Posterior

    posterior = Posterior(AutoDelta(model), {"z_auto_loc": DATA["y"]})
    for options in ({}, {"store": tmp_path / "a"}):
        with pytest.raises(NotApplicableError, match="is a point at the local sites"):
            check(posterior, DATA, **options)
