"""Amortized guides beside others: in `AutoGuideList`, and as the base of `AutoSemiDAIS`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from common import GUIDES, SMALL, X, hierarchical, run, start
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, AutoSemiDAIS

from numpyro_vae import AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal

KEY = jax.random.key(1)
by_guide = pytest.mark.parametrize("auto", GUIDES, ids=lambda auto: auto.__name__[13:])


def part(*names):
    """The model with these latent sites alone, and the deterministic one hidden."""
    others = {"mu", "z", "w", "mean"} - set(names)
    return handlers.block(hierarchical, hide=sorted(others))


def global_by_hand(x):
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("scale", 0.1, constraint=constraints.positive)
    return {"mu": numpyro.sample("mu", dist.Normal(loc, scale))}


@pytest.mark.slow
@by_guide
@pytest.mark.parametrize("beside", ["AutoNormal", "AutoDelta", "by hand"])
def test_locals_in_a_list_with_a_guide_of_the_globals(auto, beside):
    guide = AutoGuideList(hierarchical)
    guide.append(auto(part("z", "w"), SMALL))
    others = {"AutoNormal": AutoNormal, "AutoDelta": AutoDelta}
    guide.append(others[beside](part("mu")) if beside in others else global_by_hand)
    params = start(hierarchical, guide, X)
    assert "auto$params" in params
    if beside in others:  # which NumPyro's list asks all its parts for
        draws = guide.sample_posterior(KEY, params, X, sample_shape=(3,))
        assert {name: draw.shape for name, draw in draws.items()} == {
            "mu": (3,),
            "z": (3, 12),
            "w": (3, 12),
        }


def test_a_list_is_the_guide_that_holds_both():
    guide = AutoGuideList(hierarchical)
    guide.append(AutoNormal(part("mu")))
    guide.append(AutoAmortizedNormal(part("z", "w"), SMALL))
    _, result = run(hierarchical, guide, X, num_steps=200)
    _, whole = run(hierarchical, AutoAmortizedNormal(hierarchical, SMALL), X, num_steps=200)
    assert set(result.params) == set(whole.params)
    found, expected = (r.losses[-100:].mean() for r in (result, whole))
    np.testing.assert_allclose(found, expected, rtol=0.2)


@pytest.mark.slow
def test_two_amortized_guides_in_a_list():
    """Each with a network of its own, under a prefix of its own."""
    guide = AutoGuideList(hierarchical)
    guide.append(AutoNormal(part("mu")))
    guide.append(AutoAmortizedNormal(part("z"), SMALL, prefix="first"))
    guide.append(AutoAmortizedFlow(part("w"), SMALL, prefix="second"))
    _, result = run(hierarchical, guide, X)
    assert {"first$params", "second$params"} < set(result.params)
    draws = guide.sample_posterior(KEY, result.params, X[:5], sample_shape=(2,))
    assert draws["z"].shape == draws["w"].shape == (2, 5)
    assert (draws["w"] > 0).all()


# AutoSemiDAIS: Hamiltonian steps from the amortized guide to the posterior


def global_model():
    return numpyro.sample("theta", dist.Normal(0.0, 1.0))


def local_model(theta):
    with numpyro.plate("data", 12, subsample_size=4):
        x = numpyro.subsample(X, event_dim=0)
        z = numpyro.sample("z", dist.Normal(theta, 1.0))
        tau = numpyro.sample("tau", dist.Gamma(5.0, 5.0))
        numpyro.sample("x", dist.Normal(z, tau), obs=x)


def model():
    return local_model(global_model())


def semi_dais(local_guide):
    guide = AutoSemiDAIS(model, local_model, AutoNormal(global_model), local_guide=local_guide, K=2)
    return guide, SVI(model, guide, optax.adam(1e-2), Trace_ELBO())


@pytest.mark.slow
def test_as_the_base_of_semi_dais():
    guide, svi = semi_dais(AutoAmortizedNormal(local_model, SMALL))
    result = svi.run(jax.random.key(0), 3, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert "auto$params" in result.params
    with handlers.substitute(data={"data": jnp.array([3, 7, 0, 1])}):
        draws = guide.sample_posterior(KEY, result.params, sample_shape=(3,))
    assert draws["z"].shape == draws["tau"].shape == (3, 4)
    assert draws["theta"].shape == (3,)


def test_semi_dais_begins_at_the_amortized_guide():
    """With steps of size zero and no annealing left, its latents are the guide's."""

    def alone():
        with numpyro.plate("data", 12, subsample_size=4):
            x = numpyro.subsample(X, event_dim=0)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def apply(params, x):  # sure of three times the datum
        return 3 * x[:, None] + params["zero"], jnp.full((len(x), 1), -20.0)

    base = AutoAmortizedNormal(alone, (lambda rng_key, x: {"zero": jnp.zeros(())}, apply))
    guide = AutoSemiDAIS(alone, alone, None, local_guide=base, K=1, eta_init=1e-10)
    rows = jnp.array([3, 7, 0, 1])
    fixed = handlers.substitute(handlers.seed(guide, 0), data={"data": rows})
    np.testing.assert_allclose(fixed()["z"], 3 * X[rows], atol=1e-3)


def test_semi_dais_knows_no_auxiliary_sites():
    """A limit of NumPyro's: a joint family has one, as its own AutoMultivariateNormal has."""
    _, svi = semi_dais(AutoAmortizedMultivariateNormal(local_model, SMALL))
    with pytest.raises(ValueError, match="_auto_z_tau_latent"):
        svi.init(jax.random.key(0))


@pytest.mark.slow
def test_a_second_plate_with_an_amortized_guide_of_its_own():
    """As a list does it by hand, `global_guide` does for rows and columns of a table."""
    table = jnp.sin(jnp.arange(12.0).reshape(4, 3))

    def crossed(x):
        people = numpyro.plate("people", x.shape[0], dim=-2)
        items = numpyro.plate("items", x.shape[1], dim=-1)
        with people:
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with items:
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with people, items:
            numpyro.sample("x", dist.Normal(a + b, 0.5), obs=x)

    second = partial(AutoAmortizedNormal, encoder=SMALL, plate="items", prefix="items")
    guide = AutoAmortizedNormal(crossed, SMALL, plate="people", global_guide=second)
    params = start(crossed, guide, table)
    assert set(params) == {"auto$params", "items$params"}
    draws = guide.sample_posterior(KEY, params, table, sample_shape=(2,))
    assert draws["a"].shape == (2, 4, 1)
    assert draws["b"].shape == (2, 3)
