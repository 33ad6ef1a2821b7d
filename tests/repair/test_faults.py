"""Rows with a fault of each kind among sound ones: these keep their results, and it is named."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro import handlers

from numpyro_vae import AutoAmortizedNormal, Posterior
from numpyro_vae.repair import methods, nuts
from numpyro_vae.repair.proposals import location_and_scale

KEY = jax.random.key(0)
X = np.linspace(-2, 2, 8, dtype=np.float32)
SOUND, NOWHERE, NAN, INFINITE, LARGE = range(5)
FAULTS = np.array([SOUND, NOWHERE, SOUND, NAN, INFINITE, LARGE, SOUND, SOUND], np.float32)
HOPELESS = [1, 3, 4]


def faulty(x, fault):
    """A conjugate model of which some rows have densities that no model should give."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        cases = [
            (NOWHERE, -jnp.inf),
            (NAN, jnp.nan),
            (INFINITE, jnp.where(z > 0, jnp.inf, 0.0)),
            (LARGE, -1e5),  # whose weights are alike up to rounding, which makes ties
        ]
        numpyro.factor("fault", sum(jnp.where(fault == kind, to, 0.0) for kind, to in cases))


def linear(gain, scale):
    """An encoder with a right mean, and with a scale that is not learned."""
    gain, log_scale = jnp.asarray(gain, jnp.float32), jnp.log(jnp.asarray(scale, jnp.float32))

    class Linear(nnx.Module):
        def __call__(self, x):
            loc = x.reshape(len(x), -1) @ gain
            return loc, jnp.broadcast_to(log_scale, loc.shape)

    return Linear()


def posterior_of(model, encoder, *data, **options):
    guide = AutoAmortizedNormal(model, encoder, **options)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(*data)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    return Posterior(guide, params)


@pytest.fixture(scope="module")
def posterior():
    encoder = linear([[0.8]], [np.sqrt(0.2)])
    return posterior_of(faulty, encoder, X, FAULTS, inputs=lambda x, fault: x)


# -- checks ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_check_names_the_rows_without_finite_weights(posterior):
    report = posterior.check(KEY, (X, FAULTS), ("importance", "gap"), progress_bar=False)
    alone = posterior.check(KEY, (X, np.zeros_like(FAULTS)), "importance", progress_bar=False)
    np.testing.assert_array_equal(np.flatnonzero(report.verdict == 3), HOPELESS)
    assert set(HOPELESS) <= set(report.flagged)
    assert "3 rows have log weights that are not finite, the first is row 1" in str(report)
    assert "possible under the model?" in str(report)
    for name in ("elbo", "log_evidence", "ess"):
        values = report.dataset[name].values
        assert np.isnan(values[HOPELESS]).all()
        np.testing.assert_array_equal(values[FAULTS == SOUND], alone.dataset[name][FAULTS == SOUND])
    assert np.isnan(report.dataset["gap_inference"].values[HOPELESS]).all()
    assert "nan" not in str(report)


def test_a_check_of_no_sound_row_is_an_error(posterior):
    message = r"2 rows have zero importance weight everywhere, the first is row 0"
    with pytest.raises(ValueError, match=message):
        posterior.check(KEY, (X[:2], np.full(2, NOWHERE, np.float32)), progress_bar=False)


# -- repairs --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "refine", "auto"])
def test_a_repair_names_the_rows_that_it_cannot_mend(posterior, method, monkeypatch):
    monkeypatch.setattr(methods, "ROUNDS", (1,))
    monkeypatch.setattr(nuts, "ITERATIONS", 20)
    found = posterior.repair(KEY, (X, FAULTS), range(8), method=method, num_samples=400)
    np.testing.assert_array_equal(found.remaining, HOPELESS)
    draws = found.groups["posterior"]["z"]
    assert np.isfinite(draws).all()
    sound = np.setdiff1d(np.arange(8), HOPELESS)
    assert np.abs(draws.mean(0) - 0.8 * X)[sound].max() <= 0.05 * 3.5
    assert np.isnan(found.dataset["khat"].values[HOPELESS]).all()
    alone = posterior.repair(KEY, (X, FAULTS), sound, method=method, num_samples=400)
    assert not alone.remaining.size


def test_rows_whose_weights_pass_are_resampled_and_no_more(posterior, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("proposals were adapted")

    monkeypatch.setattr(methods, "adapt", never)
    data = (X, np.zeros_like(FAULTS))
    found = posterior.repair(KEY, data, range(8), num_samples=100)
    assert (found.dataset["method"] == "importance").all()
    assert not found.remaining.size


# -- few draws that count -------------------------------------------------------------------------


def correlated(size, number):
    """A model with a correlated Normal posterior, data, and a guide of half the right scale."""
    rng, noise = np.random.default_rng(0), 0.7
    weights = np.eye(size) + 0.6 * rng.normal(size=(size, size)) / np.sqrt(size)
    covariance = np.linalg.inv(np.eye(size) + weights.T @ weights / noise**2)
    gain, sd = weights @ covariance / noise**2, np.sqrt(np.diag(covariance))

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            loc = z @ weights.T.astype(np.float32)
            numpyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)

    z = rng.normal(size=(number, size))
    x = (z @ weights.T + noise * rng.normal(size=z.shape)).astype(np.float32)
    return posterior_of(model, linear(gain, 0.5 * sd), x), x, x @ gain, sd


@pytest.mark.slow
def test_rows_of_which_few_draws_count_are_mended():
    """Those few, resampled over and over, have a covariance that is not of full rank."""
    posterior, x, mean, sd = correlated(5, 3)
    found = posterior.repair(KEY, x, range(3), method="importance", num_samples=1000)
    assert not found.remaining.size
    draws = found.groups["posterior"]["z"]
    assert (np.abs(draws.mean(0) - mean) / sd).max() <= 0.05 * 4.5
    assert np.abs(draws.std(0) / sd - 1).max() <= 0.2


@pytest.mark.slow
def test_rows_of_many_latents_are_mended():
    posterior, x, mean, sd = correlated(20, 2)
    found = posterior.repair(KEY, x, range(2), num_samples=1000)
    assert not found.remaining.size
    assert (np.abs(found.groups["posterior"]["z"].mean(0) - mean) / sd).max() <= 0.05 * 4.5


@pytest.mark.parametrize("number", [1, 3])
def test_the_covariance_of_few_distinct_draws_has_a_factor(number):
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(2, number, 20))
    draws = distinct[:, rng.integers(0, number, 200)]
    center, scale_tril = location_and_scale(draws, np.array([1.5, np.nan]), 1e-6)
    assert np.isfinite(center).all()
    assert (np.diagonal(scale_tril, axis1=1, axis2=2) > 0).all()
    np.testing.assert_allclose((scale_tril[1] ** 2).sum(1), np.maximum(draws[1].var(0), 1e-12))


def test_draws_that_are_not_numbers_are_left_out():
    draws = np.random.default_rng(0).normal(size=(1, 200, 2))
    with_some = np.concatenate([draws, np.full((1, 5, 2), -np.inf)], axis=1)
    for found, expected in zip(
        location_and_scale(with_some, np.array([100.0]), 1e-6),
        location_and_scale(draws, np.array([100.0]), 1e-6),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected)
