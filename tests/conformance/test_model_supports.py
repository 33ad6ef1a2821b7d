"""Supports that depend on other values, and improper priors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from common import GUIDES, SMALL, X, run, start
from numpyro import handlers
from numpyro.distributions import constraints, transforms
from numpyro.infer.reparam import ProjectedNormalReparam, TransformReparam

from numpyro_vae import AutoAmortizedNormal, Posterior

by_guide = pytest.mark.parametrize("auto", GUIDES, ids=lambda auto: auto.__name__[13:])


def dynamic(x):
    """Supports that depend on what is sampled, in the form that reparametrization takes."""
    size = numpyro.sample("size", dist.LogNormal(0.0, 1.0))
    width = dist.TransformedDistribution(
        dist.Uniform(0, 1), transforms.AffineTransform(0.0, size, domain=constraints.unit_interval)
    )
    upper = numpyro.sample("upper", width)
    with numpyro.plate("data", len(x)):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        affine = transforms.AffineTransform(upper, scale, domain=constraints.unit_interval)
        z = numpyro.sample("z", dist.TransformedDistribution(dist.Uniform(0, 1), affine))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


@by_guide
def test_dynamic_supports(auto):
    config = {"upper": TransformReparam(), "z": TransformReparam()}
    model = handlers.reparam(dynamic, config=config)
    guide = auto(model, SMALL)
    params = start(model, guide, X)
    draws = guide.sample_posterior(jax.random.key(1), params, X, sample_shape=(50,))
    assert (draws["upper"] <= draws["size"]).all()
    upper = draws["upper"][:, None]
    assert ((draws["z"] >= upper) & (draws["z"] <= upper + draws["scale"])).all()


@pytest.mark.slow
def test_dynamic_supports_are_those_of_the_fixed_site():
    """Reparametrized, a model is one that multiplies by hand: same guide, same loss."""

    def by_hand(x):
        size = numpyro.sample("size", dist.LogNormal(0.0, 1.0))
        upper = size * numpyro.sample("upper_base", dist.Uniform(0, 1))
        with numpyro.plate("data", len(x)):
            scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
            z = upper + scale * numpyro.sample("z_base", dist.Uniform(0, 1))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    config = {"upper": TransformReparam(), "z": TransformReparam()}
    model = handlers.reparam(dynamic, config=config)
    _, found = run(model, AutoAmortizedNormal(model, SMALL), X)
    _, expected = run(by_hand, AutoAmortizedNormal(by_hand, SMALL), X)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)


@pytest.mark.parametrize("by", ["local", "global", "param"])
def test_a_support_that_moves_is_refused(by):
    def model(x):
        if by == "param":
            upper = numpyro.param("upper", 3.0, constraint=constraints.positive)
        if by == "global":
            upper = numpyro.sample("upper", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            if by == "local":
                upper = numpyro.sample("upper", dist.LogNormal(0.0, 1.0))
            z = numpyro.sample("z", dist.Uniform(0.0, upper))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match=r"'z' in plate 'data' depends on \['upper'\].*Reparam"):
        handlers.seed(AutoAmortizedNormal(model, SMALL), 0)(X)


def test_a_support_by_the_data_is_read_in_every_call():
    def model(x, upper):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Uniform(0.0, upper))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    params = start(model, guide, X, jnp.full(12, 3.0))
    upper = jnp.linspace(0.1, 9.0, 7)
    draws = guide.sample_posterior(jax.random.key(1), params, X[:7], upper, sample_shape=(200,))
    assert (draws["z"] < upper).all()
    assert (draws["z"].max(0) > 0.5 * upper).all()


@pytest.mark.slow
@by_guide
def test_improper_priors(auto):
    def model(x):
        offset = numpyro.sample("offset", dist.ImproperUniform(constraints.real, (), ()))
        sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), (2,)))
            numpyro.sample("x", dist.Normal(z.sum(-1) + offset, 1 + sigma), obs=x)

    guide = auto(model, SMALL)
    params = start(model, guide, X)
    draws = guide.sample_posterior(jax.random.key(1), params, X[:5], sample_shape=(3,))
    assert draws["z"].shape == (3, 5, 2)
    assert (draws["sigma"] > 0).all()
    if auto is AutoAmortizedNormal:
        posterior = Posterior(guide, run(model, guide, X)[1])
        assert posterior.predict(jax.random.key(1), np.asarray(X), 4)["x"].shape == (4, 12)


def on_a_circle(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.ProjectedNormal(jnp.array([1.0, 0.0])))
        numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_a_support_that_no_map_leads_to_is_refused_and_its_remedy_works():
    x = jnp.ones((6, 2))
    with pytest.raises(ValueError, match=r"'z' has the support Sphere.*ProjectedNormalReparam"):
        start(on_a_circle, AutoAmortizedNormal(on_a_circle, SMALL), x)
    model = handlers.reparam(on_a_circle, config={"z": ProjectedNormalReparam()})
    start(model, AutoAmortizedNormal(model, SMALL), x)


def test_a_function_of_other_sites_that_calls_itself_a_sample_is_refused():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            twice = numpyro.sample("twice", dist.Delta(2 * z))
            numpyro.sample("x", dist.Normal(twice, 0.5), obs=x)

    with pytest.raises(
        ValueError, match=r"'twice' in plate 'data'.*numpyro\.deterministic\('twice'"
    ):
        start(model, AutoAmortizedNormal(model, SMALL), X)
