"""The checks against weights whose answer is known."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from flax import nnx
from models import normal_model
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, psis_diagnostic

from numpyro_vae import (
    MLP,
    AutoAmortizedDelta,
    AutoAmortizedNormal,
    Importance,
    Posterior,
    fit,
)
from numpyro_vae.inference.psis import khat_threshold, pareto_khat

X = np.linspace(-2, 2, 64, dtype=np.float32)
KEY = jax.random.key(0)


class Affine(nnx.Module):
    """An encoder that is right but for a factor on its scale, and silent in its last dimension."""

    def __init__(self, factor, size=1):
        self.factor, self.size = factor, size

    def __call__(self, inputs):
        precision = 1 + 1 / 0.25
        loc = (inputs / 0.25 / precision)[:, None]
        log_scale = jnp.full_like(loc, jnp.log(self.factor * precision**-0.5))
        silent = jnp.zeros((len(inputs), self.size - 1))
        return jnp.concatenate([loc, silent], 1), jnp.concatenate([log_scale, silent], 1)


def posterior_with(factor):
    guide = AutoAmortizedNormal(normal_model, Affine(factor))
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    return Posterior(guide, params)


def test_the_exact_posterior_has_equal_weights():
    found = posterior_with(1.0).check(KEY, X, ("importance", "collapse"))
    exact = dist.Normal(0, np.sqrt(1.25)).log_prob(X)
    np.testing.assert_allclose(found.dataset["elbo"], exact, atol=1e-4)
    np.testing.assert_allclose(found.dataset["log_evidence"], exact, atol=1e-4)
    np.testing.assert_allclose(found.dataset["ess"], 1000, rtol=1e-4)
    assert (found.verdict == 0).all()


def test_too_wide_a_guide_can_be_reweighted_but_is_not_tight():
    found = posterior_with(2.0).check(KEY, X, Importance(num_samples=20_000))
    exact = np.asarray(dist.Normal(0, np.sqrt(1.25)).log_prob(X))
    gap = np.log(2.0)  # KL(q | p) is (factor^2 - 1) / 2 - log(factor)
    np.testing.assert_allclose(exact - found.dataset["elbo"], 1.5 - gap, atol=0.1)
    errors = (found.dataset["log_evidence"] - exact) / found.dataset["log_evidence_mcse"]
    assert 0.6 < errors.std() < 1.5
    assert (found.dataset["khat"] < 0.7).all()
    assert (found.verdict == 1).all()


@pytest.mark.parametrize(("factor", "verdict"), [(0.8, 0), (0.25, 3)])
def test_too_narrow_a_guide_is_flagged(factor, verdict):
    r"""For a Normal of relative scale ``r < 1`` the weights' tail has shape ``1 - r^2``."""
    found = posterior_with(factor).check(KEY, X, Importance(num_samples=20_000))
    khat = found.dataset["khat"].values
    assert np.median(khat) == pytest.approx(1 - factor**2, abs=0.25)
    if verdict == 0:
        assert (found.verdict == 0).mean() > 0.95
    else:
        assert (found.verdict > 0).mean() > 0.9


def test_khat_of_known_tails():
    """Weights with a Pareto tail of a given shape, and that of a uniform without one."""
    uniform = np.random.default_rng(0).uniform(size=(20_000, 3))
    shapes = np.array([0.3, 0.6, 0.9])
    khat = pareto_khat(-shapes * np.log(uniform))
    standard_error = (1 + shapes) / np.sqrt(3 * np.sqrt(20_000))  # of a tail of 3 sqrt(S) draws
    assert (np.abs(khat - shapes) < 3 * standard_error).all()
    assert pareto_khat(np.log(uniform))[0] < 0
    assert (pareto_khat(np.zeros((200, 2))) == -np.inf).all()


def khats_by_numpyro(posterior, x, num_samples, number):
    """Pareto k-hats of all data together, as NumPyro has them, by several keys."""
    args = posterior.params, posterior.guide.model, posterior.guide, x
    keys = jax.random.split(KEY, number)
    return np.array([psis_diagnostic(key, *args, num_particles=num_samples) for key in keys])


def test_khat_of_one_row_is_that_of_numpyro():
    posterior, number, keys = posterior_with(0.5), 20_000, 6
    theirs = khats_by_numpyro(posterior, X[:1], number, keys).mean()
    # The weights of this model have the same distribution in every row.
    ours = posterior.check(KEY, X, Importance(num_samples=number)).dataset["khat"].mean()
    standard_error = (1 + ours) / np.sqrt(3 * np.sqrt(number))
    assert abs(ours - theirs) <= 3 * standard_error * np.sqrt(1 / keys + 1 / len(X))


def test_all_rows_together_have_a_bad_khat_though_each_is_fine():
    posterior = posterior_with(0.8)
    assert khats_by_numpyro(posterior, np.tile(X, 8), 2000, 1) > 0.7
    assert (posterior.check(KEY, X).verdict == 0).mean() > 0.95


def test_threshold_is_the_published_one():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    assert khat_threshold(100_000) == 0.7


def test_a_silent_dimension_has_collapsed():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(z[:, 0], 0.5), obs=x)

    guide = AutoAmortizedNormal(model, Affine(1.0, size=2))
    posterior = Posterior(guide, {"auto$params": {}})
    found = posterior.check(KEY, X, "collapse", coords={"data": np.arange(100, 164)})
    assert found.collapsed() == {"z": (1, 2)}
    assert found.dataset["kl_z"].dims == ("data", "z_dim_0")
    assert found.dataset["data"].values[0] == 100


def test_summary_is_for_a_person():
    found = posterior_with(0.5).check(KEY, X, ("importance", "collapse"))
    text = str(found)
    assert "64 data, 1000 draws of each" in text
    assert "0 of 1 dimensions of site 'z' have collapsed to the prior" in text
    for verdict, label in enumerate(("fine", "reweight", "borderline", "not to be trusted")):
        (count,) = re.findall(rf"{label} +(\d+)", text)
        assert int(count) == (found.verdict == verdict).sum()
    (elbo,) = re.findall(r"elbo +(-[\d.]+) nats", text)
    assert float(elbo) == pytest.approx(float(found.dataset["elbo"].mean()), abs=1e-3)


@pytest.mark.slow
def test_as_a_group_of_the_datatree(tmp_path):
    posterior = posterior_with(1.0)
    found = posterior.check(KEY, X, ("importance", "collapse"))
    found.add_to(posterior.to_datatree(KEY, X, 100)).to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as tree:
        assert {"posterior", "checks"} <= set(tree.children)
        xr.testing.assert_equal(tree["checks"].to_dataset(), found.dataset)


def test_weights_that_are_not_finite_are_refused():
    log_weights = np.zeros((200, 5))
    log_weights[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"1 rows have log weights that are not finite.*row 2"):
        pareto_khat(log_weights)


def test_a_point_has_no_weights():
    guide = AutoAmortizedDelta(normal_model, partial(MLP, hidden_sizes=(8,)))
    svi = SVI(normal_model, guide, optax.adam(1e-2), Trace_ELBO())
    x = np.linspace(-1, 1, 20).astype(np.float32)
    result = fit(svi, jax.random.key(0), x, num_epochs=2, progress_bar=False)
    posterior = Posterior(guide, result)
    with pytest.raises(ValueError, match="PointEstimate has no density"):
        posterior.check(jax.random.key(1), x)
    tree = posterior.to_datatree(jax.random.key(1), x, 10)
    assert set(tree.children) == {"posterior", "posterior_predictive", "observed_data"}
    assert np.ptp(tree.posterior["z"].values, axis=1).max() == 0


@pytest.mark.parametrize(
    ("mean", "depends"),
    [
        (lambda z: 2.0 * z, False),
        (lambda z: z - z.mean(), True),
        (lambda z: z + jnp.roll(z, 1), True),
        (jnp.cumsum, True),
    ],
    ids=["own", "centred", "next", "running"],
)
def test_rows_that_depend_on_each_other_are_reported(mean, depends):
    """NumPyro's plate says that they do not: what is computed row by row is of no posterior."""

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(mean(z), 1.0), obs=x)

    x = np.random.default_rng(0).normal(size=20).astype(np.float32)
    guide = AutoAmortizedNormal(model, partial(MLP, hidden_sizes=(4,)))
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    state = svi.init(jax.random.key(0), x)
    posterior = Posterior(guide, svi.get_params(state))
    report = posterior.check(jax.random.key(1), x, Importance(200), progress_bar=False)
    found = [f for f in report.findings if "rows depend on each other" in f.text]
    assert len(found) == depends
    assert not any(finding.ok for finding in found)
