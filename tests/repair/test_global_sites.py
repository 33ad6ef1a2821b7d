"""Repaired global latents: closed forms, draws that go together, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import make_svi, train
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from scipy import stats

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit
from numpyro_vae.inference.global_space import flatten, log_density_at
from numpyro_vae.inference.marginal import LogDensity, log_density
from numpyro_vae.repair import global_chains
from numpyro_vae.repair.global_proposals import StudentT, Weighted, adapt

LINEAR = partial(MLP, hidden_sizes=(8,), activation=lambda hidden: hidden, standardize=False)
KEY = jax.random.key(1)
NUM_DATA = 50
X = np.random.default_rng(0).normal(0.7, 1.5, NUM_DATA).astype(np.float32)
PRECISION = 1 + NUM_DATA / 2  # of mu, as x ~ N(mu, 2)
MU, MU_SD = X.sum() / 2 / PRECISION, PRECISION**-0.5
WEIGHT = np.array([1.0, -1.0], np.float32)


def model(x):
    """The posterior of mu is known, and that of each z given mu."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2.0 * mu)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.deterministic("away", z - mu)
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def trained(**options):
    guide = AutoAmortizedNormal(model, LINEAR, **options)
    return train(guide, X, steps=1500, particles=8, rate=1e-2)


@pytest.fixture(scope="module")
def mean_field():
    return trained()


@pytest.fixture(scope="module")
def repaired(mean_field):
    return mean_field.repair_globals(KEY, X, num_samples=4000)


@pytest.fixture(scope="module")
def tree(repaired):
    return repaired.to_datatree(jax.random.key(2), X)


def assert_exact(draws, shift=0.05, ratio=0.05):
    assert abs(draws.mean() - MU) <= shift * MU_SD
    assert draws.std() == pytest.approx(MU_SD, rel=ratio)


# -- the posterior ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_guide_that_is_too_narrow_is_repaired(mean_field, repaired):
    guide = mean_field.sample(KEY, X, 4000, var_names=["mu"])["mu"]
    assert guide.std() < 0.8 * MU_SD
    assert repaired.passed
    assert repaired.method == "importance"
    assert repaired.draws["mu"].shape == (4000,)
    assert_exact(repaired.draws["mu"])
    assert repaired.error < 0.05


@pytest.mark.slow
def test_chains_find_the_same(mean_field):
    found = mean_field.repair_globals(KEY, X, method="nuts", num_samples=1000)
    assert found.passed
    assert found.rhat <= 1.01
    # Of 1,000 draws, about 400 of which are effective.
    assert_exact(found.draws["mu"], shift=0.15, ratio=0.1)


def test_a_guide_of_a_point_is_repaired():
    assert_exact(trained(global_guide=AutoDelta).repair_globals(KEY, X).draws["mu"], 0.15, 0.1)


@pytest.mark.slow
def test_a_guide_that_is_not_amortized_is_repaired():
    svi = SVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO(num_particles=8))
    posterior = Posterior(svi.guide, svi.run(KEY, 1500, X, progress_bar=False))
    assert_exact(posterior.repair_globals(KEY, X, num_samples=4000).draws["mu"])


@pytest.mark.slow
def test_an_exact_guide_stays_as_it_is():
    found = trained(condition_on=("mu",)).repair_globals(KEY, X, num_samples=4000)
    assert found.passed
    assert found.particles == 16
    assert_exact(found.draws["mu"])


@pytest.mark.slow
def test_values_lie_in_their_supports():
    def positive(x):
        with numpyro.plate("side", 2):
            tau = numpyro.sample("tau", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(tau.sum(), 1.0))
            numpyro.sample("x", dist.Normal(z + WEIGHT[0] * tau[0, 0], 1.0), obs=x)

    svi = make_svi(positive, plate="data")
    posterior = Posterior(svi.guide, fit(svi, KEY, X, num_epochs=20, progress_bar=False))
    found = posterior.repair_globals(KEY, X, method="importance", num_samples=50)
    assert found.draws["tau"].shape == (50, 2, 3)
    np.testing.assert_allclose(found.draws["tau"].sum(-1), 1.0, rtol=1e-4)
    # The site's distribution given nothing but itself is uniform, and x tells it one number.
    assert found.draws["tau"][:, 1].mean() == pytest.approx(1 / 3, abs=0.05)


# -- draws that go together ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rows_latents_go_with_the_globals_draw_by_draw(tree):
    mu, z = (tree["posterior"][name].values[0] for name in ("mu", "z"))
    loc = (X + mu[:, None]) / 2  # of z given mu
    standard = (z - loc) / 0.5**0.5
    assert abs(standard.mean()) < 0.01
    assert standard.std() == pytest.approx(1.0, rel=0.02)
    assert np.cov(mu, z.mean(1))[0, 1] == pytest.approx(MU_SD**2 / 2, rel=0.1)


def test_all_that_arviz_reads_is_of_these_draws(tree):
    posterior = tree["posterior"]
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["mu"], rtol=1e-5)
    away = posterior["z"] - posterior["mu"]
    np.testing.assert_allclose(posterior["away"].transpose(*away.dims), away, atol=1e-5)
    predicted = tree["posterior_predictive"]["x"].transpose(*away.dims) - posterior["z"]
    assert float(predicted.std()) == pytest.approx(1.0, rel=0.02)
    exact = stats.norm(posterior["mu"].values[0][:, None], 2**0.5).logpdf(X)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], exact, atol=0.4)
    assert float(tree["sample_stats"]["effective_particles"].mean()) > 60
    assert "log_weights" not in tree["sample_stats"]


def test_other_rows_are_inferred_given_the_repaired_globals(repaired):
    tree = repaired.to_datatree(KEY, X[:7], groups=["posterior"], var_names=["z", "mu"])
    assert tree["posterior"]["z"].shape == (1, 4000, 7)
    np.testing.assert_array_equal(tree["posterior"]["mu"].values[0], repaired.draws["mu"])


# -- what is said, and what is refused -------------------------------------------------------------


def test_it_is_said_how_good_they_are(repaired):
    first, method, judged, error = str(repaired).splitlines()
    assert first == "global latents 'mu': repaired"
    assert method.split() == ["method", "importance"]
    assert "effective draws" in judged
    assert "particles a row" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gibbs"}, "method is 'gibbs', expected 'auto' or one of"),
        ({"num_samples": 0}, "num_samples is 0, expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(mean_field, options, message):
    with pytest.raises(ValueError, match=message):
        mean_field.repair_globals(KEY, X, **options)


def test_a_model_without_globals_has_none_to_repair():
    def alone(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = make_svi(alone)
    posterior = Posterior(svi.guide, fit(svi, KEY, X, num_epochs=1, progress_bar=False))
    with pytest.raises(ValueError, match="no latent sites outside plate 'data'"):
        posterior.repair_globals(KEY, X)


def test_what_does_not_pass_is_said(mean_field, monkeypatch):
    monkeypatch.setattr(global_chains, "MAX_RHAT", 0.0)
    monkeypatch.setattr(global_chains, "ROUNDS", (1,))
    found = mean_field.repair_globals(KEY, X, method="nuts", num_samples=100)
    assert not found.passed
    assert "not repaired" in str(found)


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chains_see_the_density_that_weights_see(mean_field):
    """The same number, whether rows go batch by batch on the host or in compiled code."""
    runner = mean_field._runner
    rows = runner.read(X)
    draws, _ = runner.weigh_globals(KEY, rows, 4)
    points, log_det = runner.once(flatten, rows, draws)
    np.testing.assert_array_equal(log_det, 0.0)
    expected = log_density(runner, rows, KEY, draws, 16).values
    indices = jnp.arange(60).clip(max=NUM_DATA - 1).reshape(3, 20)
    real = (jnp.arange(60) < NUM_DATA).astype(float).reshape(3, 20)
    parts = (rows.batch(indices[0]), indices, real)

    def both(batch, parts, point):
        at = partial(log_density_at, batch, parts, KEY, particles=16)
        return at(point)[0], jax.grad(lambda point: at(point)[0])(point)

    for point, value in zip(points, expected, strict=True):
        found, slope = runner.once(both, rows, parts, jnp.asarray(point))
        np.testing.assert_allclose(found, value, rtol=1e-5)
        exact = -point + (X - point).sum() / 2
        np.testing.assert_allclose(slope, exact, atol=1.0)


def normal_density(loc, covariance):
    target = stats.multivariate_normal(loc, covariance)
    return lambda points: LogDensity(target.logpdf(points), np.zeros((2, len(points))), 16)


def test_proposals_adapt_to_what_is_far_wider():
    """In ten correlated dimensions, from draws of a third of the standard deviations."""
    rng, size = np.random.default_rng(0), 10
    factor = rng.normal(size=(size, size))
    covariance = factor @ factor.T + np.eye(size)
    density = normal_density(np.arange(size), covariance)
    sd = np.sqrt(np.diag(covariance))
    points = np.arange(size) + sd * (0.5 + rng.normal(size=(1000, size)) / 3)
    log_q = stats.norm(np.arange(size) + 0.5 * sd, sd / 3).logpdf(points).sum(1)
    first = Weighted.of(points, density(points), log_q)
    assert not first.passes
    found = adapt(first, density, rng, 0.05)
    assert found.passes
    assert found.ess >= 1000
    weights = np.exp(found.log_weights)
    np.testing.assert_allclose((weights @ found.points - np.arange(size)) / sd, 0, atol=0.15)
    spread = np.sqrt(weights @ (found.points - weights @ found.points) ** 2)
    np.testing.assert_allclose(spread / sd, 1.0, atol=0.1)


def test_draws_of_a_t_have_its_density():
    near = StudentT(np.array([1.0, -2.0]), np.array([[2.0, 0.0], [1.0, 0.5]]))
    points = near.sample(np.random.default_rng(0), 20_000)
    target = stats.multivariate_normal(near.loc, near.scale_tril @ near.scale_tril.T)
    weights = np.exp(target.logpdf(points) - near.log_prob(points))
    assert weights.mean() == pytest.approx(1.0, abs=4 * weights.std() / np.sqrt(20_000))
    assert weights.max() < 5


def test_the_error_of_a_density_that_tilts_is_that_of_its_means():
    points = np.random.default_rng(0).normal(size=(20_000, 1))
    tilts = np.array([[0.1], [-0.1]]) * points[:, 0]
    found = Weighted(points, LogDensity(points[:, 0], tilts, 16), np.full(20_000, -9.9), 0.0)
    assert found.error == pytest.approx(0.1, rel=0.05)
