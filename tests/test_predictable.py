"""Observed sites that compiled code cannot draw: all else is computed, and the sites are named."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive

from numpyro_vae import Posterior, fit
from numpyro_vae.model.redraw import explain_undrawn, redraw, undrawn
from numpyro_vae.repair import run as repair_run

KEY = jax.random.key(0)
X = np.array([[1, 2], [3, 1], [0, 4]])
Y = np.array([0.1, -0.3, 0.7], np.float32)
DATA = (X.sum(1), X, Y)
NAMED = r"\['x'\] cannot be drawn in compiled code .*total_count_max.*left out of the predictions"


def model(total, x, y):
    """A Multinomial whose total count is data has a density, and no sampler under jit."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        logits = jnp.stack([z, -z], -1)
        numpyro.sample("x", dist.Multinomial(total, logits=logits), obs=x)
        numpyro.sample("y", dist.Normal(z, 0.1), obs=y)


@pytest.fixture(scope="module")
def posterior():
    svi = make_svi(model, inputs=lambda total, x, y: y)
    return Posterior(svi.guide, fit(svi, KEY, DATA, num_epochs=2, progress_bar=False))


@pytest.mark.slow
def test_nothing_is_predicted_for_a_tree_without_predictions(posterior):
    groups = ("posterior", "log_likelihood", "sample_stats")
    tree = posterior.to_datatree(KEY, DATA, 5, groups=groups)
    assert np.isfinite(tree.log_likelihood["joint"]).all()


@pytest.mark.parametrize("marginal", [False, True])
def test_a_tree_has_the_predictions_that_can_be_drawn(posterior, marginal):
    with pytest.warns(UserWarning, match=NAMED):
        tree = posterior.to_datatree(KEY, DATA, 5, marginal=marginal)
    assert list(tree.posterior_predictive) == ["y"]
    assert list(tree.posterior) == ["z"]
    assert set(tree.observed_data) == {"x", "y"}
    assert np.ptp(tree.posterior_predictive["y"].values, axis=1).min() > 0


def test_predictions_are_those_of_the_other_sites(posterior):
    with pytest.warns(UserWarning, match=NAMED):
        found = posterior.predict(KEY, DATA, 500)
    assert list(found) == ["y"]
    draws = posterior.sample(KEY, DATA, 500)
    # As `Predictive` has them, where the other site keeps its observed value.
    expected = Predictive(lambda: model(*DATA[:2], None), draws, batch_ndims=1)(KEY)["y"]
    np.testing.assert_allclose(found["y"].mean(0), expected.mean(0), atol=0.02)
    np.testing.assert_allclose(found["y"].std(0), expected.std(0), rtol=0.1)
    np.testing.assert_array_equal(
        posterior.predict(KEY, DATA, 500, var_names=["y"])["y"], found["y"]
    )
    with pytest.raises(ValueError, match=r"\['x'\] cannot be drawn in compiled code"):
        posterior.predict(KEY, DATA, 500, var_names=iter(["x"]))


@pytest.mark.slow
def test_predictions_of_nothing_are_an_error():
    def alone(total, x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Multinomial(total, logits=jnp.stack([z, -z], -1)), obs=x)

    svi = make_svi(alone, inputs=lambda total, x: x)
    posterior = Posterior(svi.guide, fit(svi, KEY, DATA[:2], num_epochs=2, progress_bar=False))
    with pytest.raises(ValueError, match=r"Give a distribution of counts total_count_max="):
        posterior.predict(KEY, DATA[:2], 5)
    with pytest.warns(UserWarning, match=NAMED):
        tree = posterior.to_datatree(KEY, DATA[:2], 5)
    assert "posterior_predictive" not in tree.children
    assert np.isfinite(tree.log_likelihood["x"]).all()


def test_a_repair_has_the_latents_and_what_can_be_predicted(posterior):
    with pytest.warns(UserWarning, match=NAMED):
        found = posterior.repair(KEY, DATA, range(3), method="importance", num_samples=50)
    assert list(found.groups["posterior_predictive"]) == ["y"]
    assert found.groups["posterior"]["z"].shape == (50, 3)
    assert not found.remaining.size


def test_a_repair_is_not_lost_with_its_predictions(posterior, monkeypatch):
    finish = repair_run.finish

    def failing(*args, groups, **options):
        if "posterior_predictive" in groups:
            raise RuntimeError("out of luck")
        return finish(*args, groups=groups, **options)

    monkeypatch.setattr(repair_run, "finish", failing)
    monkeypatch.setattr(repair_run, "undrawn_sites", lambda *_: {})
    posterior.guide.compiled.clear()
    with pytest.warns(UserWarning, match=r"Nothing could be predicted .* out of luck"):
        found = posterior.repair(KEY, DATA, range(3), method="importance", num_samples=50)
    assert found.groups["posterior"]["z"].shape == (50, 3)
    assert list(found.groups) == ["posterior"]
    posterior.guide.compiled.clear()


@pytest.mark.slow
def test_checks_that_draw_data_do_not_apply(posterior):
    report = posterior.check(KEY, DATA, "all", progress_bar=False)
    assert {"predictive", "calibration"} <= set(report.skipped)
    assert "total_count_max" in report.skipped["predictive"]
    assert "khat" in report.dataset


def test_without_observations_latents_come_from_their_prior():
    def regression(x, y=None):
        with numpyro.plate("data", len(x)):
            slope = numpyro.sample("slope", dist.Normal(3.0, 0.1))
            numpyro.deterministic("mean", slope * x)
            numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    svi = make_svi(regression)
    result = fit(svi, KEY, (Y, Y), num_epochs=1, progress_bar=False)
    posterior = Posterior(svi.guide, result)
    found = posterior.predict(KEY, (Y,), 1000)
    assert set(found) == {"mean", "y"}
    error = np.abs(found["mean"].mean(0) - 3.0 * Y) / np.abs(0.1 * Y) * np.sqrt(1000)
    assert error.max() < 4
    np.testing.assert_allclose(found["y"].std(0), np.sqrt(0.25 + (0.1 * Y) ** 2), rtol=0.1)
    tree = posterior.to_datatree(KEY, (Y,), 4, groups=("posterior", "posterior_predictive"))
    assert tree.posterior_predictive["y"].shape == (1, 4, 3)


def series(x, future=0):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        for step in range(x.shape[1] + future):
            seen = x[:, step] if step < x.shape[1] else None
            z = numpyro.sample(f"x{step}", dist.Normal(0.9 * z, 0.2), obs=seen)


def test_latents_of_a_forecast_change_no_weight():
    """They are drawn from the model, with a density that is their proposal's too."""
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    svi = make_svi(series)
    params = svi.get_params(svi.init(KEY, x))
    known = Posterior(svi.guide, params).log_weights(KEY, x, 4)
    ahead = Posterior(svi.guide, params, static_kwargs={"future": 2})
    np.testing.assert_allclose(ahead.log_weights(KEY, x, 4), known, rtol=1e-6)


def walk(x, future=0):
    def step(z, _):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("x", dist.Normal(0.9 * z, 0.2))
        return z, None

    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with handlers.condition(data={"x": x.T}):
        scan(step, z, None, length=x.shape[1] + future)


@pytest.mark.filterwarnings(  # of NumPyro's scan, about its own replay
    "ignore:shape requires ndarray or scalar arguments, got <class 'dict'>:DeprecationWarning"
)
def test_a_forecast_that_takes_the_observations_away_is_said():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    svi = make_svi(walk)
    result = fit(svi, KEY, x, num_epochs=1, progress_bar=False)
    ahead = Posterior(svi.guide, result, static_kwargs={"future": 2})
    with pytest.warns(UserWarning, match=r"'x' is observed, of shape \(3,\).*of shape \(5,\)"):
        assert ahead.predict(KEY, x, 4)["x"].shape == (4, 5, 5)


def test_totals_that_are_floats_are_to_be_integers():
    def counts(total):
        with numpyro.plate("data", len(total)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Binomial(total, logits=z), obs=total)

    def told(total):
        trace = handlers.trace(handlers.seed(redraw(counts), KEY)).get_trace(total)
        reasons.append(explain_undrawn(undrawn(trace)) if undrawn(trace) else "")

    reasons = []
    jax.eval_shape(told, jnp.array([3.0, 2.0]))
    jax.eval_shape(told, jnp.array([3, 2]))
    assert "'x': Indexer must have integer" in reasons[0]
    assert "total_count as integers, as with .astype(int)" in reasons[0]
    assert not reasons[1]
