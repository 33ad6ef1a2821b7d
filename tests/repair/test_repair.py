"""Repaired draws against exact posteriors, and against numerical integration."""

from dataclasses import replace

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from helpers import train
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, Calibration, Posterior, SetEncoder
from numpyro_vae.repair import methods

KEY = jax.random.key(2)
NUM_SAMPLES, NUM_ROWS = 4000, 30
RNG = np.random.default_rng(0)
GRID = np.linspace(-6, 6, 801)


def conjugate(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def banana(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z[..., 1] + z[..., 0] ** 2, 0.2), obs=x)


def bimodal(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z**2, 0.5), obs=x)


def fitted(model, x, num_steps=1500):
    guide = AutoAmortizedNormal(model)
    return train(guide, x, steps=num_steps, rate=5e-3, loss=Trace_ELBO, particles=1)


def simulated(model):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 2))
    mean = {conjugate: z[:, 0], banana: z[:, 1] + z[:, 0] ** 2, bimodal: z[:, 0] ** 2}[model]
    noise = 0.2 if model is banana else 0.5
    return (mean + noise * rng.normal(size=500)).astype(np.float32)


def integrated(model, x):
    """Mean and sd of each datum's latents, on a grid."""
    if model is banana:
        z = np.stack(np.meshgrid(GRID, GRID, indexing="ij"), -1).reshape(-1, 2)
        residual = (x[:, None] - z[:, 1] - z[:, 0] ** 2) / 0.2
    else:
        z = GRID[:, None]
        residual = (x[:, None] - (z[:, 0] ** 2 if model is bimodal else z[:, 0])) / 0.5
    log_p = -(z**2).sum(1) / 2 - residual**2 / 2
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mean = p @ z
    return mean, np.sqrt(p @ z**2 - mean**2)


def errors(repair, exact):
    """Errors of means in posterior sds, and ratios of sds."""
    draws = repair.groups["posterior"]["z"].reshape(NUM_SAMPLES, len(exact[0]), -1)
    return np.abs(draws.mean(0) - exact[0]) / exact[1], draws.std(0) / exact[1]


@pytest.fixture(scope="module", params=[banana, bimodal], ids=lambda model: model.__name__)
def bent(request):
    x = simulated(request.param)
    return request.param, fitted(request.param, x), x[:NUM_ROWS]


@pytest.fixture(scope="module")
def wrong():
    """A guide of a conjugate model after a few steps of training: wrong everywhere."""
    x = simulated(conjugate)
    return fitted(conjugate, x, 30), x[:NUM_ROWS]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "refine", "nuts"])
def test_every_method_finds_the_exact_posterior(wrong, method):
    posterior, x = wrong
    found = posterior.repair(KEY, x, np.arange(NUM_ROWS), method=method, num_samples=NUM_SAMPLES)
    error, ratio = errors(found, (0.8 * x[:, None], np.full((NUM_ROWS, 1), np.sqrt(0.2))))
    assert found.dataset["passed"].values.all()
    # Each row's mean has a Monte Carlo error of a twentieth of an sd at 400 effective draws.
    assert error.mean() <= 0.05
    assert error.max() <= 0.05 * 3.5
    assert abs(ratio.mean() - 1) <= 0.01
    assert np.abs(ratio - 1).max() <= 0.15
    if method == "nuts":
        assert (found.dataset["rhat"] < 1.01).all()
        assert (found.dataset["ess"] >= 400).all()
    else:
        assert (found.dataset["khat"] < 0.7).all()
        evidence = dist.Normal(0, np.sqrt(1.25)).log_prob(x)
        assert np.abs(found.dataset["log_evidence"].values - evidence).max() <= 0.1
    if method == "refine":
        assert (found.dataset["converged"] == 1).all()


@pytest.mark.slow
def test_what_the_guide_gets_wrong_is_flagged_and_repaired(bent):
    model, posterior, x = bent
    report = posterior.check(jax.random.key(1), x, checks=("importance",))
    assert len(report.flagged) >= NUM_ROWS // 10
    exact = integrated(model, x)
    found = posterior.repair(KEY, x, np.arange(NUM_ROWS), num_samples=NUM_SAMPLES)
    assert not found.remaining.size
    error, ratio = errors(found, exact)
    assert error.mean() <= 0.05
    assert error.max() <= 0.05 * 4
    assert np.abs(ratio - 1).max() <= 0.15
    # As it was, the guide is far off.
    before = posterior.sample(KEY, x, NUM_SAMPLES)["z"].reshape(NUM_SAMPLES, NUM_ROWS, -1)
    flagged = report.flagged
    assert np.abs(before.std(0) / exact[1] - 1)[flagged].max() > 0.3


def test_the_flagged_rows_of_a_report_are_repaired(wrong):
    posterior, x = wrong
    report = posterior.check(jax.random.key(1), x, checks=("importance",))
    # Of a guide that is wrong everywhere, half of the rows are to be those that fail.
    dataset = report.dataset
    close = float(dataset["divergence"].median())
    dataset = dataset.assign_attrs(max_divergence=close, khat_threshold=np.inf)
    dataset = dataset.assign(khat=dataset["khat"] * 0, divergence_mcse=dataset["khat"] * 0)
    report = replace(report, dataset=dataset)
    found = posterior.repair(KEY, x, report, method="importance", num_samples=100)
    assert 0 < len(report.flagged) < NUM_ROWS
    np.testing.assert_array_equal(found.rows, report.flagged)


@pytest.mark.slow
def test_a_method_gets_the_rows_that_fail_with_the_methods_before_it(wrong, monkeypatch):
    posterior, x = wrong
    monkeypatch.setattr(methods, "MIN_ESS", 9200.0)  # so many that some rows fail with each method
    monkeypatch.setattr(methods, "ROUNDS", (1,))
    found = posterior.repair(KEY, x, np.arange(NUM_ROWS), num_samples=100)
    made_by, left = found.dataset["method"].values, found.rows
    for method in ("importance", "refine"):
        alone = posterior.repair(KEY, x, left, method=method, num_samples=100)
        passed = alone.dataset["passed"].values
        assert 0 < passed.sum() < len(left)
        np.testing.assert_array_equal(made_by[left] == method, passed)
        assert f"repaired by {method} {passed.sum():{17 - len(method)}d}\n" in str(found)
        left = left[~passed]
    assert (made_by[left] == "nuts").all()
    np.testing.assert_array_equal(found.remaining, left)
    assert str(found).startswith(f"{NUM_ROWS} rows\n")
    assert str(found).endswith(f"not repaired {len(left):17d}")


@pytest.mark.slow
def test_only_the_rows_asked_for_change(bent, tmp_path):
    _, posterior, x = bent
    rows = np.array([7, 2, 11])
    before = posterior.to_datatree(KEY, x, 100, coords={"data": np.arange(50, 50 + NUM_ROWS)})
    found = posterior.repair(KEY, x, rows, method="importance", num_samples=100)
    found.add_to(before).to_netcdf(tmp_path / "tree.nc")
    others = np.setdiff1d(np.arange(NUM_ROWS), rows)
    with xr.open_datatree(tmp_path / "tree.nc") as tree:
        for group, name in (("posterior", "z"), ("posterior_predictive", "x")):
            new, old = tree[group][name], before[group][name]
            xr.testing.assert_equal(new.isel(data=others), old.isel(data=others))
            for place, row in enumerate(np.sort(rows)):
                expected = found.groups[group][name][:, place]
                np.testing.assert_array_equal(new.isel(chain=0, data=row), expected)
        assert (tree.sample_stats["log_weights"].isel(data=rows) == 0).all()
        method = tree["repair"]["method"]
        assert (method.isel(data=rows) == "importance").all()
        assert (method.isel(data=others) == "amortized").all()
        assert tree["repair"]["data"].values[0] == 50
    assert (before.sample_stats["log_weights"] != 0).all()  # and the tree that was given did not


FILES = {
    "h5netcdf": (
        lambda tree, path: tree.to_netcdf(path, engine="h5netcdf"),
        lambda path: xr.open_datatree(path, engine="h5netcdf"),
    ),
    "netcdf4": (
        lambda tree, path: tree.to_netcdf(path, engine="netcdf4"),
        lambda path: xr.open_datatree(path, engine="netcdf4"),
    ),
    "arviz": (lambda tree, path: tree.to_netcdf(path), az.from_netcdf),
    "zarr": (
        lambda tree, path: tree.to_zarr(path, consolidated=False),
        lambda path: xr.open_datatree(path, engine="zarr", consolidated=False),
    ),
}


@pytest.fixture(scope="module")
def repaired_tree(wrong):
    posterior, x = wrong
    tree = posterior.to_datatree(KEY, x, 50, coords={"data": np.arange(50, 50 + NUM_ROWS)})
    return tree, posterior.repair(KEY, x, [7, 2, 11], method="importance", num_samples=50)


@pytest.mark.parametrize(("write", "read"), FILES.values(), ids=FILES)
def test_a_tree_from_a_file_is_repaired_as_one_in_memory(repaired_tree, write, read, tmp_path):
    tree, repaired = repaired_tree
    write(tree, tmp_path / "tree")
    with read(tmp_path / "tree") as opened:
        xr.testing.assert_identical(repaired.add_to(opened), repaired.add_to(tree))
        xr.testing.assert_identical(opened, tree)


def test_a_tree_in_memory_does_not_change(repaired_tree):
    tree, repaired = repaired_tree
    before = tree.copy(deep=True)
    repaired.add_to(tree)
    xr.testing.assert_identical(tree, before)


def test_a_tree_keeps_what_else_it_holds(repaired_tree):
    tree, repaired = repaired_tree
    tree = tree.assign({"more": xr.DataTree(xr.Dataset({"y": 1.0}))})
    tree.attrs["by"] = "me"
    new = repaired.add_to(tree)
    assert new.attrs == tree.attrs
    assert list(new.children) == [*tree.children, "repair"]
    assert new["more"]["y"] == 1.0


def test_no_rows_are_no_work(wrong):
    posterior, x = wrong
    found = posterior.repair(KEY, x, [], num_samples=50)
    tree = found.add_to(posterior.to_datatree(KEY, x, 50))
    assert (tree["repair"]["method"] == "amortized").all()


def test_the_same_key_gives_the_same_draws_whatever_else_is_repaired(wrong):
    posterior, x = wrong
    some = posterior.repair(KEY, x, [3, 9], method="importance", num_samples=200)
    mask = np.isin(np.arange(NUM_ROWS), [3, 9])
    again = posterior.repair(KEY, x, mask, method="importance", num_samples=200)
    np.testing.assert_array_equal(some.groups["posterior"]["z"], again.groups["posterior"]["z"])


@pytest.mark.slow
def test_what_is_computed_of_all_rows_is_left_out():
    """The tree has it of the guide's draws, and the repair knows a few rows alone."""

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.deterministic("twice", 2 * z)
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        numpyro.deterministic("total", z.sum())
        numpyro.deterministic("shift", mu + 1)

    x = simulated(conjugate)[:9]
    posterior = fitted(model, x, 5)
    tree = posterior.to_datatree(KEY, x, 50)
    with pytest.warns(UserWarning, match=r"\['total'\] of 'posterior' are not functions of the"):
        new = posterior.repair(KEY, x, [2, 3], num_samples=50).add_to(tree)
    assert set(new.posterior) == {"mu", "z", "twice", "shift"}
    np.testing.assert_array_equal(new.posterior["twice"], 2 * new.posterior["z"])
    changed = (new.posterior["z"] != tree.posterior["z"]).any(("chain", "draw"))
    assert changed.values.nonzero()[0].tolist() == [2, 3]


def hierarchical(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "nuts"])
def test_globals_are_held_at_draws_of_their_posterior(method):
    """Given a draw of the global, a row's posterior is exact, and their mixture is drawn from."""
    x = simulated(conjugate)[:60] + 2
    posterior = fitted(hierarchical, x, 400)
    found = posterior.repair(KEY, x, [0, 5], method=method, num_samples=NUM_SAMPLES)
    mu = posterior.sample(KEY, x, 2000, var_names=["mu"])["mu"]
    mean = 0.8 * x[[0, 5]] + 0.2 * mu.mean()
    sd = np.sqrt(0.2 + 0.04 * mu.var())
    draws = found.groups["posterior"]["z"]
    error = np.abs(draws.mean(0) - mean) / sd
    assert found.dataset["passed"].values.all()
    assert error.max() <= 0.15  # no better than 32 draws of mu allow
    assert np.abs(draws.std(0) / sd - 1).max() <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "refine", "nuts"])
def test_latents_that_the_model_masks_do_not_matter(method):
    there = np.ones((NUM_ROWS, 3), bool)
    there[::2, 1] = there[1::3, 2] = False

    def model(x, there):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).mask(there).to_event(1))
            numpyro.sample("x", dist.Normal(z, 0.5).mask(there).to_event(1), obs=x)

    x = (np.sqrt(1.25) * RNG.normal(size=(NUM_ROWS, 3))).astype(np.float32)
    guide = AutoAmortizedNormal(model, inputs=lambda x, there: x * there)
    svi = SVI(model, guide, optax.adam(5e-3), Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, x, there, progress_bar=False)
    posterior = Posterior(guide, result)
    found = posterior.repair(KEY, (x, there), range(8), method=method, num_samples=NUM_SAMPLES)
    assert found.dataset["passed"].values.all()
    draws = found.groups["posterior"]["z"]
    error = np.abs(draws.mean(0) - 0.8 * x[:8]) / np.sqrt(0.2)
    assert error[there[:8]].max() <= 0.05 * 4
    assert np.abs(draws.std(0) / np.sqrt(0.2) - 1)[there[:8]].max() <= 0.15


@pytest.mark.slow
def test_groups_whose_data_lie_in_another_plate():
    """Given the data whole, results of the other plate stay whole, and rows are those of groups."""
    group = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])

    def model(group, y):
        with numpyro.plate("groups", 6):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("houses", len(y)):
            numpyro.sample("y", dist.Normal(z[group], 0.5), obs=y)

    y = (RNG.normal(size=6)[group] + 0.5 * RNG.normal(size=21)).astype(np.float32)
    guide = AutoAmortizedNormal(model, SetEncoder, segments={"houses": lambda group, y: group})
    svi = SVI(model, guide, optax.adam(5e-3), Trace_ELBO())
    result = svi.run(jax.random.key(0), 30, group, y, progress_bar=False)
    posterior, data = Posterior(guide, result, batch_axes=None), (group, y)
    tree = posterior.to_datatree(KEY, data, NUM_SAMPLES)
    assert tree.observed_data.sizes["houses"] == 21
    assert tree.posterior_predictive.sizes["houses"] == 21
    posterior.check(KEY, data, ("importance", Calibration(num_simulations=60)))
    found = posterior.repair(KEY, data, [1, 4], num_samples=NUM_SAMPLES)
    precision = 1 + 4 * np.array([2, 5])
    mean = np.array([4 * y[group == row].sum() for row in (1, 4)]) / precision
    draws = found.groups["posterior"]["z"]
    assert found.dataset["passed"].values.all()
    assert np.abs((draws.mean(0) - mean) * np.sqrt(precision)).max() <= 0.05 * 4
    with pytest.warns(UserWarning, match=r"\['y'\] of 'posterior_predictive' are not functions"):
        new = found.add_to(tree)
    assert "y" not in new.posterior_predictive
    np.testing.assert_array_equal(new.posterior["z"][0, :, [1, 4]], draws)
    others = [0, 2, 3, 5]
    np.testing.assert_array_equal(new.posterior["z"][..., others], tree.posterior["z"][..., others])


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([30], {}, r"There is no row 30: the data have 30 rows, 0 to 29"),
        ([-1], {}, r"There is no row -1"),
        ([0.5], {}, r"rows has values of type float64, expected the numbers"),
        (np.ones(5, bool), {}, r"The data have 30 rows, and rows= has shape \(5,\)"),
        ([0], {"method": "mcmc"}, r"method is 'mcmc', expected 'auto' or one of"),
        ([0], {"num_samples": 0}, r"num_samples is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_repaired_is_refused(wrong, rows, options, message):
    posterior, x = wrong
    with pytest.raises(ValueError, match=message):
        posterior.repair(KEY, x, rows, **options)


@pytest.mark.slow
def test_a_tree_of_other_draws_is_refused(wrong):
    posterior, x = wrong
    found = posterior.repair(KEY, x, [3], method="importance", num_samples=100)
    for tree in (posterior.to_datatree(KEY, x, 50), posterior.to_datatree(KEY, x[:3], 100)):
        with pytest.raises(ValueError, match=r"Pass the tree of the same data, with as many draws"):
            found.add_to(tree)


def test_a_report_on_other_data_is_refused(wrong):
    posterior, x = wrong
    report = posterior.check(KEY, x, checks="importance")
    message = r"The report is on 30 rows of data, and the data have 10.*Pass the data that were ch"
    with pytest.raises(ValueError, match=message):
        posterior.repair(KEY, x[:10], report)
