"""Traps of ArviZ, NumPyro and flax, and the test that holds each off, by file and name.

ArviZ
    trained parameters do not reach the log-likelihood
        test_pitfalls: the_log_likelihood_is_that_of_the_trained_model
        test_posterior: networks_keep_their_training
    a draw holds a minibatch, not all rows
        test_guide: a_subsampling_guide_encodes_all_rows_in_order
    draws are without the dims chain and draw
        test_posterior: arviz_statistics
    files need packages that ArviZ does not install
        test_posterior: written_and_read_back
    the joint k-hat grows with the data
        test_pitfalls: khats_of_single_data_do_not_grow_with_their_number
NumPyro
    batch statistics are missing after svi.run
        conformance/test_state: state_that_is_missing_is_named
    several particles drop a network's state, and RenyiELBO refuses it
        conformance/test_state: fit_keeps_the_state_whatever_the_objective
        conformance/test_state: svi_alone_loses_the_state_with_several_particles
    stable_update lets NaN into the state
        conformance/test_state: a_stable_update_of_numpyros_does_not_protect_the_state
        training/test_fit: batch_statistics_survive_a_bad_batch
    handlers.scale on the model alone
        conformance/test_handlers: scale_around_model_and_guide
    no analytic divergence, without a word
        test_guide: mean_field_elbo_uses_the_analytic_divergence
    another order of sites than the model's
        test_pitfalls: a_guide_in_another_order_than_the_model
    a mask on the model alone
        test_pitfalls: what_the_model_masks_the_guide_masks
    RenyiELBO of a global and a subsampled local latent
        test_pitfalls: renyi_of_a_global_and_a_subsampled_local_latent_is_refused
    Predictive copies every weight for each draw
        test_pitfalls: weights_are_not_copied_for_every_draw
    a restored SVIState in a fresh SVI
        test_pitfalls: a_restored_state_goes_on_in_a_fresh_svi
    typed and old random keys
        test_pitfalls: old_random_keys_are_as_good_as_typed_ones
    exp overflows without a word
        test_guide: extreme_inputs_stay_finite
        test_distributions: extreme_log_scales_have_finite_values_and_gradients
    a plate's own subsampling is slow, and leaves rows out
        training/test_fit: every_row_is_seen_every_epoch_and_a_ragged_end_wraps
    messages without a name
        test_pitfalls: messages_without_a_name_pass
    supports that move with other values
        conformance/test_model_supports: a_support_that_moves_is_refused
flax
    nnx.merge without a copy breaks the gradient
        conformance/test_state: an_update_trains_the_statistics
    dropout stays on in Predictive
        conformance/test_state: predictive_turns_dropout_off
    the key does not change a module's parameters
        test_guide: another_key_is_another_initialization
    parameter trees with keys that are no strings
        test_pitfalls: parameters_of_lists_of_layers_survive_serialization
    float32 parameters under x64
        test_pitfalls: float32_parameters_under_x64
    linen modules without parameters
        conformance/test_networks: a_network_without_parameters_in_every_framework
others
    flowjax stops the gradient of its condition
        families/test_families: gradient_reaches_every_weight_and_the_features
    k-hats of other packages are NaN or off
        checks/test_importance: khat_of_known_tails

Plates inside ``scan`` and discrete latents have a file each in ``classes``.
"""

import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from flax.serialization import from_bytes, to_bytes
from helpers import make_svi
from models import hierarchical_model, normal_model
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, Importance, Posterior, fit
from numpyro_vae.inference.psis import pareto_khat

X = np.asarray(jax.random.normal(jax.random.key(7), (40,)) + 1)
SMALL = partial(MLP, hidden_sizes=(4,))
KEY = jax.random.key(1)


quick = partial(fit, num_epochs=2, progress_bar=False)


def test_the_table_names_tests_that_exist():
    named = re.findall(r"^ {8}([\w/]+): (\w+)$", __doc__, re.MULTILINE)
    assert len(named) >= 30
    for file, name in named:
        text = (pathlib.Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def test_{name}\(", text, re.MULTILINE), f"{file}: {name}"


def first_params(svi, *args):
    return svi.get_params(svi.init(jax.random.key(0), *args))


@pytest.mark.slow
def test_the_log_likelihood_is_that_of_the_trained_model():
    """Of its network, its parameters and its static arguments; against a sum by hand."""
    linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def model(x, kind):
        decode = nnx_module("decoder", linear)
        sigma = numpyro.param("sigma", 5.0)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            noise = {"normal": dist.Normal, "laplace": dist.Laplace}[kind]
            numpyro.sample("x", noise(decode(z[:, None])[:, 0], sigma), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    svi = SVI(model, guide, optax.adam(5e-2), Trace_ELBO(), kind="laplace")
    result = fit(svi, jax.random.key(0), X, num_epochs=60, progress_bar=False)
    assert abs(result.params["sigma"] - 5.0) > 1.0
    tree = Posterior(guide, result).to_datatree(KEY, X, 50, num_particles=400)
    params, z = result.params["decoder$params"], np.linspace(-6, 6, 2001)[:, None]
    mean = z * np.asarray(params["kernel"])[0, 0] + np.asarray(params["bias"])[0]
    log_joint = dist.Normal(0, 1).log_prob(z) + dist.Laplace(mean, result.params["sigma"]).log_prob(
        X
    )
    evidence = np.log(np.exp(np.asarray(log_joint)).sum(0) * (z[1, 0] - z[0, 0]))
    found = tree["log_likelihood/x"].mean(("chain", "draw"))
    np.testing.assert_allclose(found, evidence, atol=0.05)


def test_khats_of_single_data_do_not_grow_with_their_number():
    """A guide a fifth too narrow for every datum: fine each, and hopeless for all at once."""

    class TooNarrow(nnx.Module):
        def __call__(self, inputs):
            loc = inputs[:, None] * 0.8  # the exact posterior is Normal(0.8 x, 0.2 ** 0.5)
            return loc, jnp.full_like(loc, np.log(0.8 * 0.2**0.5))

    guide = AutoAmortizedNormal(normal_model, TooNarrow())
    posterior = Posterior(guide, {"auto$params": {"encoder": {}, "blocks": {}}})
    x = np.asarray(jax.random.normal(jax.random.key(3), (100,)))
    found = posterior.check(KEY, x, checks=(Importance(num_samples=2000), "collapse"))
    assert (found.verdict == 0).mean() > 0.95
    joint = posterior.log_weights(KEY, x, 2000).sum(1, keepdims=True)
    assert pareto_khat(joint)[0] > 0.7 > np.quantile(found.dataset["khat"], 0.95)


def test_a_guide_in_another_order_than_the_model():
    """NumPyro warns of a global site after a local one; the objective is right all the same."""

    def model(x, late):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        data = numpyro.plate("data", len(x))
        if not late:
            sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with data:
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
        if late:
            sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with data:
            numpyro.sample("x", dist.Normal(z, sigma), obs=x)

    loss, found = TraceMeanField_ELBO(), []
    for late in (False, True):
        bound = partial(model, late=late)
        svi = make_svi(bound, loss=Trace_ELBO())
        params = first_params(make_svi(partial(model, late=False), loss=Trace_ELBO()), X)
        if late:
            with pytest.warns(UserWarning, match="occur in the same order"):
                found.append(loss.loss(KEY, params, bound, svi.guide, X))
        else:
            found.append(loss.loss(KEY, params, bound, svi.guide, X))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()], ids=["trace", "mean field"])
def test_what_the_model_masks_the_guide_masks(loss):
    """The loss of masked data is that of the others."""

    def model(x, there):
        with numpyro.plate("data", len(x)), handlers.mask(mask=there):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    class Constant(nnx.Module):
        def __call__(self, inputs):
            return jnp.zeros((40, 1)), jnp.full((40, 1), -20.0)  # z is 0

    guide, there = AutoAmortizedNormal(model, Constant(), inputs=lambda x, there: x), X > 0.5
    found = loss.loss(KEY, {"auto$params": {}}, model, guide, X, there)
    log_p = dist.Normal(0, 1).log_prob(0.0) + dist.Normal(0, 0.5).log_prob(X)
    log_q = -0.5 * np.log(2 * np.pi) + 20.0  # less half a square of noise, one in the mean
    expected = (log_q - 0.5 - log_p)[there].sum()
    assert abs(found - expected) < 5 * np.sqrt(0.5 * there.sum())


def test_renyi_of_a_global_and_a_subsampled_local_latent_is_refused():
    """By NumPyro, aloud; without a global, or on all data, it is served: see `test_fit.py`."""
    svi = make_svi(hierarchical_model, loss=RenyiELBO(num_particles=2))
    with pytest.raises(ValueError, match="RenyiELBO only supports subsampling"):
        quick(svi, jax.random.key(0), X, batch_size=10)
    assert np.isfinite(quick(svi, jax.random.key(0), X, batch_size=40).losses).all()


def test_weights_are_not_copied_for_every_draw():
    """No array in the compiled sampling has both the draws' axis and a weight's shape."""
    wide = partial(MLP, hidden_sizes=(123,))
    guide = AutoAmortizedNormal(normal_model, wide)
    params = first_params(SVI(normal_model, guide, optax.adam(1e-2), Trace_ELBO()), X)

    def sample(params, x):
        return guide.sample_posterior(KEY, params, x, sample_shape=(7,))

    assert "7,1,123]" not in str(jax.make_jaxpr(sample)(params, X))


def test_a_restored_state_goes_on_in_a_fresh_svi():
    """Through plain NumPy arrays, as a file keeps them."""
    first = quick(make_svi(hierarchical_model, loss=Trace_ELBO()), jax.random.key(0), X)
    expected = quick(
        make_svi(hierarchical_model, loss=Trace_ELBO()), KEY, X, init_state=first.state
    )
    key = np.asarray(jax.random.key_data(first.state.rng_key))
    kept = jax.tree.map(np.asarray, first.state._replace(rng_key=key))
    restored = kept._replace(rng_key=jax.random.wrap_key_data(kept.rng_key))
    found = quick(make_svi(hierarchical_model, loss=Trace_ELBO()), KEY, X, init_state=restored)
    np.testing.assert_array_equal(found.losses, expected.losses)


def test_old_random_keys_are_as_good_as_typed_ones():
    typed, old = jax.random.key(3), jax.random.PRNGKey(3)
    svi = make_svi(hierarchical_model, loss=Trace_ELBO())
    first, second = (quick(svi, key, X) for key in (typed, old))
    np.testing.assert_array_equal(first.losses, second.losses)
    posterior = Posterior(svi.guide, first)
    draws = [posterior.sample(key, X, 3) for key in (typed, old)]
    jax.tree.map(np.testing.assert_array_equal, *draws)


def test_messages_without_a_name_pass():
    """As `numpyro.prng_key` sends one, through all that hides sites by their name."""

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        rng_key = numpyro.prng_key()
        noise = 0.0 if rng_key is None else 1e-6 * jax.random.normal(rng_key)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu + noise, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    svi = make_svi(model, loss=Trace_ELBO())
    result = quick(svi, jax.random.key(0), X)
    assert np.isfinite(result.losses).all()
    assert Posterior(svi.guide, result).sample(KEY, X, 2)["mu"].shape == (2,)


def test_parameters_of_lists_of_layers_survive_serialization():
    """Their trees have integers as keys."""
    svi = make_svi(hierarchical_model, loss=Trace_ELBO())
    params = dict(quick(svi, jax.random.key(0), X).params)
    assert 0 in params["auto$params"]["encoder"]["layers"]
    leaves, treedef = jax.tree.flatten(params)
    restored = jax.tree.unflatten(treedef, from_bytes(leaves, to_bytes(leaves)))
    found, expected = (Posterior(svi.guide, p).sample(KEY, X, 2) for p in (restored, params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_float32_parameters_under_x64():
    """A whole training and posterior, the model's numbers in double precision."""
    with jax.enable_x64(True):
        svi = make_svi(hierarchical_model, loss=Trace_ELBO())
        x = X.astype(np.float64)
        result = quick(svi, jax.random.key(0), x, validation=x[:10])
        assert result.losses.dtype == np.float64
        kernel = result.params["auto$params"]["encoder"]["layers"][0]["kernel"]
        assert kernel.dtype == np.float32
        posterior = Posterior(svi.guide, result)
        assert np.isfinite(posterior.log_weights(KEY, x, 5)).all()
        assert posterior.predict(KEY, x, 5)["x"].dtype == np.float64


# What is said of networks that do not fit


class BySite(nnx.Module):
    """Features of some sites only."""

    def __call__(self, inputs):
        return {"y": jnp.zeros((len(inputs), 3))}


def test_features_that_leave_out_a_site_are_refused():
    guide = AutoAmortizedNormal(normal_model, BySite())
    with pytest.raises(ValueError, match=r"features cover the sites \['y'\].*\['z'\]"):
        handlers.seed(guide, 0)(X)
