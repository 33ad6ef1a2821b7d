"""What a posterior takes from its fit, and what of a DataTree is left out."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from helpers import make_svi, train
from models import hierarchical_model
from numpyro.handlers import scope
from numpyro.infer import Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, Posterior, fit

KEY = jax.random.key(1)
X = np.linspace(-2, 2, 30).astype(np.float32)


@pytest.fixture(scope="module")
def hierarchical():
    return train(AutoAmortizedNormal(hierarchical_model), X, steps=20)


@pytest.mark.slow
def test_groups_of_a_tree_can_be_left_out(hierarchical):
    whole = hierarchical.to_datatree(KEY, X, 20)
    some = ("log_likelihood", "posterior", "sample_stats")
    tree = hierarchical.to_datatree(KEY, X, 20, groups=some)
    assert set(tree.children) == set(some)
    for name in some:
        xr.testing.assert_allclose(tree[name].to_dataset(), whole[name].to_dataset(), rtol=1e-5)
    one = hierarchical.to_datatree(KEY, X, 20, groups="observed_data")
    assert set(one.children) == {"observed_data"}
    with pytest.raises(ValueError, match=r"no groups \['prior'\] here, choose from \['posterior'"):
        hierarchical.to_datatree(KEY, X, 20, groups=("posterior", "prior"))


def test_a_posterior_knows_what_its_fit_knew():
    def model(x, kind):
        prior = {"normal": dist.Normal, "laplace": dist.Laplace}[kind]
        with numpyro.plate("data", x.shape[1]):
            z = numpyro.sample("z", prior(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x[0])

    svi = make_svi(model, loss=Trace_ELBO())
    svi.static_kwargs = {"kind": "laplace"}
    result = fit(svi, KEY, X[None], batch_axes=1, num_epochs=2, progress_bar=False)
    draws = Posterior(svi.guide, result).sample(KEY, X[None, :7], 3)["z"]
    assert draws.shape == (3, 7)
    options = {"batch_axes": 1, "static_kwargs": {"kind": "laplace"}}
    again = Posterior(svi.guide, result.params, **options).sample(KEY, X[None, :7], 3)["z"]
    np.testing.assert_array_equal(draws, again)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Posterior(svi.guide, result, kind="laplace")


def scoped(x):
    """A model of which sites and the plate have a slash in their names."""
    with numpyro.plate("rows", len(x)):
        with scope(prefix="first"):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.deterministic("twice", 2 * z)
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.slow
def test_names_with_a_slash_are_written_with_a_point(tmp_path):
    model = scope(scoped, prefix="model")
    posterior = train(AutoAmortizedNormal(model), X, steps=20)
    coords = {"model/rows": [f"row {number}" for number in range(len(X))]}
    tree = posterior.to_datatree(KEY, X, 40, coords=coords)
    assert set(tree.posterior.data_vars) == {"model.first.z", "model.twice"}
    assert tree.posterior["model.first.z"].dims == ("chain", "draw", "model.rows")
    assert tree.observed_data["model.rows"][3] == "row 3"
    report = posterior.check(KEY, X, progress_bar=False, checks=("importance", "collapse"))
    repair = posterior.repair(KEY, X, [1, 3], method="importance", num_samples=40)
    tree = repair.add_to(report.add_to(tree))
    tree.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as again:
        for name in ("posterior", "checks", "repair"):
            xr.testing.assert_equal(again[name].to_dataset(), tree[name].to_dataset())
    assert tree.checks["kl_model.first.z"].dims == ("model.rows",)
    found = tree.posterior["model.first.z"].values[0, :, [1, 3]].T
    np.testing.assert_array_equal(found, repair.groups["posterior"]["model/first/z"])


@pytest.mark.parametrize("name", ["chain", "draw"])
def test_a_plate_named_as_a_dimension_of_draws_is_served_but_for_trees(name):
    def model(x):
        with numpyro.plate(name, len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    posterior = train(AutoAmortizedNormal(model), X, steps=5)
    assert posterior.sample(KEY, X, 3)["z"].shape == (3, 30)
    with pytest.raises(ValueError, match=f"The plate '{name}'.*Rename the plate.*'{name}s'"):
        posterior.to_datatree(KEY, X, 3)


def test_names_that_a_point_makes_the_same_are_refused():
    def model(x):
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("a/z", dist.Normal(0.0, 1.0))
            w = numpyro.sample("a.z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z + w, 0.5), obs=x)

    posterior = train(AutoAmortizedNormal(model), X, steps=5)
    with pytest.raises(ValueError, match=r"'a/z' and 'a\.z' are both 'a\.z' in a DataTree"):
        posterior.to_datatree(KEY, X, 3)


@pytest.mark.slow
def test_arguments_without_names_of_their_own_are_constant_data():
    def by_position(*arrays):
        x, offset = arrays
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(offset, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def by_name(x, **named):
        by_position(x, named["offset"])

    groups = ("constant_data", "observed_data")
    for model, data, name in (
        (by_position, (X, 3 * X), "arrays_1"),
        (by_name, {"x": X, "offset": 3 * X}, "offset"),
    ):
        svi = make_svi(model)
        result = fit(svi, KEY, data, num_epochs=1, progress_bar=False)
        tree = Posterior(svi.guide, result).to_datatree(KEY, data, 3, groups=groups)
        assert list(tree.constant_data) == [name]
        np.testing.assert_array_equal(tree.constant_data[name], 3 * X)


def test_a_mask_that_happens_to_equal_the_data_is_no_data():
    def model(x, given):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(given["mask"]))
            numpyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    x = np.arange(6, dtype=np.int32) % 2
    svi, data = make_svi(model), (x, {"mask": x == 1})
    result = fit(svi, KEY, data, num_epochs=1, progress_bar=False)
    groups = ("constant_data", "observed_data")
    tree = Posterior(svi.guide, result).to_datatree(KEY, data, 5, groups=groups)
    assert list(tree.observed_data.data_vars) == ["x"]
    np.testing.assert_array_equal(tree.constant_data["given.mask"], x == 1)


@pytest.mark.slow
@pytest.mark.parametrize("data", [(X, None), {"x": X, "y": None}])
@pytest.mark.parametrize("axes", [0, None])
def test_none_is_an_argument(data, axes):
    def model(x, y=None):
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
            if y is not None:
                numpyro.sample("y", dist.Normal(z, 0.5), obs=y)

    svi = make_svi(model)
    axes = axes if axes == 0 else (0, None) if isinstance(data, tuple) else {"x": 0, "y": None}
    result = fit(svi, KEY, data, num_epochs=1, batch_axes=axes, progress_bar=False)
    again = fit(svi, KEY, [data], num_data=30, num_epochs=1, batch_axes=axes, progress_bar=False)
    assert result.losses.shape == again.losses.shape
    tree = Posterior(svi.guide, result).to_datatree(KEY, data, 3)
    assert tree.posterior["z"].shape == (1, 3, 30)
    assert "constant_data" not in tree.children


@pytest.mark.parametrize("replicates", [3, 2])
def test_an_argument_in_another_order_than_its_site_has_not_its_dimensions(replicates):
    def model(y):
        with numpyro.plate("place", len(y), dim=-1):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with (
                numpyro.plate("period", y.shape[1], dim=-2),
                numpyro.plate("replicate", y.shape[2], dim=-3),
            ):
                numpyro.sample("y", dist.Normal(z, 1.0), obs=y.transpose(2, 1, 0))

    y = np.random.default_rng(0).normal(size=(8, 3, replicates)).astype(np.float32)
    svi = make_svi(model, plate="place")
    posterior = Posterior(svi.guide, svi.get_params(svi.init(KEY, y)))
    coords = {"period": ["a", "b", "c"]}
    tree = posterior.to_datatree(
        KEY, y, 5, groups=("observed_data", "constant_data"), coords=coords
    )
    observed, given = tree["observed_data"]["y"], tree["constant_data"]["y"]
    assert given.dims == ("place", "y_dim_0", "y_dim_1")
    np.testing.assert_array_equal(given, y)
    np.testing.assert_array_equal(observed.transpose("place", "period", "replicate"), y)
