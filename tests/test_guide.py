"""The guide wherever NumPyro takes one, on models of every shape."""

import pickle
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from models import hierarchical_model, normal_model
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
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal

from numpyro_vae import MLP, AutoAmortizedNormal, LogVariance, Softplus

X = jnp.linspace(-2, 2, 40)
SMALL = partial(MLP, hidden_sizes=(8,))


def run(model, guide, *args, loss=None, num_steps=3, **kwargs):
    svi = SVI(model, guide, optax.adam(1e-2), loss or Trace_ELBO())
    return svi, svi.run(jax.random.key(0), num_steps, *args, progress_bar=False, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3),
        TraceMeanField_ELBO(num_particles=2),
        TraceGraph_ELBO(num_particles=2),
        RenyiELBO(num_particles=4),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{loss.num_particles}",
)
@pytest.mark.parametrize("model", [normal_model, hierarchical_model])
def test_every_objective_learns(model, loss):
    _, result = run(model, AutoAmortizedNormal(model, SMALL), X, loss=loss, num_steps=200)
    assert result.losses[-20:].mean() < result.losses[:5].mean()
    assert np.isfinite(result.losses).all()


@pytest.mark.slow
def test_mean_field_elbo_uses_the_analytic_divergence():
    """With the likelihood gone, the analytic loss is the KL: the same for every key."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with handlers.mask(mask=False):
                numpyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def losses(loss):
        guide = AutoAmortizedNormal(model, SMALL, inputs=lambda x: x)  # or it sees that x is hidden
        svi = SVI(model, guide, optax.adam(1e-3), loss)
        state = svi.init(jax.random.key(0), X)
        params = svi.get_params(state)
        keys = jax.random.split(jax.random.key(1), 5)
        return [float(loss.loss(key, params, model, svi.guide, X)) for key in keys]

    assert np.ptp(losses(TraceMeanField_ELBO())) == 0
    assert np.ptp(losses(Trace_ELBO())) > 0.1


def test_sites_are_weighted_as_the_models():
    def model(x):
        with numpyro.plate("data", len(x), subsample_size=10) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = AutoAmortizedNormal(model, SMALL)
    guide_trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
    model_trace = handlers.trace(handlers.replay(handlers.seed(model, 1), guide_trace))
    model_trace = model_trace.get_trace(X)
    assert guide_trace["z"]["scale"] == model_trace["z"]["scale"] == 4.0
    np.testing.assert_array_equal(guide_trace["data"]["value"], model_trace["data"]["value"])


def test_the_subsample_that_is_encoded_is_the_one_that_is_observed():
    def model(x):
        with numpyro.plate("data", len(x), subsample_size=5) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    class Identity(nnx.Module):
        def __call__(self, inputs):
            return inputs[:, None], jnp.full((len(inputs), 1), -20.0)

    guide = AutoAmortizedNormal(model, Identity())
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
    np.testing.assert_allclose(trace["z"]["value"], X[trace["data"]["value"]], atol=1e-6)


@pytest.mark.parametrize("scale", ["log_scale", "log_variance", "softplus", "scale"])
def test_scale_starts_where_the_parameterization_says(scale):
    guide = AutoAmortizedNormal(normal_model, SMALL, scale=scale)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
    np.testing.assert_allclose(trace["z"]["fn"].scale, 1.0, rtol=1e-6)


def test_a_raw_scale_means_what_is_declared():
    class Pair(nnx.Module):
        def __call__(self, inputs):
            return jnp.zeros((len(inputs), 1)), jnp.full((len(inputs), 1), -2.0)

    def scale_of(scale):
        guide = AutoAmortizedNormal(normal_model, Pair(), scale=scale)
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
        return float(trace["z"]["fn"].scale[0])

    assert scale_of("log_scale") == pytest.approx(np.exp(-2.0))
    assert scale_of("log_variance") == pytest.approx(np.exp(-1.0))
    assert scale_of(LogVariance()) == pytest.approx(np.exp(-1.0))
    assert scale_of(Softplus()) == pytest.approx(np.log1p(np.exp(-2.0)))


def test_a_pair_by_site_name_is_packed_in_the_models_order():
    def model(x):
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
            a = numpyro.sample("a", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    class BySite(nnx.Module):
        def __call__(self, inputs):
            n = len(inputs)
            loc = {"a": jnp.full((n,), 1.0), "b": jnp.full((n, 2), 2.0)}
            return loc, jax.tree.map(lambda x: jnp.full_like(x, -20.0), loc)

    trace = handlers.trace(handlers.seed(AutoAmortizedNormal(model, BySite()), 0)).get_trace(X)
    np.testing.assert_allclose(trace["a"]["value"], 1.0, atol=1e-5)
    np.testing.assert_allclose(trace["b"]["value"], 2.0, atol=1e-5)


def test_another_key_is_another_initialization():
    def first_kernel(seed):
        svi = SVI(normal_model, AutoAmortizedNormal(normal_model), optax.adam(1e-3), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(seed), X))
        return np.asarray(params["auto$params"]["encoder"]["layers"][0]["kernel"])

    np.testing.assert_array_equal(first_kernel(0), first_kernel(0))
    assert np.abs(first_kernel(0) - first_kernel(1)).max() > 0.01


def test_gradient_reaches_every_weight_but_the_standardization():
    guide = AutoAmortizedNormal(normal_model)
    svi = SVI(normal_model, guide, optax.sgd(1.0), Trace_ELBO())
    state = svi.init(jax.random.key(0), X)
    before = svi.get_params(state)["auto$params"]
    after = svi.get_params(svi.update(state, X)[0])["auto$params"]
    # The head's raw scale starts at zero weights, so its gradient is met by what feeds it.
    for path, change in jax.tree.leaves_with_path(jax.tree.map(jnp.subtract, after, before)):
        trained = "standardize" not in jax.tree_util.keystr(path)
        assert (np.abs(change).max() > 0) == trained, path


def test_inputs_from_the_arguments():
    def model(x, y):
        with numpyro.plate("data", len(y), subsample_size=10) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z + x[rows], 1.0), obs=y[rows])

    seen = []

    class Spy(nnx.Module):
        def __call__(self, inputs):
            seen.append(inputs)
            return inputs["x"][:, None], inputs["y"][:, None]

    guide = AutoAmortizedNormal(model, Spy(), inputs=lambda x, y: {"x": x, "y": y})
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X, 2 * X)
    rows = trace["data"]["value"]
    np.testing.assert_array_equal(seen[-1]["x"], X[rows])
    np.testing.assert_array_equal(seen[-1]["y"], 2 * X[rows])


def test_standardization_is_by_the_first_data_and_is_not_trained():
    x = 1000 + 50 * X
    guide = AutoAmortizedNormal(normal_model, partial(MLP, hidden_sizes=(8,)))
    _, result = run(normal_model, guide, x)
    stats = result.params["auto$params"]["encoder"]["standardize"]
    np.testing.assert_allclose(stats["shift"] / stats["factor"], x.mean(), rtol=1e-5)
    np.testing.assert_allclose(1 / stats["factor"], x.std(), rtol=1e-4)


@pytest.mark.parametrize("global_guide", [AutoNormal, AutoDelta, AutoMultivariateNormal])
def test_global_guides(global_guide):
    guide = AutoAmortizedNormal(hierarchical_model, SMALL, global_guide=global_guide)
    _, result = run(hierarchical_model, guide, X)
    draws = guide.sample_posterior(jax.random.key(1), result.params, X[:5], sample_shape=(6,))
    assert draws["mu"].shape == (6,)
    assert draws["z"].shape == (6, 5)


def test_a_global_guide_written_by_hand():
    def by_hand(model):
        def guide(*args):
            loc = numpyro.param("mu_loc", 3.0)
            return {"mu": numpyro.sample("mu", dist.Normal(loc, 0.01))}

        return guide

    guide = AutoAmortizedNormal(hierarchical_model, SMALL, global_guide=by_hand)
    _, result = run(hierarchical_model, guide, X)
    draws = guide.sample_posterior(jax.random.key(1), result.params, X[:5], sample_shape=(6,))
    np.testing.assert_allclose(draws["mu"], result.params["mu_loc"], atol=0.1)


def test_a_joint_guide_of_global_sites_of_which_the_model_holds_a_part_is_refused():
    def model(x):
        with numpyro.plate("columns", 4, subsample_size=2, dim=-1):
            shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x), dim=-1):
            z = numpyro.sample("z", dist.Normal(shift.sum(), 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, SMALL, plate="data", global_guide=AutoMultivariateNormal)
    message = "'shift' lies in plate 'columns', which subsamples 2 of 4.*AutoMultivariateNormal"
    with pytest.raises(ValueError, match=message):
        run(model, guide, X)


@pytest.mark.slow
def test_predictive_and_new_data_of_any_size():
    guide = AutoAmortizedNormal(normal_model, SMALL)
    _, result = run(normal_model, guide, X)
    predictive = Predictive(normal_model, guide=guide, params=result.params, num_samples=6)
    assert predictive(jax.random.key(1), X[:9])["x"].shape == (6, 9)
    for rows in (1, 7, 40):
        draws = guide.sample_posterior(jax.random.key(1), result.params, X[:rows])
        assert draws["z"].shape == (rows,)


@pytest.mark.slow
def test_a_subsampling_guide_encodes_all_rows_in_order():
    def model(x):
        with numpyro.plate("data", len(x), subsample_size=5) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = AutoAmortizedNormal(model, SMALL)
    svi, result = run(model, guide, X)
    plain = AutoAmortizedNormal(normal_model, SMALL)
    plain.setup(X)
    np.testing.assert_allclose(
        guide.median(result.params, X)["z"], plain.median(result.params, X)["z"], rtol=1e-6
    )
    tree = az.from_numpyro_svi(svi, svi_result=result, model_args=(X,), num_samples=8)
    assert dict(tree.posterior.sizes) == {"sample": 8, "data": 40}


def test_deterministic_sites_are_computed_from_the_draws():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            double = numpyro.deterministic("double", 2 * z)
            numpyro.sample("x", dist.Normal(double, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    _, result = run(model, guide, X)
    draws = guide.sample_posterior(jax.random.key(1), result.params, X, sample_shape=(3,))
    np.testing.assert_allclose(draws["double"], 2 * draws["z"], rtol=1e-6)


def test_in_a_guide_list():
    guide = AutoGuideList(hierarchical_model)
    guide.append(AutoAmortizedNormal(handlers.block(hierarchical_model, hide=["mu"]), SMALL))
    guide.append(AutoNormal(handlers.block(hierarchical_model, expose=["mu"])))
    _, result = run(hierarchical_model, guide, X)
    draws = guide.sample_posterior(jax.random.key(1), result.params, X, sample_shape=(3,))
    assert {name: draw.shape for name, draw in draws.items()} == {"z": (3, 40), "mu": (3,)}


def test_pickle_jit_and_vmap():
    guide = AutoAmortizedNormal(hierarchical_model, SMALL)
    _, result = run(hierarchical_model, guide, X)
    copy = pickle.loads(pickle.dumps(guide))
    key = jax.random.key(1)
    expected = guide.sample_posterior(key, result.params, X)["z"]
    np.testing.assert_array_equal(copy.sample_posterior(key, result.params, X)["z"], expected)
    jitted = jax.jit(lambda key, x: guide.sample_posterior(key, result.params, x)["z"])
    np.testing.assert_allclose(jitted(key, X), expected, rtol=1e-5, atol=1e-6)
    keys = jax.random.split(key, 3)
    draws = jax.vmap(lambda key: guide.sample_posterior(key, result.params, X)["z"])(keys)
    assert draws.shape == (3, 40)
    expected = guide.sample_posterior(keys[1], result.params, X)["z"]
    np.testing.assert_allclose(draws[1], expected, rtol=1e-5, atol=1e-6)


def test_set_up_evaluates_no_likelihood_at_a_million_rows():
    evaluated, ran = [], []

    class Counting(dist.Normal):
        def log_prob(self, value, intermediates=None):
            evaluated.append(value)
            return super().log_prob(value)

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            ran.append(isinstance(z, jax.core.Tracer))
            numpyro.sample("x", Counting(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    guide.setup(jnp.zeros(1_000_000))
    assert guide.plate.size == 1_000_000
    assert not evaluated
    assert ran
    assert all(ran)


def test_a_model_that_reads_its_arguments_values():
    groups = np.repeat([0, 1], 20)

    def model(x, groups):
        num_groups = len(np.unique(groups))
        with numpyro.plate("groups", num_groups):
            mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu[groups], 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, SMALL, plate="data")
    _, result = run(model, guide, X, groups)
    assert result.params["mu_auto_loc"].shape == (2,)


def test_a_network_in_the_model_is_not_run_to_encode():
    """What the guide does not read of the model costs nothing in compiled code."""

    def model(x, decoder):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(decode(z)[..., 0], 1.0), obs=x)

    decoder = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    bound = partial(model, decoder=decoder)
    guide = AutoAmortizedNormal(bound, SMALL)
    _, result = run(bound, guide, X)
    encode = jax.jit(lambda params, x: guide.encode(params, x).marginal(lambda fn: fn.mean))
    text = encode.lower(result.params, X).compile().as_text()
    assert text.count(" dot(") <= 3  # the hidden layer and the two heads


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_inputs_stay_finite(sign):
    guide = AutoAmortizedNormal(normal_model, SMALL)
    x = sign * np.full(40, 1e4, np.float32)
    _, result = run(normal_model, guide, x)
    assert np.isfinite(result.losses).all()


def test_x64_data_and_model():
    with jax.enable_x64(True):
        guide = AutoAmortizedNormal(normal_model, SMALL)
        _, result = run(normal_model, guide, np.linspace(-2, 2, 40))
        assert result.losses.dtype == np.float64
        assert np.isfinite(result.losses).all()
