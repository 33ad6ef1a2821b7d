"""Item response: abilities read off the answers, items global, against NUTS."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from helpers import train
from numpyro.infer import MCMC, NUTS, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_vae import MLP, AutoAmortizedNormal

NUM_PEOPLE, NUM_ITEMS, NUM_STEPS = 150, 6, 1000
ITEMS = ("intercept", "discrimination")


def model(correct):
    """Two parameters an item: the more it discriminates, the more depends on ability."""
    items = correct.shape[1]
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0).expand([items]).to_event(1))
    slope = numpyro.sample("discrimination", dist.LogNormal(0.0, 0.5).expand([items]).to_event(1))
    with numpyro.plate("people", len(correct)):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        logits = intercept + slope * ability[:, None]
        numpyro.sample("correct", dist.BernoulliLogits(logits).to_event(1), obs=correct)


def simulate():
    rng = np.random.default_rng(0)
    intercept, slope = rng.normal(size=NUM_ITEMS), np.exp(0.4 * rng.normal(size=NUM_ITEMS))
    logits = intercept + slope * rng.normal(size=(NUM_PEOPLE, 1))
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)


CORRECT = simulate()


def moments(draws):
    draws = draws | {"discrimination": np.log(draws["discrimination"])}
    return {name: (draws[name].mean(0), draws[name].std(0)) for name in ("ability", *ITEMS)}


@pytest.fixture(scope="module")
def truth():
    mcmc = MCMC(
        NUTS(model),
        num_warmup=300,
        num_samples=500,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), CORRECT)
    return moments({name: np.asarray(x) for name, x in mcmc.get_samples().items()})


def trained(particles, **options):
    encoder = partial(MLP, hidden_sizes=(64,), activation=nnx.tanh)
    guide = AutoAmortizedNormal(model, encoder, **options)
    return train(guide, CORRECT, steps=NUM_STEPS, loss=Trace_ELBO, particles=particles)


@pytest.fixture(scope="module")
def plain():
    return trained(1)


def errors(posterior, truth, name):
    """How far the means are from those of NUTS in its posterior sds, and the ratios of the sds."""
    mean, sd = moments(posterior.sample(jax.random.key(1), CORRECT, 2000))[name]
    loc, scale = truth[name]
    return (mean - loc) / scale, sd / scale


@pytest.mark.slow
def test_abilities_are_those_of_nuts(plain, truth):
    error, ratio = errors(plain, truth, "ability")
    # Of which 0.03 to 0.05 is Monte Carlo error, of 1,000 draws of NUTS that are not independent.
    assert np.abs(error).mean() <= 0.1
    assert np.abs(error).max() <= 0.4
    assert abs(ratio.mean() - 1) <= 0.05


def test_items_have_the_means_of_nuts_and_less_spread(plain, truth):
    for name in ITEMS:
        error, ratio = errors(plain, truth, name)
        assert np.abs(error).max() <= 0.3
        # A guide in which items are independent of abilities and of each other is too sure.
        assert 0.5 < ratio.mean() < 0.9


@pytest.mark.slow
def test_more_of_the_dependence_gives_more_of_the_spread(plain, truth):
    """Abilities given the items, and items that vary together: what particles do not mend."""
    together = {"condition_on": ITEMS, "global_guide": AutoMultivariateNormal}
    joint = trained(4, **together)
    particles = trained(8)
    for name in ITEMS:
        ratios = [errors(found, truth, name)[1].mean() for found in (plain, particles, joint)]
        assert abs(ratios[1] - ratios[0]) < 0.05
        assert ratios[1] + 0.01 < ratios[2] < 1.05
        assert np.abs(errors(joint, truth, name)[0]).max() <= 0.3
    assert np.abs(errors(joint, truth, "ability")[0]).mean() <= 0.1


@pytest.mark.slow
def test_repaired_items_have_the_spread_of_nuts(plain, truth):
    options = {"method": "importance", "num_samples": 2000}
    repaired = plain.repair_globals(jax.random.key(3), CORRECT, **options)
    assert repaired.passed
    found = {name: np.log(x) if name in ITEMS[1:] else x for name, x in repaired.draws.items()}
    for name in ITEMS:
        loc, scale = truth[name]
        assert np.abs((found[name].mean(0) - loc) / scale).max() <= 0.2
        np.testing.assert_allclose(found[name].std(0), scale, rtol=0.2)
        assert (found[name].std(0) / scale).mean() == pytest.approx(1.0, abs=0.05)
    tree = repaired.to_datatree(jax.random.key(4), CORRECT, groups=["posterior"])
    ability, (loc, scale) = tree["posterior"]["ability"].values[0], truth["ability"]
    assert np.abs((ability.mean(0) - loc) / scale).mean() <= 0.1
    np.testing.assert_allclose((ability.std(0) / scale).mean(), 1.0, atol=0.05)


@pytest.mark.slow
def test_new_people_need_no_training(plain):
    answers = jnp.array([[0.0] * NUM_ITEMS, [1.0] * NUM_ITEMS])
    low, high = plain.encode(answers)["ability"].loc
    assert low < -0.8 < 0.8 < high
    found = plain.check(jax.random.key(2), CORRECT, checks=("importance", "collapse"))
    assert (found.verdict == 0).mean() > 0.95
