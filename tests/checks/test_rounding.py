"""Densities that float32 cannot carry are told, and others cost nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from helpers import make_svi
from numpyro.infer import Trace_ELBO
from scipy.special import gammaln

from numpyro_vae import Importance, Posterior
from numpyro_vae.inference import rounding

KEY = jax.random.key(1)
NUM_ROWS = 40


class NearlyExact(nnx.Module):
    """The posterior of a rate given a count, as good as exact if the count is large."""

    def __call__(self, x):
        x = jnp.asarray(x).reshape(len(x), 1)
        return jnp.log(x), -jnp.log(x) / 2


def plain(x):
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.LogNormal(jnp.log(x.mean()), 1.0))
        numpyro.sample("x", dist.Poisson(rate), obs=x)


def subsampled(x):
    with numpyro.plate("data", len(x), subsample_size=10) as rows:
        rate = numpyro.sample("rate", dist.LogNormal(jnp.log(x.mean()), 1.0))
        numpyro.sample("x", dist.Poisson(rate), obs=x[rows])


def hierarchical(x):
    level = numpyro.sample("level", dist.Normal(16.0, 1.0))
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.LogNormal(level, 1.0))
        numpyro.sample("x", dist.Poisson(rate), obs=x)


def posterior_of(model, x, **options):
    svi = make_svi(model, NearlyExact(), loss=Trace_ELBO())
    params = svi.get_params(svi.init(KEY, jnp.asarray(x)))
    return Posterior(svi.guide, params, **options)


def counts(level):
    return np.random.default_rng(0).poisson(level, NUM_ROWS).astype(np.float32)


def told(report):
    return [finding for finding in report.findings if "float32 is too coarse" in finding.text]


def check(posterior, x):
    return posterior.check(KEY, x, Importance(200), progress_bar=False)


@pytest.fixture(scope="module")
def large():
    """Counts of ten million, the posterior, and the report on them."""
    x = counts(1e7)
    posterior = posterior_of(plain, x)
    return x, posterior, check(posterior, x)


def exact_log_evidence(x):
    """That of `plain`, by integration in float64."""
    x, steps = x.astype(float), np.linspace(-8.0, 8.0, 1001)
    log_rate = np.log(x)[:, None] + steps / np.sqrt(x)[:, None]
    log_p = x[:, None] * log_rate - np.exp(log_rate) - gammaln(x + 1)[:, None]
    log_p -= (log_rate - np.log(x.mean())) ** 2 / 2 + np.log(2 * np.pi) / 2
    highest = log_p.max(1)
    mass = np.exp(log_p - highest[:, None]).sum(1) * (log_rate[:, 1] - log_rate[:, 0])
    return highest + np.log(mass)


def test_the_error_that_is_told_is_that_of_the_log_evidence(large):
    x, _, report = large
    (finding,) = told(report)
    assert not finding.ok
    assert "numpyro.enable_x64()" in finding.advice
    assert str(finding) in str(report)
    error = np.abs(report.dataset["log_evidence"] - exact_log_evidence(x)).max()
    assert error > 1  # nats, of which the Monte Carlo error shows nothing
    assert error > 10 * report.dataset["log_evidence_mcse"].max()
    assert 0.5 < report.dataset["rounding_error"].max() / error < 2
    assert (report.verdict >= 2).all()  # k-hats and divergences are of noise


def test_under_x64_nothing_is_told_as_nothing_is_wrong():
    with jax.enable_x64(True):
        x = counts(1e7)
        report = check(posterior_of(plain, x), x)
        assert not told(report)
        assert "rounding_error" not in report.dataset
        error = np.abs(report.dataset["log_evidence"] - exact_log_evidence(x)).max()
        assert error < 1e-2


def test_integers_are_values_too():
    x = counts(1e7).astype(np.int32)
    assert told(check(posterior_of(plain, x), x))


@pytest.mark.parametrize("model", [subsampled, hierarchical])
def test_models_of_other_kinds(model, large):
    x, _, report = large
    (finding,) = told(check(posterior_of(model, x), x))
    error = float(finding.text.split()[-2])
    assert 0.3 < error / report.dataset["rounding_error"].max() < 3


def test_it_is_told_of_the_rows_that_have_it():
    """Small counts beside large ones are judged as ever."""
    x = counts(1e7)
    x[::2] = counts(100.0)[::2]
    report = check(posterior_of(hierarchical, x), x)
    errors = report.dataset["rounding_error"].values
    assert (errors[::2] == 0).all()
    assert (errors[1::2] > 1).all()
    assert (report.verdict[1::2] >= 2).all()
    assert (report.verdict[::2] < 2).any()
    assert "of 20 of 40 rows" in str(report)
    assert not told(report.isel(data=slice(0, None, 2)))


def test_rows_that_are_not_measured_have_the_error_of_the_next_larger(large, monkeypatch):
    x, posterior, report = large
    monkeypatch.setattr(rounding, "NUM_ROWS", 4)
    found = check(posterior, x).dataset["rounding_error"].values
    assert np.unique(found).size <= 4
    assert found[x.argmax()] == report.dataset["rounding_error"].values[x.argmax()]


@pytest.mark.slow
def test_a_report_with_it_is_cut_and_saved(large, tmp_path):
    x, posterior, report = large
    report.add_to(posterior.to_datatree(KEY, x, 10)).to_netcdf(tmp_path / "tree.nc")
    assert "rounding_error" in report.isel(data=slice(3)).dataset


def test_data_that_are_taken_whole():
    x = counts(1e7)
    assert told(check(posterior_of(plain, x, batch_axes=None), x))


def test_large_values_alone_are_no_error():
    """Only a reason to look: a Normal's terms do not cancel."""

    def model(x, year):
        with numpyro.plate("data", len(x)):
            rate = numpyro.sample("rate", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(rate + 0 * year, 1.0), obs=x)

    svi = make_svi(model, inputs=lambda x, year: x, loss=Trace_ELBO())
    data = np.linspace(-1, 1, NUM_ROWS, dtype=np.float32), np.full(NUM_ROWS, 1e9, np.float32)
    posterior = Posterior(svi.guide, svi.get_params(svi.init(KEY, *data)))
    report = check(posterior, data)
    assert report.dataset["rounding_error"].max() < 1e-3
    assert not told(report)


@pytest.mark.parametrize("level", [1.0, 1000.0])
def test_ordinary_data_cost_nothing(level, monkeypatch):
    def measured(*args):
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(rounding, "_measured", measured)
    monkeypatch.setattr(rounding, "_bound", measured)
    x = counts(level) + 1
    report = check(posterior_of(plain, x), x)
    assert not told(report)
    assert "rounding_error" not in report.dataset


def test_the_largest_values_are_those_of_all_arguments_by_row():
    def model(x, y, there, scale):
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Normal(0.0, scale))
            mean = jnp.where(there, z, 0.0)
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=jnp.nan_to_num(x).sum(0))
            numpyro.sample("y", dist.Poisson(jnp.exp(z)), obs=y)

    x = np.array([[1.0, np.nan, -7.0], [2.0, 0.5, 3.0]], np.float32)
    data = x, np.array([4, 5, 6]), np.array([True, False, True]), np.float32(0.25)
    guide = make_svi(model, inputs=lambda x, y, there, scale: y[:, None]).guide
    rows = Posterior(guide, {}, batch_axes=(1, 0, 0, None))._runner.read(data)
    np.testing.assert_array_equal(rounding._largest_values(rows.data, rows.num_rows), [4, 5, 7])


def test_a_model_that_cannot_run_in_float64_is_bounded():
    def model(x):
        with numpyro.plate("data", len(x)):
            rate = numpyro.sample("rate", dist.LogNormal(16.0, 1.0))
            start = jnp.zeros(len(x), jnp.float32)
            rate, _ = jax.lax.scan(lambda total, _: (total + rate, None), start, None, 1)
            numpyro.sample("x", dist.Poisson(rate), obs=x)

    x = counts(1e7)
    report = check(posterior_of(model, x), x)
    assert told(report)
    # Half a unit in the last place of 1e7: that terms of the density are larger is not known.
    np.testing.assert_allclose(report.dataset["rounding_error"], 0.6, rtol=0.1)
