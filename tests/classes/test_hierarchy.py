"""A hierarchical Normal: heads that read the global mean make the guide exact."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import train
from linear_gaussian import LINEAR, elbo, exact
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from scipy import stats

from numpyro_vae import AutoAmortizedNormal, Posterior

NUM_DATA = 64
X = np.random.default_rng(0).normal(0.7, 2**0.5, NUM_DATA).astype(np.float32)
# All sites at once, mu first: x = z + noise, and z varies with mu.
LATENTS = exact(
    X[None],
    np.eye(NUM_DATA, NUM_DATA + 1, k=1),
    1.0,
    prior=np.block(
        [
            [np.ones((1, NUM_DATA + 1))],
            [np.ones((NUM_DATA, 1)), np.eye(NUM_DATA) + np.ones((NUM_DATA, NUM_DATA))],
        ]
    ),
)
MU, MU_SD = LATENTS.mean[0, 0], LATENTS.sd[0]
EVIDENCE = LATENTS.log_evidence[0]
FAST = {"steps": 1000, "particles": 8}


def model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_hand(model):
    del model  # whose only global site is known here

    def guide(x):
        del x
        loc = numpyro.param("mu_loc", jnp.zeros(()))
        log_scale = numpyro.param("mu_log_scale", jnp.array(-1.0))
        numpyro.sample("mu", dist.Normal(loc, jnp.exp(log_scale)))

    return guide


def conditioned(global_guide):
    guide = AutoAmortizedNormal(model, LINEAR, global_guide=global_guide, condition_on=("mu",))
    return train(guide, X, **FAST)


@pytest.fixture(scope="module")
def mean_field():
    return train(AutoAmortizedNormal(model, LINEAR), X, steps=2000, particles=16, rate=1e-2)


@pytest.fixture(scope="module")
def conditional():
    guide = AutoAmortizedNormal(model, LINEAR, condition_on=("mu",))
    return train(guide, X, steps=2000, particles=16, rate=1e-2)


def test_the_exact_posterior_is_the_textbooks():
    assert pytest.approx((1 + NUM_DATA / 2) ** -0.5) == MU_SD
    assert pytest.approx(X.sum() / 2 * MU_SD**2, rel=1e-5) == MU


def test_mean_field_is_as_sure_of_the_mean_as_if_it_knew_every_z(mean_field):
    draws = mean_field.sample(jax.random.key(2), X, 20_000, var_names=["mu"])["mu"]
    assert abs(draws.mean() - MU) <= 0.1 * MU_SD
    assert draws.std() == pytest.approx((1 + NUM_DATA) ** -0.5, rel=0.05)
    assert elbo(mean_field, X) < EVIDENCE - 0.3


@pytest.mark.parametrize("global_guide", [AutoMultivariateNormal, by_hand])
def test_any_global_guide_is_exact(global_guide):
    posterior = conditioned(global_guide)
    draws = posterior.sample(jax.random.key(2), X, 20_000, var_names=["mu"])["mu"]
    assert abs(draws.mean() - MU) <= 0.05 * MU_SD
    assert draws.std() == pytest.approx(MU_SD, rel=0.03)
    assert abs(elbo(posterior, X) - EVIDENCE) <= 0.05


def test_the_mean_is_exact(conditional):
    draws = conditional.sample(jax.random.key(2), X, 20_000, var_names=["mu"])["mu"]
    assert abs(draws.mean() - MU) <= 0.05 * MU_SD
    assert draws.std() == pytest.approx(MU_SD, rel=0.03)


def test_the_bound_is_the_evidence(conditional):
    assert abs(elbo(conditional, X) - EVIDENCE) <= 0.05


def test_draws_have_the_exact_moments(conditional):
    draws = conditional.sample(jax.random.key(3), X, 20_000)
    locs = (draws["z"].mean(0) - LATENTS.mean[0, 1:]) / LATENTS.sd[1:]
    assert np.abs(locs).max() <= 0.1
    assert np.abs(draws["z"].std(0) / LATENTS.sd[1:] - 1).max() <= 0.05
    found = [np.cov(draws["mu"], z)[0, 1] for z in draws["z"].T]
    np.testing.assert_allclose(found, LATENTS.covariance[0, 1:], rtol=0.25)


def test_a_point_for_the_mean_is_its_mode():
    posterior = conditioned(AutoDelta)
    draws = posterior.sample(jax.random.key(2), X, 3, var_names=["mu"])["mu"]
    np.testing.assert_allclose(draws, MU, atol=0.02 * MU_SD)
    # The joint density of data and mode: the evidence, times the posterior's density there.
    expected = EVIDENCE + stats.norm(0, MU_SD).logpdf(0)
    assert abs(elbo(posterior, X) - expected) <= 0.05


def test_encode_and_quantiles_are_given_the_median_of_the_mean(conditional):
    loc, scale = conditional.encode(X)["z"]
    np.testing.assert_allclose(loc, (X + MU) / 2, atol=0.05)
    np.testing.assert_allclose(scale, 0.5**0.5, rtol=0.05)
    params, guide = conditional.params, conditional.guide
    found, median = jax.jit(
        lambda params: (guide.quantiles(params, jnp.array([0.1, 0.5]), X), guide.median(params, X))
    )(params)
    np.testing.assert_allclose(found["mu"], stats.norm(MU, MU_SD).ppf([0.1, 0.5]), atol=0.02)
    np.testing.assert_allclose(found["z"][0], loc + scale * stats.norm.ppf(0.1), atol=1e-4)
    np.testing.assert_allclose(median["z"], loc, atol=1e-5)
    np.testing.assert_allclose(median["mu"], found["mu"][1], atol=1e-6)


def test_what_only_draws_can_say_of_a_guide_written_by_hand():
    guide = AutoAmortizedNormal(model, LINEAR, global_guide=by_hand, condition_on=("mu",))
    posterior = train(guide, X, steps=2)
    with pytest.raises(ValueError, match=r"read the global sites \['mu'\].*no median"):
        posterior.encode(X)
    assert posterior.sample(jax.random.key(0), X, 5)["z"].shape == (5, NUM_DATA)


@pytest.mark.parametrize("name", ["z", "x", "nu"])
def test_heads_read_only_global_sites(name):
    guide = AutoAmortizedNormal(model, condition_on=(name,))
    message = rf"condition_on= names \['{name}'\].*outside plate 'data' are \['mu'\]"
    with pytest.raises(ValueError, match=message):
        numpyro.handlers.seed(guide, 0)(X)


def test_a_positive_global_site_is_read_on_the_unconstrained_scale():
    """The exact posterior of z given tau is linear in log(tau), and tau is known but for that."""

    def scaled(x):
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.log(tau), 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(scaled, LINEAR, condition_on=["tau"])
    posterior = train(guide, X, **FAST)
    assert abs(elbo(posterior, X) - EVIDENCE) <= 0.05
    encoding = guide.encode(posterior.params, X)
    for tau in (0.5, 3.0):
        loc = encoding.condition({"tau": jnp.array(tau)}).marginal(lambda fn: fn.mean)
        # Far from what was seen in training the mixed features need not be linear.
        np.testing.assert_allclose(loc[:, 0], (X + np.log(tau)) / 2, atol=0.35)


@pytest.mark.slow
def test_several_globals_of_several_shapes_are_read():
    def wide(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("classes", 2):
            nu = numpyro.sample("nu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            locs = jnp.concatenate([mu, nu])
            z = numpyro.sample("z", dist.Normal(locs, 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = np.stack([X, X[::-1], -X, np.roll(X, 7)], axis=-1)
    guide = AutoAmortizedNormal(wide, LINEAR, plate="data", condition_on=("mu", "nu"))
    posterior = train(guide, x, **FAST)
    prior = np.ones((NUM_DATA, NUM_DATA)) + np.eye(NUM_DATA)
    expected = exact(x.T, np.eye(NUM_DATA), 1.0, prior=prior).log_evidence.sum()
    assert abs(elbo(posterior, x) - expected) <= 0.2
    draws = posterior.sample(jax.random.key(2), x, 5000, var_names=["mu", "nu"])
    found = np.concatenate([draws["mu"], draws["nu"]], axis=-1)
    np.testing.assert_allclose(found.std(0), MU_SD, rtol=0.05)


@pytest.mark.slow
def test_heads_may_read_a_global_site_of_which_the_guide_is_a_point():
    """`encode` is given the point, which has a median though no quantiles."""

    def model(x):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(b, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = AutoAmortizedNormal(model, condition_on=("b",), global_guide=AutoDelta)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(0), 3, np.ones(5, np.float32), progress_bar=False)
    assert Posterior(guide, result).encode(np.ones(5, np.float32))["z"].loc.shape == (5,)
