"""Columns go by their names where frames have some."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr

from numpyro_vae import Columns, Posterior, amortize, fit
from tests.helpers import make_svi
from tests.stores.store_cases import KEY, drawn, fitted, model

DATA = drawn(12)
GENES = ["a", "b", "c"]
TURNED = ["c", "a", "b"]


def framed(x, names):
    return pd.DataFrame(x, columns=names)


def in_xarray(x, names):
    return xr.DataArray(x, dims=["cell", "gene"], coords={"gene": names})


def table(x, names):
    return pa.table(dict(zip(names, np.asarray(x).T, strict=True)))


@pytest.fixture(scope="module")
def trained():
    return fitted({**DATA, "x": framed(DATA["x"], GENES)})


@pytest.mark.parametrize("make", [framed, in_xarray, table])
def test_columns_in_another_order_are_those_of_the_same_names(trained, make):
    x = make(DATA["x"][:, [2, 0, 1]], TURNED)
    found, known = (trained.encode({**DATA, "x": one})["z"].loc for one in (x, DATA["x"]))
    np.testing.assert_array_equal(found, known)


def test_columns_on_disk_are_those_of_the_same_names(trained, tmp_path):
    pq.write_table(table(DATA["x"], GENES), tmp_path / "cells.parquet")
    x = Columns(tmp_path / "cells.parquet", TURNED)
    found, known = (trained.encode({**DATA, "x": one})["z"].loc for one in (x, DATA["x"]))
    np.testing.assert_allclose(found, known, rtol=1e-5)


def test_labels_and_values_of_a_tree_go_together(trained):
    x = framed(DATA["x"][:, [2, 0, 1]], TURNED)
    tree = trained.to_datatree(KEY, {**DATA, "x": x}, 2, groups=("posterior", "observed_data"))
    assert tree.observed_data["x_dim_0"].values.tolist() == GENES
    np.testing.assert_array_equal(tree.observed_data["x"], DATA["x"])
    report = trained.check(KEY, {**DATA, "x": x}, "collapse", progress_bar=False)
    known = trained.check(KEY, DATA, "collapse", progress_bar=False)
    assert report.dataset.equals(known.dataset)


@pytest.mark.slow
def test_names_outlive_the_process(trained, tmp_path):
    trained.save(tmp_path / "posterior")
    loaded = Posterior.load(tmp_path / "posterior", trained.guide.model)
    x = framed(DATA["x"][:, [2, 0, 1]], TURNED)
    found, known = (loaded.encode({**DATA, "x": one})["z"].loc for one in (x, DATA["x"]))
    np.testing.assert_array_equal(found, known)


def test_other_columns_are_warned_of_and_numbers_and_dates_are_no_names(trained):
    with pytest.warns(
        UserWarning, match=r"has \['d'\] and lacks \['a'\].*by their places.*\['a', 'b', 'c'\]"
    ):
        trained.encode({**DATA, "x": framed(DATA["x"], ["d", "b", "c"])})
    with (
        pytest.warns(UserWarning, match=r"has \['d'\] and lacks \['a', 'c'\]"),
        pytest.raises(ValueError, match=r"'x' has shape \(12, 2\), where it had \(12, 3\)"),
    ):
        trained.encode({**DATA, "x": framed(DATA["x"][:, :2], ["d", "b"])})
    days = pd.date_range("2024-01-01", periods=3)
    for labels in (range(3), days[::-1], ["b", "b", "a"]):
        trained.encode({**DATA, "x": framed(DATA["x"], labels)})


def test_validation_data_are_of_the_columns_of_the_data():
    x, turned = framed(DATA["x"], GENES), framed(DATA["x"][:, [2, 0, 1]], TURNED)
    options = {"num_epochs": 2, "progress_bar": False}
    found, known = (
        fit(make_svi(model), KEY, {**DATA, "x": x}, validation={**DATA, "x": one}, **options)
        for one in (turned, x)
    )
    np.testing.assert_array_equal(*(r.history["validation_loss"] for r in (found, known)))


@pytest.mark.slow
def test_amortize_knows_the_columns():
    def of_rows(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z[:, None] * jnp.array([1.0, -1.0, 3.0])
            numpyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    options = {"num_steps": 20, "num_simulation_steps": 0, "progress_bar": False}
    posterior = amortize(of_rows, KEY, framed(x, GENES), **options)
    turned = framed(x[:, [2, 0, 1]], TURNED)
    found, known = (posterior.sample(KEY, one, 3)["z"] for one in (turned, x))
    np.testing.assert_array_equal(found, known)
    validations = {"x": framed(x[:9, [2, 0, 1]], TURNED)}, (framed(x[:9], GENES),)
    found, known = (
        amortize(of_rows, KEY, (framed(x, GENES),), validation=rows, **options).sample(KEY, x, 3)
        for rows in validations
    )
    np.testing.assert_array_equal(found["z"], known["z"])


@pytest.mark.slow
def test_programs_say_in_which_order_columns_come(trained, tmp_path):
    manifest = trained.export(tmp_path / "served", DATA, artifacts=["encode"])
    assert manifest["inputs"]["x"]["columns"] == [None, GENES]
    assert "columns" not in manifest["inputs"]["y"]
