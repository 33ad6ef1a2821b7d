"""Verdicts of guides whose error is known: *fine* means usable as it is, whatever the k-hat."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from flax import nnx
from helpers import make_svi
from numpyro.infer import Trace_ELBO

from numpyro_vae import Importance, Posterior, Report

KEY = jax.random.key(1)
NUM_ROWS, NOISE = 100, 0.5
VARIANCE = 1 / (1 + 1 / NOISE**2)  # of the exact posterior


class Off(nnx.Module):
    """The exact posterior, with an error in each dimension, in units of its sd."""

    def __init__(self):
        self.shift, self.factor = nnx.Param(jnp.zeros(())), nnx.Param(jnp.ones(()))

    def __call__(self, x):
        sd = np.sqrt(VARIANCE)
        loc = x * VARIANCE / NOISE**2 + self.shift[...] * sd
        return loc, jnp.broadcast_to(jnp.log(self.factor[...] * sd), loc.shape)


@cache
def guide_of(size):
    """A guide and its parameters, of latents of a size; what it compiles serves every error."""

    def model(x, level):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            numpyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)
            numpyro.factor("level", level)

    svi = make_svi(model, Off(), loss=Trace_ELBO(), inputs=lambda x, level: x)
    return svi.guide, svi.get_params(svi.init(KEY, *data_of(size)))


def data_of(size, level=0.0):
    x = np.random.default_rng(0).normal(0, np.sqrt(1 + NOISE**2), (NUM_ROWS, size))
    return x.astype(np.float32), np.full(NUM_ROWS, level, np.float32)


def posterior_of(size, *, shift=0.0, factor=1.0):
    guide, params = guide_of(size)
    encoder = {"shift": jnp.asarray(shift), "factor": jnp.asarray(factor)}
    return Posterior(
        guide, {**params, "auto$params": {**params["auto$params"], "encoder": encoder}}
    )


def checked(size, *, level=0.0, num_samples=1000, **error):
    posterior, check = posterior_of(size, **error), Importance(num_samples)
    return posterior.check(KEY, data_of(size, level), check, progress_bar=False)


def divergence(size, shift=0.0, factor=1.0):
    """KL(q || p) of a guide that is off in each dimension."""
    return size * ((factor**2 - 1 + shift**2) / 2 - np.log(factor))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 20])
@pytest.mark.parametrize("level", [0.0, 1e3, 1e5], ids="level {:.0f}".format)
def test_no_row_of_an_exact_guide_is_flagged(size, level):
    """Nor is rounding taken for an error: at 1e5 it is a hundredth of a nat in each weight."""
    found = checked(size, level=level)
    assert not found.flagged.size
    assert np.abs(found.dataset["divergence"]).max() < 1e-3
    assert all(finding.ok for finding in found.findings)


@pytest.mark.parametrize("size", [1, 5, 20])
@pytest.mark.parametrize("error", [{"shift": 1.0}, {"factor": 2.0}, {"factor": 0.5}], ids=str)
def test_rows_of_a_wrong_guide_are_flagged(size, error):
    found = checked(size, **error)
    assert len(found.flagged) >= 0.95 * NUM_ROWS
    (finding,) = found.findings
    assert f"{len(found.flagged)} of 100 rows have draws that are not usable as" in finding.text
    assert "posterior.repair" in finding.advice


@pytest.mark.parametrize("error", [{"shift": 0.3}, {"factor": 1.3}, {"factor": 0.8}], ids=str)
def test_the_divergence_and_its_error(error):
    found = checked(1, **error, num_samples=4000).dataset
    z = (found["divergence"] - divergence(1, **error)) / found["divergence_mcse"]
    assert abs(z.mean()) < 0.5
    assert 0.7 < z.std() < 1.4
    np.testing.assert_allclose(
        found["divergence"], found["log_evidence"] - found["elbo"], atol=1e-5
    )


def test_the_error_does_not_depend_on_chunks():
    """Of 3,000 draws in three chunks, against a formula for all draws at once."""
    posterior, data = posterior_of(1, factor=1.5), data_of(1)
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, 0), chunk) for chunk in range(3)]
    chunks = [posterior.log_weights(key, data, 1000).astype(float) for key in keys]
    log_weights = np.concatenate(chunks)
    weights = np.exp(log_weights - log_weights.max(0))
    expected = (weights / weights.mean(0) - log_weights).std(0, ddof=1) / np.sqrt(3000)
    found = posterior.check(KEY, data, Importance(3000), progress_bar=False).dataset
    np.testing.assert_allclose(found["divergence_mcse"], expected, rtol=1e-3)


def test_a_mode_that_no_draw_reached_is_not_seen():
    """As docs/checks.md says: half of the posterior is missing, and every row is fine."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 10.0))
            numpyro.sample("x", dist.Normal(jnp.abs(z), 0.1), obs=x)

    x = np.linspace(2.0, 4.0, NUM_ROWS, dtype=np.float32)

    class OneMode(nnx.Module):
        def __call__(self, x):
            return x[:, None], jnp.full((len(x), 1), jnp.log(0.1))

    svi = make_svi(model, OneMode(), loss=Trace_ELBO())
    params = svi.get_params(svi.init(KEY, x))
    found = Posterior(svi.guide, params).check(KEY, x, "importance", progress_bar=False)
    assert not found.flagged.size  # and log(2) nats is the divergence
    assert np.abs(found.dataset["divergence"]).max() < 0.01


def test_the_divergence_of_a_much_too_narrow_guide_is_underestimated():
    """As docs/checks.md says: rows are flagged, but some for weights that are no use."""
    found = checked(1, factor=0.1)
    assert found.flagged.size == NUM_ROWS
    assert np.median(found.dataset["divergence"]) < divergence(1, factor=0.1) / 2
    assert (found.verdict == 1).any()


def report_of(khat, divergence, mcse):
    columns = {"khat": khat, "divergence": divergence, "divergence_mcse": mcse}
    attrs = {"khat_threshold": 0.7, "max_divergence": 0.1, "num_data": len(khat)}
    return Report(xr.Dataset({name: ("data", x) for name, x in columns.items()}, attrs=attrs))


@pytest.mark.parametrize(
    ("khat", "divergence", "mcse", "verdict"),
    [
        (-np.inf, 0.0, 0.0, 0),
        (0.69, 0.05, 0.02, 0),
        (0.69, 0.05, 0.03, 1),  # the error counts twice
        (0.2, np.nan, 0.0, 1),
        (0.7, 0.0, 0.0, 2),
        (np.nan, 0.0, 0.0, 2),
        (1.0, 3.0, 0.1, 2),
        (1.1, 0.0, 0.0, 3),
        (np.inf, 0.0, 0.0, 3),
    ],
)
def test_the_rules_of_the_verdicts(khat, divergence, mcse, verdict):
    assert report_of([khat], [divergence], [mcse]).verdict.tolist() == [verdict]


def test_rows_to_reweight_are_repaired_by_importance():
    posterior, data = posterior_of(1, shift=1.0), data_of(1)
    report = posterior.check(KEY, data, "importance", progress_bar=False)
    assert (report.verdict == 1).all()
    repaired = posterior.repair(KEY, data, report, num_samples=100)
    assert (repaired.dataset["method"] == "importance").all()
    assert not repaired.remaining.size
