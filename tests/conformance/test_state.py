"""Networks with state: trained where the objective calls the guide, frozen everywhere else."""

from functools import partial

import arviz as az
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from common import X, run
from flax import nnx
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from numpyro_vae import AutoAmortizedNormal, Posterior, fit

KEY = jax.random.key(1)
DATA = np.random.default_rng(0).normal(1.0, 1.1, 200).astype(np.float32)


class Normalized(nnx.Module):
    """Its statistics say how much of the data it has seen."""

    def __init__(self, example_inputs, *, rngs):
        self.linear = nnx.Linear(1, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.linear(inputs[:, None]))


class Dropped(nnx.Module):
    """Half of what it returns is dropped in training, all of it there in evaluation."""

    def __init__(self, example_inputs, *, rngs):
        self.weight = nnx.Param(jnp.ones(()))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        loc = self.dropout(inputs[:, None] * self.weight[...])
        return loc, jnp.full_like(loc, -20.0)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5, validate_args=False), obs=x)


make_svi = partial(helpers.make_svi, model, Normalized, loss=Trace_ELBO())


def statistics(state):
    return state["auto$state"]["state"]["encoder"]["norm"]


def test_an_update_trains_the_statistics():
    """With frozen parameters they go a tenth of the way to the batch's in each step."""
    svi = make_svi(optimizer=optax.sgd(0.0))
    state = svi.init(jax.random.key(0), X)
    linear = svi.get_params(state)["auto$params"]["encoder"]["linear"]
    target = (X[:, None] @ linear["kernel"] + linear["bias"]).mean(0)
    means = [np.zeros(4)]  # flax's initial mean; init has no more than declared it
    for _ in range(3):
        state, _ = svi.update(state, X)
        means.append(statistics(state.mutable_state)["mean"])
    steps = 1 - 0.9 ** np.arange(1, 4)
    first = statistics(svi.init(jax.random.key(0), X).mutable_state)["mean"]
    left = [(target - mean) / (target - first) for mean in means[1:]]
    np.testing.assert_allclose(left, np.broadcast_to((1 - steps)[:, None], (3, 4)), rtol=1e-4)


@pytest.mark.parametrize("how", ["run", "fit"])
def test_statistics_are_frozen_after_training(how):
    svi = make_svi()
    if how == "run":
        result = svi.run(jax.random.key(0), 20, jnp.asarray(DATA), progress_bar=False)
        params = {**result.params, **result.state.mutable_state}
    else:
        result = fit(svi, jax.random.key(0), DATA, num_epochs=10, progress_bar=False)
        params = result.params
    before = jax.tree.map(np.asarray, params)
    posterior = Posterior(svi.guide, result)
    whole = posterior.encode(DATA)["z"].loc
    # A row's encoding does not depend on the batch that it comes in, nor change anything.
    np.testing.assert_allclose(posterior.encode(DATA[:3])["z"].loc, whole[:3], rtol=1e-5)
    draws = svi.guide.sample_posterior(KEY, params, DATA[:3], sample_shape=(4000,))["z"]
    scale = posterior.encode(DATA[:3])["z"].scale
    np.testing.assert_array_less(np.abs(draws.mean(0) - whole[:3]), 5 * scale / np.sqrt(4000))
    predictive = Predictive(svi.guide, params=params, num_samples=4000)
    drawn = predictive(KEY, DATA[:3])["z"]
    np.testing.assert_array_less(np.abs(drawn.mean(0) - whole[:3]), 5 * scale / np.sqrt(4000))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_predictive_turns_dropout_off():
    svi = helpers.make_svi(model, Dropped, loss=Trace_ELBO())
    state = svi.init(jax.random.key(0), X)
    params = {**svi.get_params(state), **state.mutable_state}
    drawn = Predictive(model, guide=svi.guide, params=params, num_samples=3)
    draws = Predictive(svi.guide, params=params, num_samples=3)(KEY, X)["z"]
    np.testing.assert_allclose(draws, np.broadcast_to(X, (3, 12)), atol=1e-5)
    assert np.abs(drawn(KEY, X)["x"] - X).max() < 5 * 0.5
    trained = handlers.substitute(handlers.seed(svi.guide, 0), data=params)(X)["z"]
    dropped = np.isclose(trained, 0.0, atol=1e-5)
    assert 1 <= dropped.sum() <= 11
    np.testing.assert_allclose(trained[~dropped], 2 * X[~dropped], atol=1e-5)


def test_the_keys_of_dropout_are_of_no_use_to_evaluation():
    """So `Predictive` and ArviZ can do without them."""
    svi = helpers.make_svi(model, Dropped, loss=Trace_ELBO())
    result = svi.run(jax.random.key(0), 2, X, progress_bar=False)
    draws = Predictive(svi.guide, params=result.params, num_samples=3)(KEY, X)["z"]
    weight = result.params["auto$params"]["encoder"]["weight"]
    np.testing.assert_allclose(draws, np.broadcast_to(weight * X, (3, 12)), atol=1e-5)
    tree = az.from_numpyro_svi(svi, svi_result=result, model_args=(X,), num_samples=3)
    np.testing.assert_allclose(tree.posterior["z"], draws, atol=1e-5)


@pytest.mark.slow
def test_state_that_is_missing_is_named():
    svi = make_svi()
    result = svi.run(jax.random.key(0), 2, X, progress_bar=False)
    missing = r"have no 'auto\$state'.*\{\*\*result.params, \*\*result.state.mutable_state\}"
    with pytest.raises(ValueError, match=missing):
        Predictive(model, guide=svi.guide, params=result.params, num_samples=2)(KEY, X)
    with pytest.raises(ValueError, match=missing):
        svi.guide.sample_posterior(KEY, result.params, X)
    with pytest.raises(ValueError, match=missing):
        Posterior(svi.guide, result.params).encode(np.asarray(X))
    with pytest.raises(ValueError, match=missing):
        az.from_numpyro_svi(svi, svi_result=result, model_args=(X,), num_samples=2)
    whole = result._replace(params={**result.params, **result.state.mutable_state})
    tree = az.from_numpyro_svi(svi, svi_result=whole, model_args=(X,), num_samples=2)
    assert tree.posterior["z"].shape == (2, 12)


def test_evaluate_is_in_training_mode():
    """NumPyro gives `svi.evaluate` no state; the loss is that of a training step all the same."""
    svi = make_svi()
    state = svi.init(jax.random.key(0), X)
    for _ in range(2):
        state, _ = svi.update(state, X)
    loss = svi.evaluate(state, X)
    np.testing.assert_allclose(loss, svi.update(state, X)[1], rtol=1e-5)
    params = {**svi.get_params(state), **state.mutable_state}
    frozen = svi.loss.loss(KEY, params, model, svi.guide.eval(), X)
    assert abs(frozen - svi.loss.loss(KEY, params, model, svi.guide, X)) > 1e-3
    jax.tree.map(
        np.testing.assert_array_equal, params["auto$state"], state.mutable_state["auto$state"]
    )


def test_a_stable_update_of_numpyros_does_not_protect_the_state():
    """A limit of NumPyro's, held here: `fit` protects it, see `test_fit.py`."""
    svi = make_svi()
    state = svi.init(jax.random.key(0), X)
    bad, loss = jax.jit(svi.stable_update)(state, X.at[3].set(jnp.nan))
    assert np.isnan(loss)
    jax.tree.map(np.testing.assert_array_equal, svi.get_params(bad), svi.get_params(state))
    assert np.isnan(statistics(bad.mutable_state)["mean"]).all()


def test_initial_parameters_come_without_state():
    svi = make_svi()
    given = {"auto$params": svi.get_params(svi.init(jax.random.key(5), X))["auto$params"]}
    state = svi.init(jax.random.key(0), X, init_params=given)
    jax.tree.map(np.testing.assert_array_equal, svi.get_params(state), given)
    assert np.isfinite(svi.update(state, X)[1])
    assert set(state.mutable_state) == {"auto$state"}


# Several particles, and objectives that know of no state


OBJECTIVES = {
    "particles": Trace_ELBO(num_particles=4),
    "mean field, particles": TraceMeanField_ELBO(num_particles=4),
    "Renyi": RenyiELBO(num_particles=3),
    "graph": TraceGraph_ELBO(),
}


def fitted(loss):
    svi = make_svi(loss=loss, optimizer=optax.sgd(0.0))  # the same parameters for all
    return fit(
        svi, jax.random.key(0), DATA, batch_size=50, num_epochs=5, validation=DATA[:60],
        progress_bar=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_particle():
    return statistics(fitted(Trace_ELBO()).params)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fit_keeps_the_state_whatever_the_objective(objective, one_particle):
    result = fitted(OBJECTIVES[objective])
    found = statistics(result.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, one_particle)
    assert np.isfinite(result.history["validation_loss"]).all()


@pytest.mark.slow
def test_several_particles_train_as_one_network():
    """The dropped units are those of the step, for all particles, and others in the next step."""
    svi = helpers.make_svi(
        model, Dropped, loss=Trace_ELBO(num_particles=4), optimizer=optax.sgd(0.0)
    )
    result = fit(svi, jax.random.key(0), DATA, batch_size=200, num_epochs=4, progress_bar=False)
    assert len(np.unique(result.losses)) == 4


def test_svi_alone_loses_the_state_with_several_particles():
    """A limit of NumPyro's, which warns or cannot scan; the loss shows when the state is needed."""
    svi = make_svi(loss=Trace_ELBO(num_particles=2))
    state = svi.init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match="mutable state is currently ignored"):
        state, loss = svi.update(state, X)
    assert state.mutable_state is None
    assert np.isfinite(loss)
    with pytest.raises(ValueError, match=r"have no 'auto\$state'.*num_particles above 1"):
        Posterior(svi.guide, svi.get_params(state)).encode(np.asarray(X))
    warned = pytest.warns(UserWarning, match="mutable state is currently ignored")
    with warned, pytest.raises(TypeError, match="mutable_state"):
        svi.run(jax.random.key(0), 2, X, progress_bar=False)


def decoded_by(decoder):
    """A model whose decoder is a network."""

    def decoded(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(decode(z[:, None])[:, 0], 0.5), obs=x)

    return decoded


@pytest.mark.slow
def test_state_of_a_network_in_the_model():
    decoder = nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    decoded = decoded_by(decoder)
    _, result = run(decoded, AutoAmortizedNormal(decoded, Normalized), X)
    assert set(result.state.mutable_state) == {"auto$state", "decoder$state"}

    def variance(loss):
        svi = SVI(decoded, AutoAmortizedNormal(decoded, Normalized), optax.sgd(0.0), loss)
        result = fit(svi, jax.random.key(0), DATA, num_epochs=20, progress_bar=False)
        return result.params["decoder$state"]["state"]["var"]

    # Of a draw each: near those of another draw, and moved from where they began, at 1.
    first, second = variance(Trace_ELBO()), variance(Trace_ELBO(num_particles=2))
    np.testing.assert_allclose(first, second, rtol=0.1)
    assert abs(first - 1) > 0.01


def test_a_posterior_says_that_a_network_of_the_model_takes_statistics_of_a_batch():
    """It is the row's own once the network is in evaluation mode, whatever was compiled before."""
    decoder = nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    decoded = decoded_by(decoder)
    svi = helpers.make_svi(decoded, loss=Trace_ELBO())
    result = fit(svi, jax.random.key(0), DATA, num_epochs=1, progress_bar=False)
    posterior = Posterior(svi.guide, result)

    def of_first(rows):
        return posterior.log_weights(KEY, DATA[:rows], 5)[:, 0]

    warned = pytest.warns(UserWarning, match=r"networks \['decoder'\] take statistics.*call eval")
    with warned:
        among, alone = of_first(100), of_first(1)
    assert abs(among - alone).max() > 0.1
    decoder.eval()
    np.testing.assert_allclose(of_first(100), of_first(1), rtol=1e-4, atol=1e-4)
