"""Reweighted wake-sleep: gradients written by hand, and a sigmoid belief net that learns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from linear import KEY, NOISE, PARAMS, X, draws, guide, latents, log_guide, log_joint, model
from numpyro.infer import SVI, Predictive

from numpyro_vae import AutoAmortizedMultivariateNormal, fit
from numpyro_vae.objectives import ImportanceWeightedELBO, ReweightedWakeSleep


def gradient(loss, key=KEY):
    return jax.grad(lambda params: loss.loss(key, params, model, guide, X))(PARAMS)


def simulate(sites, x):
    return (sites["x"],), {}


# -- gradients -------------------------------------------------------------------------------------


def test_the_gradients_of_the_wake_phases_are_those_of_the_paper():
    z = latents(PARAMS, draws(KEY, 5))
    weights = jax.nn.softmax(log_joint(PARAMS, z) - log_guide(PARAMS, z), axis=0)
    expected = {
        "loading": jax.grad(lambda params: -(weights * log_joint(params, z)).sum())(PARAMS),
        "slope": jax.grad(lambda params: -(weights * log_guide(params, z)).sum())(PARAMS),
    }
    found = gradient(ReweightedWakeSleep(5))
    for name, of in (("loading", "loading"), ("slope", "slope"), ("scale", "slope")):
        np.testing.assert_allclose(found[name], expected[of][name], rtol=1e-4, err_msg=name)


def test_the_gradient_of_the_sleep_phase_is_that_of_simulations():
    """Its mean is known: that of the guide's score under the model."""
    sleep = ReweightedWakeSleep(2, wake_phi=False, sleep=simulate)
    keys = jax.random.split(KEY, 5_000)
    found = jax.jit(jax.vmap(lambda key: gradient(sleep, key)))(keys)
    loading, slope, scale = (float(PARAMS[name]) for name in ("loading", "slope", "scale"))
    variance = loading**2 + NOISE**2
    squared = 1 - 2 * slope * loading + slope**2 * variance  # of z - slope * x
    expected = {
        "slope": -(loading - slope * variance) / scale**2,
        "scale": 1 / scale - squared / scale**3,
    }
    for name, value in expected.items():
        error = found[name].std() / np.sqrt(len(keys))
        assert abs(found[name].mean() - len(X) * value) < 4 * error, name
    alone = jax.jit(jax.vmap(lambda key: gradient(ReweightedWakeSleep(2), key)))(keys)
    np.testing.assert_allclose(found["loading"], alone["loading"], rtol=1e-3)


def test_both_phases_add_up_and_leave_the_value_alone():
    wake, sleep, both = (
        gradient(loss)["slope"]
        for loss in (
            ReweightedWakeSleep(3),
            ReweightedWakeSleep(3, wake_phi=False, sleep=simulate),
            ReweightedWakeSleep(3, sleep=simulate),
        )
    )
    np.testing.assert_allclose(wake + sleep, both, rtol=1e-5)
    values = [
        loss.loss(KEY, PARAMS, model, guide, X)
        for loss in (ReweightedWakeSleep(3, sleep=simulate), ImportanceWeightedELBO(3))
    ]
    np.testing.assert_allclose(*values, rtol=1e-6)


# -- discrete latents ------------------------------------------------------------------------------

NUM_LATENTS, NUM_PIXELS = 3, 8
STATES = jnp.array(list(itertools.product((0.0, 1.0), repeat=NUM_LATENTS)))


def belief_net(x, num_data=None):
    bias = numpyro.param("bias", jnp.zeros(NUM_LATENTS))
    weights = numpyro.param(
        "weights", lambda key: 0.5 * jax.random.normal(key, (NUM_LATENTS, NUM_PIXELS))
    )
    offset = numpyro.param("offset", jnp.zeros(NUM_PIXELS))
    with numpyro.plate("data", len(x) if num_data is None else num_data):
        z = numpyro.sample("z", dist.Bernoulli(logits=bias).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=z @ weights + offset).to_event(1), obs=x)


def recognition_net(x):
    shape = (NUM_PIXELS, NUM_LATENTS)
    weights = numpyro.param("q_weights", lambda key: 0.1 * jax.random.normal(key, shape))
    offset = numpyro.param("q_offset", jnp.zeros(NUM_LATENTS))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=(2 * x - 1) @ weights + offset).to_event(1))


def log_evidence(params, x):
    """The mean log density of rows, all states of the latents summed over."""
    prior = dist.Bernoulli(logits=params["bias"]).to_event(1).log_prob(STATES)
    pixels = dist.Bernoulli(logits=STATES @ params["weights"] + params["offset"]).to_event(1)
    return jax.nn.logsumexp(prior + pixels.log_prob(x[:, None]), axis=1).mean()


TRUTH = {
    "bias": jnp.zeros(NUM_LATENTS),
    "weights": jnp.asarray(4 * np.random.default_rng(0).normal(size=(NUM_LATENTS, NUM_PIXELS))),
    "offset": -jnp.ones(NUM_PIXELS),
}


@pytest.fixture(scope="module")
def pixels():
    drawn = Predictive(belief_net, params=TRUTH, num_samples=1)(KEY, x=None, num_data=300)
    return np.asarray(drawn["x"][0], np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        ReweightedWakeSleep(10),
        ReweightedWakeSleep(10, sleep=simulate),
        ReweightedWakeSleep(10, wake_phi=False, sleep=simulate),
    ],
    ids=["wake", "both", "sleep"],
)
def test_a_sigmoid_belief_net_learns(pixels, loss):
    """The model gets better, and the guide finds its posterior, in `fit`."""
    svi = SVI(belief_net, recognition_net, optax.adam(1e-2), loss)
    result = fit(svi, KEY, pixels, batch_size=50, num_epochs=150, plate="data", progress_bar=False)
    start = svi.get_params(svi.init(KEY, pixels))
    before, after = (log_evidence(params, pixels) for params in (start, result.params))
    truth = log_evidence(TRUTH, pixels)
    assert before < truth - 1.0
    assert after > truth - 0.1
    elbo = ReweightedWakeSleep(1)  # of one draw: the guide itself is looked at
    args = (belief_net, recognition_net, pixels)
    bounds = [
        -float(jax.jit(lambda params: elbo.loss(KEY, params, *args))(params)) / len(pixels)
        for params in (start, result.params)
    ]
    assert after - bounds[1] < 0.2 < before - bounds[0] + 0.1


def test_a_plain_svi_takes_discrete_latents_without_a_warning(pixels):
    svi = SVI(belief_net, recognition_net, optax.adam(1e-2), ReweightedWakeSleep(4))
    assert np.isfinite(svi.run(KEY, 2, pixels, progress_bar=False).losses).all()


# -- what does not work ----------------------------------------------------------------------------


def test_a_guide_that_learns_from_nothing_is_refused():
    with pytest.raises(ValueError, match="the guide would learn from nothing"):
        ReweightedWakeSleep(2, wake_phi=False)


@pytest.mark.slow
def test_simulations_for_joint_families_are_refused():
    guide = AutoAmortizedMultivariateNormal(model)
    svi = SVI(model, guide, optax.adam(1e-2), ReweightedWakeSleep(2, sleep=simulate))
    state = svi.init(KEY, X)
    with pytest.raises(ValueError, match=r"sites \['_auto_z_latent'\].*Leave sleep= out"):
        svi.update(state, X)
