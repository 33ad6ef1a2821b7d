"""The posterior object: rows in order, batches that do not show, draws that match."""

from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from flax import nnx
from models import hierarchical_model, normal_model
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.reparam import LocScaleReparam

from numpyro_vae import MLP, AutoAmortizedNormal, Importance, Posterior, fit
from numpyro_vae.checks import collapse
from numpyro_vae.inference import runner

X = np.asarray(jax.random.normal(jax.random.key(7), (60,)) + 1)
SMALL = partial(MLP, hidden_sizes=(8,))
KEY = jax.random.key(1)


def trained(model, data=X, num_epochs=40, guide=None, **options):
    guide = guide or AutoAmortizedNormal(model, SMALL)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    result = fit(
        svi, jax.random.key(0), data, batch_size=20, num_epochs=num_epochs, progress_bar=False,
        **options,
    )  # fmt: skip
    return Posterior(guide, result)


@pytest.fixture(scope="module")
def hierarchical():
    return trained(hierarchical_model)


@pytest.fixture(scope="module")
def wide():
    """Two local sites, one positive, in a plate that is not the last, beside another plate."""

    def model(x, offset):
        with numpyro.plate("items", 3, dim=-1), numpyro.plate("data", len(x), dim=-2):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            rate = numpyro.sample("rate", dist.LogNormal(0, 1))
            numpyro.deterministic("mean", z.sum(-1) + offset[:, None])
            numpyro.sample("x", dist.Normal(z.sum(-1) + offset[:, None], rate), obs=x)

    data = (np.asarray(jax.random.normal(jax.random.key(2), (30, 3))), np.linspace(0, 1, 30))
    data = tuple(array.astype(np.float32) for array in data)
    return trained(model, data, guide=AutoAmortizedNormal(model, SMALL, plate="data")), data


@pytest.mark.slow
def test_what_is_drawn_weighed_and_predicted_is_the_same(hierarchical):
    """The weights, by hand from the draws and the encoding."""
    draws = hierarchical.sample(KEY, X, 50)
    loc, scale = hierarchical.encode(X)["z"]
    log_p = dist.Normal(draws["mu"][:, None], 1.0).log_prob(draws["z"])
    log_p += dist.Normal(draws["z"], 0.5).log_prob(X)
    log_q = dist.Normal(loc, scale).log_prob(draws["z"])
    weights = hierarchical.log_weights(KEY, X, 50)
    np.testing.assert_allclose(weights, log_p - log_q, rtol=1e-3, atol=1e-4)
    predicted = hierarchical.predict(KEY, X, 50)["x"]
    assert np.abs((predicted - draws["z"]).std() - 0.5) < 0.03


@pytest.mark.slow
def test_weights_of_constrained_sites(wide):
    posterior, (x, offset) = wide
    draws = posterior.sample(KEY, (x, offset), 20)
    encoded = posterior.encode((x, offset))
    log_p = dist.Normal(0, 1).log_prob(draws["z"]).sum((-1, -2))
    log_p += dist.LogNormal(0, 1).log_prob(draws["rate"]).sum(-1)
    mean = draws["z"].sum(-1) + offset[:, None]
    log_p += dist.Normal(mean, draws["rate"]).log_prob(x).sum(-1)
    log_q = dist.Normal(*encoded["z"]).log_prob(draws["z"]).sum((-1, -2))
    log_q += dist.LogNormal(*encoded["rate"]).log_prob(draws["rate"]).sum(-1)
    weights = posterior.log_weights(KEY, (x, offset), 20)
    np.testing.assert_allclose(weights, log_p - log_q, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_batches_do_not_show(hierarchical, monkeypatch):
    expected = hierarchical.sample(KEY, X, 5), hierarchical.log_weights(KEY, X, 5)
    monkeypatch.setattr(runner, "ROWS", 7)
    found = hierarchical.sample(KEY, X, 5), hierarchical.log_weights(KEY, X, 5)
    np.testing.assert_allclose(found[0]["z"], expected[0]["z"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0]["mu"], expected[0]["mu"])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert hierarchical.predict(KEY, X, 5)["x"].shape == (5, 60)
    assert hierarchical.log_evidence(KEY, X, 5).shape == (5, 60)


def test_rows_stay_in_order_and_do_not_see_each_other(hierarchical):
    order = np.random.default_rng(0).permutation(60)
    shuffled, encoded = hierarchical.encode(X[order])["z"], hierarchical.encode(X)["z"]
    np.testing.assert_allclose(shuffled.loc, encoded.loc[order], rtol=1e-5)
    np.testing.assert_allclose(hierarchical.encode(X[:1])["z"].loc, encoded.loc[:1], rtol=1e-5)


@pytest.mark.slow
def test_a_subsampling_model_gives_the_same(hierarchical):
    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x), subsample_size=20) as rows:
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])

    posterior = trained(model)
    np.testing.assert_allclose(
        posterior.sample(KEY, X, 5)["z"], hierarchical.sample(KEY, X, 5)["z"], rtol=1e-4
    )
    np.testing.assert_allclose(
        posterior.log_weights(KEY, X, 5), hierarchical.log_weights(KEY, X, 5), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_shapes_keep_the_sites_own_axes(wide):
    posterior, data = wide
    draws = posterior.sample(KEY, data, 4)
    assert {name: value.shape for name, value in draws.items()} == {
        "z": (4, 30, 3, 2),
        "rate": (4, 30, 3),
    }
    predicted = posterior.predict(KEY, data, 4)
    assert predicted["x"].shape == predicted["mean"].shape == (4, 30, 3)
    np.testing.assert_allclose(
        predicted["mean"], draws["z"].sum(-1) + data[1][:, None], rtol=1e-5, atol=1e-5
    )
    found = posterior.check(KEY, data, checks=("collapse",)).dataset
    assert found["kl_z"].shape == (30, 3, 2)
    assert found["kl_rate"].shape == (30, 3)
    assert found["activity_rate"].shape == (3,)


@pytest.mark.slow
def test_divergences_are_those_of_the_normals(hierarchical):
    posterior = trained(normal_model)
    loc, scale = posterior.encode(X)["z"]
    exact = 0.5 * (scale**2 + loc**2 - 1) - np.log(scale)
    found = posterior.check(KEY, X, checks=("collapse",)).dataset["kl_z"]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


def test_divergence_of_a_positive_site_is_estimated(wide, monkeypatch):
    posterior, data = wide
    loc, scale = posterior.encode(data)["rate"]
    exact = 0.5 * (scale**2 + loc**2 - 1) - np.log(scale)
    monkeypatch.setattr(collapse, "NUM_SAMPLES", 4000)
    found = posterior.check(KEY, data, checks=("collapse",)).dataset["kl_rate"]
    assert np.abs(found - exact).max() < 0.2


def test_evidence_given_the_globals(hierarchical):
    """Close to the exact marginal at each draw of the global, as the guide is."""
    mu = hierarchical.sample(KEY, X, 20, var_names=["mu"])["mu"]
    exact = dist.Normal(mu[:, None], np.sqrt(1.25)).log_prob(X)
    found = hierarchical.log_evidence(KEY, X, 20, num_particles=200)
    assert np.abs(found - exact).mean() < 0.05


def test_data_are_not_echoed():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    posterior = trained(model)
    predicted = posterior.predict(KEY, X, 3)["x"]
    assert not np.isclose(predicted, X).any()


def test_networks_keep_their_training():
    """A network in the model, and batch statistics in the encoder: nothing starts anew."""

    class Normalized(nnx.Module):
        def __init__(self, example_inputs, *, rngs):
            self.linear = nnx.Linear(1, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, inputs):
            return self.dropout(self.norm(self.linear(inputs[:, None])))

    decoder = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def model(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(decode(z[:, None])[:, 0], 0.5), obs=x)

    posterior = trained(model, guide=AutoAmortizedNormal(model, Normalized))
    kernel = posterior.params["decoder$params"]["kernel"]
    bias = posterior.params["decoder$params"]["bias"]
    draws = posterior.sample(KEY, X, 200)["z"]
    predicted = posterior.predict(KEY, X, 200)["x"]
    np.testing.assert_allclose(
        predicted.mean(0), (draws * kernel[0, 0] + bias[0]).mean(0), atol=0.2
    )
    assert np.abs(predicted.mean(0) - X).mean() < 0.5
    first, again = posterior.encode(X)["z"].loc, posterior.encode(X[:10])["z"].loc
    np.testing.assert_allclose(first[:10], again, rtol=1e-4, atol=1e-5)


def test_the_result_of_svi_run_serves_too():
    guide = AutoAmortizedNormal(hierarchical_model, SMALL)
    svi = SVI(hierarchical_model, guide, optax.adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(0), 20, jnp.asarray(X), progress_bar=False)
    expected = Posterior(guide, result).sample(KEY, X, 3)
    fresh = AutoAmortizedNormal(hierarchical_model, SMALL)  # never called: read from the data
    found = Posterior(fresh, result.params).sample(KEY, X, 3)
    np.testing.assert_allclose(found["z"], expected["z"], rtol=1e-5)
    np.testing.assert_allclose(found["mu"], expected["mu"], rtol=1e-5)


# The DataTree


@pytest.fixture(scope="module")
def tree(wide):
    posterior, data = wide
    coords = {"data": [f"row {i}" for i in range(30)]}
    return posterior.to_datatree(KEY, data, 120, coords=coords)


def test_groups_and_dims(tree, wide):
    _, (x, offset) = wide
    assert set(tree.children) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
        "constant_data",
    }
    assert tree["posterior/z"].dims == ("chain", "draw", "data", "items", "z_dim_0")
    assert tree["posterior/mean"].dims == ("chain", "draw", "data", "items")
    assert tree["posterior_predictive/x"].dims == ("chain", "draw", "data", "items")
    assert tree["log_likelihood/x"].dims == ("chain", "draw", "data")
    assert tree["sample_stats/log_weights"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(tree["observed_data/x"], x)
    np.testing.assert_array_equal(tree["constant_data/offset"], offset)
    assert tree["posterior/z"].coords["data"].values[3] == "row 3"


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4", "zarr"])
def test_written_and_read_back(tree, tmp_path, engine):
    path = tmp_path / f"tree.{engine}"
    if engine == "zarr":
        tree.to_zarr(path, zarr_format=2)  # format 3 has no settled form for strings
        found = xr.open_datatree(path, engine="zarr")
    else:
        tree.to_netcdf(path, engine=engine)
        found = xr.open_datatree(path, engine=engine)
    assert set(found.children) == set(tree.children)
    for group in tree.children:
        xr.testing.assert_equal(found[group].to_dataset(), tree[group].to_dataset())


@pytest.fixture(scope="module")
def hierarchical_tree(hierarchical):
    return hierarchical.to_datatree(KEY, X, 300)


def test_arviz_statistics(hierarchical_tree):
    summary = az.summary(hierarchical_tree, var_names=["mu"])
    assert "mean" in summary.columns
    loo = az.loo(hierarchical_tree, pointwise=True)
    assert loo.n_data_points == 60
    log_likelihood = hierarchical_tree["log_likelihood/x"].values[0]
    assert loo.elpd == pytest.approx(log_likelihood.mean(0).sum(), abs=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:arviz_plots")
def test_arviz_plots(hierarchical_tree):
    az.plot_dist(hierarchical_tree, var_names=["mu"])
    az.plot_forest(hierarchical_tree, var_names=["mu", "z"])
    az.plot_pair(hierarchical_tree, var_names=["z"], coords={"data": [0, 1]})
    az.plot_ppc_dist(hierarchical_tree)
    az.plot_khat(az.loo(hierarchical_tree, pointwise=True))


# What a user can get wrong


def test_bad_requests_are_refused(hierarchical):
    with pytest.raises(ValueError, match="num_samples is 0, expected at least 1"):
        hierarchical.sample(KEY, X, 0)
    with pytest.raises(ValueError, match=r"no sites \['w'\] here, choose from \['mu', 'z'\]"):
        hierarchical.sample(KEY, X, 2, var_names=["w"])
    with pytest.raises(ValueError, match=r"no sites \['z'\] here, choose from \['x'\]"):
        hierarchical.predict(KEY, X, 2, var_names=["z"])
    with pytest.raises(ValueError, match="data is empty"):
        hierarchical.encode(X[:0])
    with pytest.raises(ValueError, match="at least 100 draws"):
        hierarchical.check(KEY, X, checks=(Importance(num_samples=50), "collapse"))


def test_another_guides_parameters_are_refused(hierarchical):
    other = AutoAmortizedNormal(hierarchical_model, partial(MLP, hidden_sizes=(9,)))
    with pytest.raises(ValueError, match=r"has shape \(8, 1\), expected \(9, 1\).*another guide"):
        Posterior(other, hierarchical.params).encode(X)
    renamed = AutoAmortizedNormal(hierarchical_model, SMALL, prefix="mine")
    with pytest.raises(ValueError, match=r"of \['z'\] have no 'mine\$params'"):
        Posterior(renamed, hierarchical.params).encode(X)
    with pytest.raises(ValueError, match=r"asks for \['z_auto_loc', 'z_auto_scale'\]"):
        Posterior(AutoNormal(hierarchical_model), hierarchical.params).sample(KEY, X, 2)


def test_data_of_another_shape_are_refused():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
            numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    posterior = trained(model, np.stack([X, X], 1), num_epochs=1)
    with pytest.raises(
        ValueError, match=r"site 'z' has shape \(3,\) for each datum of plate 'data'.*with \(2,\)"
    ):
        posterior.encode(np.stack([X, X, X], 1))


@pytest.mark.slow
def test_deterministic_sites_outside_the_plate():
    """A global that is reparametrized is in the DataTree as it is in the model."""

    def model(x):
        config = {"mu": LocScaleReparam(0.0)}
        with handlers.reparam(config=config):
            mu = numpyro.sample("mu", dist.Normal(1.0, 2.0))
        numpyro.deterministic("twice", 2 * mu)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    result = fit(svi, jax.random.key(0), X, num_epochs=2, progress_bar=False)
    tree = Posterior(guide, result).to_datatree(jax.random.key(1), X, 20)
    assert tree.posterior["mu"].dims == ("chain", "draw")
    expected = 1 + 2 * tree.posterior["mu_decentered"]
    np.testing.assert_allclose(tree.posterior["mu"], expected, rtol=1e-5)
    np.testing.assert_allclose(tree.posterior["twice"], 2 * expected, rtol=1e-5)


@pytest.mark.slow
def test_loo_pit_is_uniform_for_predictions_of_new_data(hierarchical):
    """Of data that the model predicts as new: the local latents of a datum would know its value."""
    tree = hierarchical.to_datatree(KEY, X, 400, marginal=True)
    values = az.loo_pit(tree)["x"].values.ravel()
    error = np.sqrt(1 / 12 / len(X))
    assert abs(values.mean() - 0.5) < 4 * error
    assert abs(values.std() - np.sqrt(1 / 12)) < 0.07
    fitted = az.loo_pit(hierarchical.to_datatree(KEY, X, 400))["x"].values.ravel()
    assert fitted.std() < 0.7 * values.std()
    az.plot_loo_pit(tree, backend="none")
    az.plot_ppc_pit(tree, backend="none")
