"""Labels of pandas and xarray data are the coordinates of results."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr

from tests.stores.store_cases import KEY, drawn, fitted

DATA = drawn(12)
CELLS = [f"cell {n}" for n in range(12)]
GENES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def posterior():
    return fitted(DATA)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of eight rows."""
    monkeypatch.setattr("numpyro_vae.inference.regions.PART_ROWS", 8)


def framed(index=CELLS):
    frame = pd.DataFrame(DATA["x"], index=index, columns=GENES)
    return {"x": frame, "y": pd.Series(DATA["y"], index=index)}


def in_xarray():
    x = xr.DataArray(DATA["x"], dims=["cell", "gene"], coords={"cell": CELLS, "gene": GENES})
    return {"x": x, "y": xr.DataArray(DATA["y"], dims=["cell"])}


@pytest.mark.slow
@pytest.mark.parametrize("make", [framed, in_xarray])
def test_labels_are_coordinates_of_the_tree_and_of_the_report(posterior, make, tmp_path):
    data = make()
    known = posterior.to_datatree(KEY, DATA, 4)
    for options in ({}, {"store": tmp_path / "tree.zarr"}):
        tree = posterior.to_datatree(KEY, data, 4, **options)
        assert tree.attrs == known.attrs
        for group in ("posterior", "observed_data", "constant_data", "posterior_predictive"):
            assert tree[group]["cells"].values.tolist() == CELLS
        for group in ("observed_data", "posterior_predictive"):
            assert tree[group]["x_dim_0"].values.tolist() == GENES
        np.testing.assert_array_equal(tree.posterior["z"], known.posterior["z"])
        assert tree.observed_data["x"].sel(cells="cell 3", x_dim_0="b") == DATA["x"][3, 1]
    report = posterior.check(KEY, data, "collapse", progress_bar=False, store=tmp_path / "report")
    assert report.dataset["cells"].values.tolist() == CELLS


@pytest.mark.slow
def test_coordinates_that_are_given_come_first(posterior):
    coords = {"cells": np.arange(12) * 2, "x_dim_0": ["u", "v", "w"]}
    tree = posterior.to_datatree(KEY, framed(), 2, groups="observed_data", coords=coords)
    assert tree.observed_data["cells"].values.tolist() == list(range(0, 24, 2))
    assert tree.observed_data["x_dim_0"].values.tolist() == ["u", "v", "w"]


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["to_datatree", "check"])
def test_coordinates_of_other_rows_are_refused_before_anything_is_computed(
    posterior, ask, monkeypatch
):
    def compute(*_):
        raise AssertionError("something is computed")

    monkeypatch.setattr("numpyro_vae.inference.compiled.Compiled.__call__", compute)
    with pytest.raises(ValueError, match=r"coords\['cells'\] has 3 values, and the data have 12"):
        getattr(posterior, ask)(KEY, DATA, coords={"cells": range(3)})


@pytest.mark.slow
def test_labels_of_arguments_that_are_not_observed():
    def model(x, design):
        with numpyro.plate("cells", len(x)):
            z = numpyro.sample("z", dist.Normal(design.sum(1), 1.0))
            numpyro.sample("counts", dist.Normal(z, 1.0), obs=x)

    design = pd.DataFrame(DATA["x"], columns=GENES)
    data = {"x": DATA["y"], "design": design}
    tree = fitted(data, model).to_datatree(KEY, data, 2, groups=("posterior", "constant_data"))
    assert tree.constant_data["design_dim_0"].values.tolist() == GENES
    assert tree.posterior["cells"].values.tolist() == list(range(12))
    tree = fitted(data, model).to_datatree(KEY, data, 2, groups="posterior")
    assert "design_dim_0" not in tree.posterior.coords


def test_rows_of_other_labels_are_refused(posterior):
    data = framed()
    data["y"] = data["y"].iloc[::-1]
    with pytest.raises(ValueError, match=r"data\['y'\] has other labels of rows"):
        posterior.to_datatree(KEY, data, 2)
    names = {"cells": [f"cell {row}" for row in range(12)]}  # the user's own say what is meant
    tree = posterior.to_datatree(KEY, data, 2, groups="posterior", coords=names)
    assert tree.posterior["cells"].values.tolist() == names["cells"]
    data["y"] = data["y"].reset_index(drop=True)  # without labels, they go by their places
    posterior.to_datatree(KEY, data, 2, groups="posterior")


def test_dates_and_several_levels(posterior, tmp_path):
    days = pd.date_range("2024-01-01", periods=12)
    options = {"groups": "posterior", "store": tmp_path / "a"}
    tree = posterior.to_datatree(KEY, framed(days), 2, **options)
    np.testing.assert_array_equal(tree.posterior["cells"], days)
    several = pd.MultiIndex.from_product([["a", "b"], range(6)])
    tree = posterior.to_datatree(KEY, framed(several), 2, groups="posterior")
    assert tree.posterior["cells"].values.tolist() == list(range(12))
