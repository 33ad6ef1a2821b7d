"""Effect handlers around the model, around the guide, and around both."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from common import GUIDES, SMALL, X, hierarchical, run, start
from numpyro import handlers
from numpyro.distributions import transforms
from numpyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.reparam import LocScaleReparam, TransformReparam

from numpyro_vae import AutoAmortizedNormal, Posterior

by_guide = pytest.mark.parametrize("auto", GUIDES, ids=lambda auto: auto.__name__[13:])
KEY = jax.random.key(1)


def trace_of(guide, *args, **data):
    return handlers.trace(handlers.substitute(handlers.seed(guide, 0), data)).get_trace(*args)


def params_of(trace):
    return {name: msg["value"] for name, msg in trace.items() if msg["type"] == "param"}


@pytest.mark.slow
@by_guide
def test_loc_scale_reparam_of_local_and_global_sites(auto):
    config = {"z": LocScaleReparam(0.0), "mu": LocScaleReparam(0.0)}
    model = handlers.reparam(hierarchical, config=config)
    guide = auto(model, SMALL)
    params = start(model, guide, X)
    draws = guide.sample_posterior(KEY, params, X[:7], sample_shape=(3,))
    np.testing.assert_allclose(draws["mu"], draws["mu_decentered"], rtol=1e-6)
    centered = draws["mu"][:, None] + 2 * draws["z_decentered"]
    np.testing.assert_allclose(draws["z"], centered, rtol=1e-5, atol=1e-5)


def test_a_learned_centering():
    model = handlers.reparam(hierarchical, config={"z": LocScaleReparam()})
    guide = AutoAmortizedNormal(model, SMALL)
    _, result = run(model, guide, X)
    assert result.params["z_centered"] != 0.5
    draws = Posterior(guide, result).sample(KEY, np.asarray(X), 3)
    assert draws["z_decentered"].shape == (3, 12)


def test_transform_reparam_changes_no_posterior():
    """A LogNormal written as the exponential of a Normal: the same guide, the same losses."""

    def model(x):
        exponential = dist.TransformedDistribution(dist.Normal(0, 1), transforms.ExpTransform())
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", exponential)
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    reparametrized = handlers.reparam(model, config={"z": TransformReparam()})
    guide = AutoAmortizedNormal(reparametrized, SMALL)
    _, found = run(reparametrized, guide, X)
    _, expected = run(model, AutoAmortizedNormal(model, SMALL), X)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    draws = guide.sample_posterior(KEY, found.params, X)
    np.testing.assert_allclose(draws["z"], jnp.exp(draws["z_base"]), rtol=1e-6)


def subsampling(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x), subsample_size=4) as rows:
        z = numpyro.sample("z", dist.Normal(mu, 2.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])


@pytest.mark.slow
def test_scope_around_model_and_guide():
    """Names change and nothing else: the rows of the subsample and their weights are the same."""
    guide = handlers.scope(AutoAmortizedNormal(subsampling, SMALL), prefix="a")
    _, found = run(handlers.scope(subsampling, prefix="a"), guide, X)
    _, expected = run(subsampling, AutoAmortizedNormal(subsampling, SMALL), X)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert set(found.params) == {f"a/{name}" for name in expected.params}


def test_a_guide_of_a_scoped_model():
    model = handlers.scope(hierarchical, prefix="a")
    guide = AutoAmortizedNormal(model, SMALL)
    params = start(model, guide, X)
    assert "auto$params" in params
    draws = guide.sample_posterior(KEY, params, X)
    assert set(draws) == {"a/mu", "a/z", "a/w", "a/mean"}


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()], ids=["trace", "mean field"])
def test_scale_around_model_and_guide(loss):
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    params = params_of(trace_of(guide, X))
    once = loss.loss(KEY, params, hierarchical, guide, X)
    scaled = [handlers.scale(fn, scale=3.0) for fn in (hierarchical, guide)]
    np.testing.assert_allclose(loss.loss(KEY, params, *scaled, X), 3 * once, rtol=1e-5)


def test_scale_inside_the_model_is_the_guides():
    """What the model scales, the guide scales; a scale around the guide comes on top."""

    def model(x):
        with handlers.scale(scale=3.0), numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    trace = trace_of(guide, X)
    assert trace["z"]["scale"] == 3.0
    both = handlers.scale(guide, scale=2.0)
    assert trace_of(both, X)["z"]["scale"] == 6.0


@by_guide
def test_a_mask_around_model_and_guide(auto):
    guide = auto(hierarchical, SMALL)
    params = params_of(trace_of(guide, X))
    masked = [handlers.mask(fn, mask=False) for fn in (hierarchical, guide)]
    assert Trace_ELBO().loss(KEY, params, *masked, X) == 0


def test_blocked_sites_are_left_to_another():
    guide = AutoAmortizedNormal(handlers.block(hierarchical, hide=["mu", "w"]), SMALL)
    assert {"z"} == {name for name, m in trace_of(guide, X).items() if m["type"] == "sample"}
    latent = dict(handlers.seed(guide, 0)(X))
    assert set(latent) == {"z"}


@by_guide
def test_a_conditioned_model(auto):
    """What is conditioned on is observed: a local site is read by the encoder, a global is gone."""
    model = handlers.condition(hierarchical, {"mu": jnp.array(0.3), "w": jnp.ones(12)})
    guide = auto(model, SMALL)
    params = start(model, guide, X)
    assert set(params) == {"auto$params"}
    kernel = params["auto$params"]["encoder"]["layers"][0]["kernel"]
    assert kernel.shape == (2, 4)
    assert set(guide.sample_posterior(KEY, params, X)) == {"z", "mean"}


def test_substituted_values_in_the_guide():
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    trace = trace_of(guide, X, z=X, mu=jnp.array(1.0))
    np.testing.assert_array_equal(trace["z"]["value"], X)
    assert trace["mu"]["value"] == 1.0
    expected = trace["z"]["fn"].log_prob(X)
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("data", [{"mu": jnp.array(0.3)}, {"w": jnp.ones(12)}], ids=["mu", "w"])
def test_an_intervention(data):
    """`do` samples the site still, and gives the model another value."""
    (name,) = data
    model = handlers.do(hierarchical, data)
    guide = AutoAmortizedNormal(model, SMALL)
    params = start(model, guide, X)
    draws = guide.sample_posterior(KEY, params, X, sample_shape=(3,))
    assert set(draws) == {"mu", "z", "w", "mean"}
    assert (draws[name] != data[name]).all()
    if name == "w":
        np.testing.assert_allclose(draws["mean"], draws["z"] + 1.0, rtol=1e-5)


def test_an_infer_config_and_a_replayed_trace():
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    marked = handlers.infer_config(guide, config_fn=lambda msg: {"mark": msg["name"]})
    assert trace_of(marked, X)["z"]["infer"] == {"mark": "z"}
    trace = trace_of(guide, X)
    again = handlers.trace(handlers.replay(handlers.seed(guide, 5), trace)).get_trace(X)
    np.testing.assert_array_equal(again["z"]["value"], trace["z"]["value"])


def test_predictive_of_a_lifted_site_by_substitution():
    """Draws of the guide, put into a model that leaves some out."""
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    params = start(hierarchical, guide, X)
    draws = guide.sample_posterior(KEY, params, X, sample_shape=(6,))
    kept = {name: draws[name] for name in ("mu", "z")}
    found = Predictive(hierarchical, kept)(KEY, X)
    assert found["w"].shape == (6, 12)
    np.testing.assert_allclose(found["mean"], draws["z"] + found["w"], rtol=1e-5)
