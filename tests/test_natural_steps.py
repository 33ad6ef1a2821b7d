"""Natural-gradient steps against closed forms, quadrature, and NumPyro's densities."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import SMALL
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.util import log_density
from scipy.optimize import minimize

from numpyro_vae import (
    RNN,
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Posterior,
    amortize,
)
from numpyro_vae.guides.normal_form import either, joint_normal, of_normal
from numpyro_vae.inference.encoded import EncodedBatch, Trained

KEY = jax.random.key
LOADINGS = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
NOISE = 0.3


def factors(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ LOADINGS, NOISE).to_event(1), obs=x)


def correlated(x):
    """Two sites, the first of which has a support of its own."""
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        rates = (rate * jnp.exp(0.5 * shift))[:, None] * jnp.array([1.0, 2.0])
        numpyro.sample("x", dist.Poisson(rates).to_event(1), obs=x)


def observations(number=20):
    rng = np.random.default_rng(0)
    noise = NOISE * rng.normal(size=(number, 6))
    return (rng.normal(size=(number, 3)) @ LOADINGS + noise).astype(np.float32)


def untrained(guide, *args, loss=Trace_ELBO, **options):
    """A posterior of what a guide says before any step of training."""
    svi = SVI(guide.model, guide, optax.adam(1e-3), loss())
    params = svi.get_params(svi.init(KEY(0), *args))
    return Posterior(guide, params, **options)


FAMILIES = [
    pytest.param(AutoAmortizedNormal, marks=pytest.mark.slow),
    pytest.param(AutoAmortizedMultivariateNormal, marks=pytest.mark.slow),
    partial(AutoAmortizedLowRankMultivariateNormal, rank=1),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_posterior_that_is_normal_is_found(family):
    x = observations()
    posterior = untrained(family(factors, SMALL), x, natural_steps=12)
    precision = np.eye(3) + LOADINGS @ LOADINGS.T / NOISE**2
    cov = np.linalg.inv(precision)
    exact = x @ LOADINGS.T / NOISE**2 @ cov
    found = posterior.encode(x)["z"]
    np.testing.assert_allclose(found.loc, exact, atol=2e-3)
    np.testing.assert_allclose(
        found.scale, np.broadcast_to(np.sqrt(np.diag(cov)), exact.shape), rtol=5e-3
    )
    weights = posterior.log_weights(KEY(1), x, 50)
    assert weights.std(0).max() < 0.02  # the weights of the exact posterior are all the same


def test_the_elbo_is_the_best_of_all_normals():
    """Of a posterior that is not Normal; the best is found by an optimizer and Gauss-Hermite."""
    x = np.array([[0.0], [3.0], [25.0]], np.float32)

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 2.0))
            numpyro.sample("x", dist.Poisson(jnp.exp(z)[:, None]).to_event(1), obs=x)

    found = untrained(AutoAmortizedNormal(model, SMALL), x, natural_steps=12).encode(x)["z"]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    for row, count in enumerate(x[:, 0]):

        def loss(at, count=count):
            z = at[0] + np.exp(at[1]) * nodes
            return -(weights @ (count * z - np.exp(z) - z**2 / 8) + at[1])

        best = minimize(loss, [0.0, 0.0]).x
        assert abs(found.loc[row] - best[0]) < 0.02 * np.exp(best[1])
        assert -0.05 < np.log(found.scale[row]) - best[1] < 0.15  # as it is widened


def test_weights_are_of_numpyros_density_and_of_a_normal():
    """By row log q is what the weight lacks of the density: a quadratic whose integral is 1."""
    x = np.random.default_rng(0).poisson(3.0, (5, 2)).astype(np.float32)
    posterior = untrained(AutoAmortizedNormal(correlated, SMALL), x, natural_steps=4)
    draws, weights = (get(KEY(3), x, 60) for get in (posterior.sample, posterior.log_weights))
    for row in range(len(x)):
        values = {name: value[:, row : row + 1] for name, value in draws.items()}
        of_row = partial(log_density, correlated, (x[row : row + 1],), {})
        log_p = jax.vmap(lambda values, of_row=of_row: of_row(values)[0])(values)
        at = np.stack([np.log(draws["rate"][:, row]), draws["shift"][:, row]], -1)
        log_q = np.asarray(log_p, float) + at[:, 0] - weights[:, row]  # d rate = rate d log rate
        residual, precision, linear, constant = _quadratic(at.astype(float), log_q)
        assert residual < 1e-4
        total = constant + linear @ np.linalg.solve(precision, linear) / 2
        total += np.log(2 * np.pi) - np.linalg.slogdet(precision)[1] / 2
        assert abs(total) < 5e-3


def _quadratic(at, values):
    """The largest residual, minus the second derivatives, the slope at 0 and the value there."""
    first, second = at.T
    terms = [first**2 / 2, first * second, second**2 / 2, first, second, np.ones(len(at))]
    design = np.stack(terms, -1)
    found = np.linalg.lstsq(design, values, rcond=None)[0]
    precision = -np.array([[found[0], found[1]], [found[1], found[2]]])
    return np.abs(design @ found - values).max(), precision, found[3:5], found[5]


def test_rows_do_not_depend_on_their_batch():
    x = observations(9)
    posterior = untrained(AutoAmortizedNormal(factors, SMALL), x, natural_steps=2)
    whole, part = posterior.encode(x)["z"], posterior.encode(x[3:5])["z"]
    np.testing.assert_allclose(part.loc, whole.loc[3:5], atol=1e-5)
    np.testing.assert_allclose(part.scale, whole.scale[3:5], rtol=1e-5)


def grouped(x, mask=None):
    """A global site, and latents of which the model masks some."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)), handlers.mask(mask=True if mask is None else mask):
        z = numpyro.sample("z", dist.Normal(mean, 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def test_globals_are_those_of_their_guide():
    x = np.linspace(-2.0, 2.0, 8).astype(np.float32)
    guide = AutoAmortizedNormal(grouped, SMALL)
    svi = SVI(grouped, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(KEY(0), x))
    params |= {"mean_auto_loc": jnp.array(0.7), "mean_auto_scale": jnp.array(1e-3)}
    found = Posterior(guide, params, natural_steps=6).encode(x)["z"]
    precision = 1 + 1 / NOISE**2
    np.testing.assert_allclose(found.loc, (0.7 + x / NOISE**2) / precision, atol=2e-3)
    np.testing.assert_allclose(found.scale, np.full(8, precision**-0.5), rtol=5e-3)


def test_what_the_model_masks_stays():
    x, mask = np.linspace(-2.0, 2.0, 8).astype(np.float32), np.arange(8) % 2 == 0

    def model(x, mask):
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(0.0, 1.0).mask(mask))
            mean = a + jnp.where(mask, b, 0.0)
            numpyro.sample("x", dist.Normal(mean, NOISE), obs=x)

    for family in (AutoAmortizedNormal, AutoAmortizedMultivariateNormal):
        before, after = (
            untrained(family(model, SMALL), x, mask, natural_steps=steps) for steps in (0, 8)
        )
        first, last = (posterior.encode((x, mask)) for posterior in (before, after))
        np.testing.assert_allclose(last["b"].loc[~mask], first["b"].loc[~mask], atol=1e-5)
        np.testing.assert_allclose(last["b"].scale[~mask], first["b"].scale[~mask], rtol=1e-4)
        alone = x[~mask] / NOISE**2 / (1 + 1 / NOISE**2)
        np.testing.assert_allclose(last["a"].loc[~mask], alone, atol=2e-3)
        both = x[mask] / (2 + NOISE**2)
        np.testing.assert_allclose(last["b"].loc[mask], both, atol=2e-3)
        assert after.log_weights(KEY(1), (x, mask), 30).std(0).max() < 0.02


def walk(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.GaussianRandomWalk(1.0, num_steps=x.shape[-1]))
        level = numpyro.sample("level", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
        numpyro.sample("x", dist.Normal(z + level, NOISE).to_event(1), obs=x)


@pytest.mark.slow
def test_features_by_step():
    """Of several sites, whose values lie step by step in the guide."""
    x = np.random.default_rng(0).normal(size=(6, 5)).cumsum(-1).astype(np.float32)
    guide = AutoAmortizedMultivariateNormal(walk, partial(RNN, hidden_size=8))
    posterior = untrained(guide, x, natural_steps=14)
    ones = np.tril(np.ones((5, 5)))
    prior = np.block([[ones @ ones.T, np.zeros((5, 5))], [np.zeros((5, 5)), np.eye(5)]])
    design = np.concatenate([np.eye(5), np.eye(5)], axis=1)
    gain = prior @ design.T @ np.linalg.inv(design @ prior @ design.T + NOISE**2 * np.eye(5))
    exact, sds = x @ gain.T, np.sqrt(np.diag(prior - gain @ design @ prior))
    found = posterior.encode(x)
    loc = np.concatenate([found["z"].loc, found["level"].loc], -1)
    np.testing.assert_allclose(loc, exact, atol=0.02 * sds.max())
    assert posterior.log_weights(KEY(1), x, 50).std(0).max() < 0.1


@pytest.mark.slow
def test_discrete_latents_are_summed_over():
    x = np.array([-3.2, -2.4, 2.6, 3.1], np.float32)

    def model(x):
        with numpyro.plate("data", len(x)):
            infer = {"enumerate": "parallel"}
            which = numpyro.sample("which", dist.Bernoulli(0.5), infer=infer)
            z = numpyro.sample("z", dist.Normal(6.0 * which - 3.0, 1.0))
            numpyro.sample("x", dist.Normal(z, NOISE), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    posterior = untrained(guide, x, loss=TraceEnum_ELBO, natural_steps=8)
    found = posterior.check(KEY(0), x, "importance", progress_bar=False).dataset
    exact = jax.nn.logsumexp(
        jnp.stack([dist.Normal(m, np.hypot(1, NOISE)).log_prob(x) for m in (-3.0, 3.0)]), axis=0
    ) - np.log(2)
    np.testing.assert_allclose(found["log_evidence"], exact, atol=0.01)
    assert (found["khat"] < 0.7).all()


def test_a_bad_start_ends_no_worse():
    """A row whose steps gain nothing, or are not finite, keeps what the network said."""
    x = np.array([[1.0], [2.0]], np.float32)

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z + jnp.where(x[:, 0] > 1.5, jnp.nan, 0.0)
            numpyro.sample("x", dist.Normal(mean[:, None], NOISE).to_event(1), obs=x)

    guides = [AutoAmortizedNormal(model, SMALL) for _ in range(2)]
    before, after = (
        untrained(guide, x[:1], natural_steps=steps).encode(x)["z"]
        for guide, steps in zip(guides, (0, 5), strict=True)
    )
    assert before.loc[1] == after.loc[1]
    assert before.scale[1] == pytest.approx(after.scale[1], rel=1e-6)
    assert abs(after.loc[0] - 1 / (1 + NOISE**2)) < 1e-2


@pytest.mark.slow
def test_the_gaps_are_of_what_the_steps_found():
    x = np.random.default_rng(0).poisson(3.0, (12, 2)).astype(np.float32)
    posterior = untrained(AutoAmortizedNormal(correlated, SMALL), x, natural_steps=4)
    found = posterior.check(KEY(0), x, "gap", progress_bar=False).dataset
    assert found["gap_amortization"].mean() < 0.1


def test_all_that_a_posterior_does_goes_on_from_the_steps(tmp_path):
    x = np.random.default_rng(0).poisson(3.0, (12, 2)).astype(np.float32)
    guide = AutoAmortizedNormal(correlated, SMALL)
    posterior = untrained(guide, x, natural_steps=4)
    report = posterior.check(KEY(0), x, ("importance", "collapse"), progress_bar=False)
    first = Posterior(guide, posterior.params).check(KEY(0), x, "importance", progress_bar=False)
    assert report.verdict.mean() < 0.5 * first.verdict.mean()
    tree = posterior.to_datatree(KEY(1), x, 40, groups=("posterior",))
    draws = posterior.sample(KEY(1), x, 40)["rate"]
    np.testing.assert_allclose(tree["posterior"]["rate"].values[0], draws, rtol=1e-5)
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved", correlated)
    assert loaded.natural_steps == 4
    np.testing.assert_array_equal(loaded.sample(KEY(1), x, 40)["rate"], draws)
    without = Posterior(guide, posterior.params)
    assert np.abs(without.encode(x)["shift"].loc - posterior.encode(x)["shift"].loc).max() > 0.1


def test_a_row_of_a_flow_keeps_the_better():
    """An untrained flow is far from rows of small counts, and has a Normal there instead."""
    x = np.random.default_rng(0).poisson(3.0, (12, 2)).astype(np.float32)
    guide = AutoAmortizedFlow(correlated, SMALL)
    before = untrained(guide, x)
    after = Posterior(guide, before.params, natural_steps=4)
    first, last = (
        posterior.check(KEY(0), x, "importance", progress_bar=False).dataset
        for posterior in (before, after)
    )
    assert (last["divergence"] < 0.1).all()
    assert (first["divergence"] > 0.3).mean() > 0.5
    error = 4 * np.hypot(first["log_evidence_mcse"], last["log_evidence_mcse"]) + 0.01
    assert (abs(first["log_evidence"] - last["log_evidence"]) < error).all()


def test_each_row_has_one_of_two_distributions():
    x = np.full((4,), 2.0, np.float32)

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.5))
            numpyro.sample("x", dist.Normal(z**2, 0.5), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    wide = untrained(guide, x, natural_steps=0)
    said = EncodedBatch.encode(
        wide.guide, Trained(wide.params), wide._runner.read(x).everything(), {}
    )
    normal = joint_normal(said.encoding)
    shares = jnp.array([1.0, 0.0, 1.0, 0.0])
    mixed = either(said.encoding, (normal[0] + 3.0, normal[1]), shares)
    at = jnp.zeros((1, 4, 1))
    shifted = replace(said, encoding=of_normal(said.encoding, (normal[0] + 3.0, normal[1])))
    for row, expected in enumerate((shifted, said, shifted, said)):
        assert mixed.log_prob(at)[0, row] == pytest.approx(expected.encoding.log_prob(at)[0, row])
        keys = jax.random.split(KEY(0), 4)
        draws = [encoding.sample(keys, 5)[:, row] for encoding in (mixed, expected.encoding)]
        np.testing.assert_allclose(*draws, rtol=1e-5)


REFUSED = {
    "points": lambda: AutoAmortizedDelta(factors, SMALL),
    "heads that read": lambda: AutoAmortizedNormal(
        correlated, SMALL, dependencies={"shift": ["rate"]}
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_guides_that_say_no_normal_are_refused(name):
    x = observations(4)
    guide = REFUSED[name]()
    x = np.abs(x[:, :2]).round() if guide.model is correlated else x
    posterior = untrained(guide, x, natural_steps=2)
    with pytest.raises(ValueError, match=r"natural_steps are steps of a Normal.*leave"):
        posterior.encode(x)


def test_guides_that_draw_all_rows_together_are_refused():
    x = np.linspace(-2.0, 2.0, 8).astype(np.float32)
    guide = AutoMultivariateNormal(grouped)
    posterior = untrained(guide, x, natural_steps=2)
    with pytest.raises(ValueError, match="AutoMultivariateNormal draws those of all rows"):
        posterior.sample(KEY(0), x, 3)


def by_hand(x):
    numpyro.sample("mean", dist.Normal(0.7, 1e-3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(numpyro.param("shift", 2.0) + 0.1 * x, 1.0))


@pytest.mark.slow
def test_guides_by_hand_take_steps():
    x = np.linspace(-2.0, 2.0, 8).astype(np.float32)
    options = {"model": grouped, "natural_steps": 12}
    posterior = Posterior(by_hand, {"shift": jnp.array(2.0)}, **options)
    found, precision = posterior.encode(x)["z"], 1 + 1 / NOISE**2
    np.testing.assert_allclose(found.loc, (0.7 + x / NOISE**2) / precision, atol=2e-3)
    of_mean = 1 + len(x) / (1 + NOISE**2)
    repaired = posterior.repair_globals(KEY(1), x, method="nuts")
    exact = x.sum() / (1 + NOISE**2) / of_mean
    assert abs(repaired.draws["mean"].mean() - exact) < 0.25 * of_mean**-0.5
    assert repaired.particles == 16  # the fewest, as the rows' weights are nearly all the same


def regression(x, y=None):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=y)


def test_rows_without_observations_take_none():
    x = np.linspace(-2.0, 2.0, 8).astype(np.float32)
    posterior = untrained(AutoAmortizedNormal(regression, SMALL), x, x + 1, natural_steps=4)
    drawn = posterior.predict(KEY(0), (x, None), 4000)["y"]
    sd = np.hypot(1, NOISE)
    np.testing.assert_allclose(drawn.mean(0), x, atol=5 * sd / 4000**0.5)
    np.testing.assert_allclose(drawn.std(0), np.full(8, sd), rtol=0.08)


def test_the_number_of_steps():
    with pytest.raises(ValueError, match="natural_steps"):
        untrained(AutoAmortizedNormal(factors, SMALL), observations(4), natural_steps=-1)


@pytest.mark.slow
def test_amortize_lets_rows_held_out_decide():
    x = np.random.default_rng(0).poisson(3.0, (200, 2)).astype(np.float32)
    options = {"num_steps": 30, "num_simulation_steps": 0, "progress_bar": False}
    for guide, chosen in ((None, 8), (AutoAmortizedNormal(correlated, SMALL), 8)):
        posterior = amortize(correlated, KEY(0), x, guide=guide, **options)
        assert posterior.natural_steps == chosen
    guide = AutoAmortizedNormal(correlated, SMALL)
    assert (
        amortize(correlated, KEY(0), x, guide=guide, natural_steps=1, **options).natural_steps == 1
    )
