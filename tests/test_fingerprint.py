"""Results know what rows they are of, and refuse others."""

import re

import arviz as az
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import make_svi
from models import normal_model
from numpyro.infer import Trace_ELBO

from numpyro_vae import Importance, Posterior, Report
from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.inference.fingerprint import fingerprint_rows, of_all

KEY = jax.random.key(1)
NUM_ROWS = 30
X = np.random.default_rng(0).normal(size=NUM_ROWS).astype(np.float32)
OTHER = X.copy()
OTHER[[4, 9]] += 1
LEAST = np.nextafter(X, np.float32(np.inf))


def of(data, batch_axes=0):
    read = ArrayData.read(data, batch_axes)
    return fingerprint_rows(read, 4 if read.is_whole else read.num_data)


# -- the numbers ----------------------------------------------------------------------------------


def test_a_row_has_the_same_number_wherever_it_stands():
    x = np.random.default_rng(0).normal(size=(50, 3, 2)).astype(np.float32)
    data = x, np.arange(50)
    order = np.random.default_rng(1).permutation(50)
    expected = of(data)
    assert expected.dtype == np.uint32
    assert len(set(expected.tolist())) == 50
    np.testing.assert_array_equal(of((x[order], data[1][order])), expected[order])
    np.testing.assert_array_equal(of((np.moveaxis(x, 0, 2), data[1]), (2, 0)), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.nextafter(x, np.float32(np.inf)),
        lambda x: -x,
        lambda x: x * [[-1, -1, 1]],  # of two signs at once
        lambda x: x[:, ::-1],
        lambda x: np.where(np.arange(3) == 1, np.nan, x),
        lambda x: np.zeros_like(x),
    ],
)
def test_rows_that_differ_have_other_numbers(change):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    assert (of(change(x).astype(np.float32)) != of(x)).all()


def test_chance_gives_two_of_many_rows_the_same_number():
    """As often as it does for random numbers: of a million pairs, hardly ever."""
    x = np.arange(1400, dtype=np.float32)[:, None] * np.ones(5, np.float32)
    assert len(set(of(x).tolist())) == 1400


def test_all_arrays_with_rows_count_and_no_others():
    x, y = np.arange(4.0), np.arange(4)
    expected, axes = of((x, y, np.ones(3)), (0, 0, None)), (0, 0, None)
    np.testing.assert_array_equal(of((x, y, np.zeros(3)), axes), expected)
    assert (of((x + 1, y, np.ones(3)), axes) != expected).all()
    assert (of((x, y + 1, np.ones(3)), axes) != expected).all()


def test_data_that_are_taken_whole_have_one_number():
    x, y = np.arange(6.0), np.arange(3)
    expected = of((x, y), None)
    assert len(expected) == 4
    assert len(set(expected.tolist())) == 1
    np.testing.assert_array_equal(of((x, y), None), expected)
    assert of((x + 1, y), None)[0] != expected[0]
    assert of((x, y[::-1]), None)[0] != expected[0]


def test_what_counts_is_what_is_on_the_device():
    x = np.random.default_rng(0).normal(size=(20, 2))
    np.testing.assert_array_equal(of(x), of(x.astype(np.float32)))
    np.testing.assert_array_equal(of(x), of(jnp.asarray(x)))


@pytest.mark.parametrize(
    "kind", [bool, np.uint8, np.int16, np.float16, ml_dtypes.bfloat16, np.int32, np.complex64]
)
def test_arrays_of_any_kind(kind):
    x = np.array([[0, 1], [1, 0], [1, 1], [0, 0]]).astype(kind)
    assert len(set(of(x).tolist())) == 4
    assert of(x, None).shape == (4,)


def test_both_halves_of_a_double_count():
    x = np.float64(1.0) + np.arange(4) * np.finfo(np.float64).eps
    with jax.enable_x64(True):
        assert len(set(of(x).tolist())) == 4
    assert len(set(of(x).tolist())) == 1


def test_nan_and_negative_zero_are_bytes_like_others():
    x = np.array([np.nan, 0.0, -0.0], np.float32)
    np.testing.assert_array_equal(of(x), of(x.copy()))
    assert len(set(of(x).tolist())) == 3


def test_rows_without_values():
    assert (of((np.zeros((4, 0)), np.arange(4))) == of((np.zeros((4, 0)), np.arange(4)))).all()


def test_the_numbers_stay_what_they_are():
    """As trees and reports are kept in files."""
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert of(x).tolist() == [792343838, 123663340]
    assert of_all(of(x)) == "2 rows f290aab4a79e698b"


# -- reports, trees and repairs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def posterior():
    svi = make_svi(normal_model, loss=Trace_ELBO())
    return Posterior(svi.guide, svi.get_params(svi.init(KEY, X)))


def check(posterior, x=X):
    return posterior.check(KEY, x, Importance(200), progress_bar=False)


@pytest.fixture(scope="module")
def report(posterior):
    return check(posterior)


@pytest.fixture(scope="module")
def tree(posterior):
    return posterior.to_datatree(KEY, X, 20)


@pytest.fixture(scope="module")
def repair(posterior):
    return posterior.repair(KEY, X, [3, 7], method="importance", num_samples=20)


def test_a_report_on_other_rows_is_not_repaired(posterior, report):
    message = (
        r"The report is on other data: 2 of 30 rows have other values, the first is row 4.*"
        r"Pass the data that were checked"
    )
    with pytest.raises(ValueError, match=message):
        posterior.repair(KEY, OTHER, report)
    with pytest.raises(ValueError, match=r"30 of 30 rows have other values, the first is row 0"):
        posterior.repair(KEY, LEAST, report)


@pytest.mark.slow
@pytest.mark.parametrize("data", [X.astype(np.float64), jnp.asarray(X)])
def test_a_report_on_the_same_rows_is(posterior, report, data):
    sizes = {"method": "importance", "num_samples": 20}
    assert len(posterior.repair(KEY, data, report, **sizes).rows) == len(report.flagged)


def test_a_part_of_a_report_is_on_a_part_of_the_rows(posterior, report):
    rows = [20, 3, 11]
    part = report.isel(data=rows)
    posterior.repair(KEY, X[rows], part, method="importance", num_samples=20)
    with pytest.raises(ValueError, match="2 of 3 rows have other values, the first is row 1"):
        posterior.repair(KEY, X[[20, 11, 3]], part)


@pytest.mark.slow
def test_results_of_other_rows_do_not_get_into_a_tree(posterior, report, repair, tree):
    other = posterior.to_datatree(KEY, OTHER, 20)
    for name, result in {"report": report, "repair": repair}.items():
        message = rf"The {name} is on other data than the tree.*Pass the tree of Posterior.to_dat"
        with pytest.raises(ValueError, match=message):
            result.add_to(other)
        assert name.replace("report", "checks") in result.add_to(tree).children


@pytest.mark.slow
def test_results_do_not_get_into_a_tree_of_another_length(posterior, report, repair):
    longer = posterior.to_datatree(KEY, np.concatenate([X, X]), 20)
    for name, result in {"report": report, "repair": repair}.items():
        message = rf"The {name} is on 30 rows of plate 'data', and the tree has 60"
        with pytest.raises(ValueError, match=message):
            result.add_to(longer)


@pytest.mark.slow
def test_a_tree_from_a_file_knows_its_rows(posterior, report, repair, tree, tmp_path):
    tree.to_netcdf(tmp_path / "tree.nc")
    with az.from_netcdf(tmp_path / "tree.nc") as opened:
        assert opened.attrs == tree.attrs
        repair.add_to(report.add_to(opened)).to_netcdf(tmp_path / "again.nc")
        with pytest.raises(ValueError, match="on other data than the tree"):
            check(posterior, OTHER).add_to(opened)
    with az.from_netcdf(tmp_path / "again.nc") as opened:
        assert opened.attrs == tree.attrs
        found = opened.checks["fingerprint"].values
        np.testing.assert_array_equal(found, report.dataset["fingerprint"])
        saved = Report(opened.checks.to_dataset())
        posterior.repair(KEY, X, saved, method="importance", num_samples=20)
        with pytest.raises(ValueError, match="2 of 30 rows have other values"):
            posterior.repair(KEY, OTHER, saved)


def test_a_tree_that_was_cut_takes_a_report_that_was(report, tree):
    some = {"data": slice(5, 12)}
    assert report.isel(**some).add_to(tree.isel(**some))["checks"].sizes["data"] == 7


def test_results_without_a_fingerprint_are_taken(posterior, report, repair, tree):
    older = tree.copy()
    older.attrs = {}
    repair.add_to(check(posterior, OTHER).add_to(older))
    old = Report(report.dataset.drop_vars("fingerprint"))
    posterior.repair(KEY, OTHER, old, method="importance", num_samples=20)
    assert "checks" in old.add_to(tree).children


def test_a_repair_has_the_fingerprint_of_its_rows(report, repair):
    known = report.dataset["fingerprint"].values
    np.testing.assert_array_equal(repair.dataset["fingerprint"], known[[3, 7]])
    assert repair.dataset.attrs["fingerprint"] == of_all(known)


# -- coordinates ----------------------------------------------------------------------------------


def test_coordinates_of_no_dimension_are_refused(posterior):
    wrong = {"dat": np.arange(NUM_ROWS)}
    message = re.escape("coords has ['dat'], which are no dimensions here.") + ".*'data'"
    with pytest.raises(ValueError, match=message):
        posterior.to_datatree(KEY, X, 20, coords=wrong)
    with pytest.raises(ValueError, match=message):
        posterior.check(KEY, X, "importance", coords=wrong, progress_bar=False)


def test_coordinates_of_the_model_serve_every_result(posterior):
    coords = {"data": np.arange(100, 100 + NUM_ROWS)}
    found = posterior.to_datatree(KEY, X, 20, coords=coords, groups=["observed_data"])
    assert found.observed_data["data"].values[0] == 100
