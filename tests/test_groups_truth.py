"""Groups of any number and size by one guide, of which the posterior is known: all is Normal."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI

from numpyro_vae import (
    AutoAmortizedNormal,
    Calibration,
    ForwardKL,
    NestedSetEncoder,
    Novelty,
    Posterior,
    Simulations,
    data_sets,
    fit,
)

pytestmark = pytest.mark.slow
GROUPS, ROWS, TAU = 6, 5, 0.7


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", y.shape[0], dim=-2):
        theta = numpyro.sample("theta", dist.Normal(mu, TAU))
        with numpyro.plate("row", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def simulate(count, seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(2, GROUPS + 1, size=count)
    rows = rng.integers(1, ROWS + 1, size=(count, GROUPS))
    theta = rng.normal(size=(count, 1)) + TAU * rng.normal(size=(count, GROUPS))
    y = theta[..., None] + rng.normal(size=(count, GROUPS, ROWS))
    return {"y": y.astype(np.float32), "sizes": {"group": groups, "row": rows}}


def exact(y, rows):
    """Return means and standard deviations of mu and of each theta."""
    means = np.array([y[j, :n].mean() for j, n in enumerate(rows)])
    noise = 1 / rows
    precision = 1 + (1 / (TAU**2 + noise)).sum()
    mu = (means / (TAU**2 + noise)).sum() / precision
    pull = noise / (TAU**2 + noise)  # of mu on theta
    theta = pull * mu + (1 - pull) * means
    return (
        np.array([mu, *theta]),
        np.sqrt(np.array([1 / precision, *(TAU**2 * pull + pull**2 / precision)])),
    )


@pytest.fixture(scope="module")
def posterior():
    sets, num_steps = data_sets(model), 1500
    encoder = partial(NestedSetEncoder, element_sizes=(8,), hidden_sizes=(32,))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(sets, AutoAmortizedNormal(sets, encoder), optimizer, ForwardKL())
    simulations = Simulations(128 * 100, like=simulate(512, 0))
    options = {"num_epochs": num_steps // 100, "batch_size": 128, "progress_bar": False}
    return Posterior(svi.guide, fit(svi, jax.random.key(0), simulations, **options))


def test_draws_have_the_exact_means_and_spreads(posterior):
    data = simulate(50, 1)
    draws = posterior.sample(jax.random.key(1), data, 2000)
    shift, ratio = [], []
    for i, count in enumerate(data["sizes"]["group"]):
        loc, scale = exact(data["y"][i].astype(float), data["sizes"]["row"][i, :count])
        found = np.column_stack([draws["mu"][:, i], draws["theta"][:, i, :count, 0]])
        shift.append((found.mean(0) - loc) / scale)
        ratio.append(found.std(0) / scale)
    shift, ratio = np.concatenate(shift), np.concatenate(ratio)
    assert np.sqrt(np.mean(shift**2)) < 0.1
    np.testing.assert_allclose(np.quantile(ratio, [0.05, 0.5, 0.95]), 1.0, atol=0.1)


def test_calibration_leaves_padding_out(posterior):
    data = simulate(400, 2)
    check = Calibration(num_simulations=400)
    report = posterior.check(jax.random.key(2), data, check, progress_bar=False)
    assert all(finding.ok for finding in report.findings)
    ranks = report.dataset["pit_theta"].values[..., 0]
    there = np.arange(GROUPS) < data["sizes"]["group"][:, None]
    np.testing.assert_array_equal(np.sort((~np.isnan(ranks)).sum(-1)), np.sort(there.sum(-1)))
    coverage = report.dataset["coverage_theta"].values[1]  # of 80%
    np.testing.assert_allclose(coverage, 0.8, atol=0.1)


def test_data_sets_of_another_kind_are_flagged(posterior):
    """Three rows in ten are 8 standard deviations off."""
    data, rng = simulate(40, 3), np.random.default_rng(4)
    spoiled = data["y"] + 8.0 * (rng.uniform(size=data["y"].shape) < 0.3)
    check = Novelty(simulate(400, 5))
    shares = []
    for y in (data["y"], spoiled.astype(np.float32)):
        report = posterior.check(jax.random.key(3), data | {"y": y}, check, progress_bar=False)
        shares.append((report.dataset["novelty"].values <= 0.01).mean())
    assert shares[0] < 0.1
    assert shares[1] > 0.7
