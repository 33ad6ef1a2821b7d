"""Annotators who err, each in a way of their own: the model of Dawid and Skene, against NUTS."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import MCMC, NUTS, SVI, TraceEnum_ELBO, init_to_median
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_vae import AutoAmortizedNormal, Posterior, fit

NUM_ITEMS, NUM_RATERS, NUM_CLASSES = 80, 5, 3
PRIOR = np.where(np.eye(NUM_CLASSES) == 1, 6.0, 1.5)  # of what a rater says of each class


def model(ratings):
    """Ratings ``(items, raters)``, -1 where a rater has not seen the item."""
    prevalence = numpyro.sample("prevalence", dist.Dirichlet(jnp.full(NUM_CLASSES, 3.0)))
    prior = jnp.broadcast_to(jnp.array(PRIOR), (NUM_RATERS, NUM_CLASSES, NUM_CLASSES))
    skill = numpyro.sample("skill", dist.Dirichlet(prior).to_event(2))
    with numpyro.plate("item", len(ratings)):
        infer = {"enumerate": "parallel"}
        truth = numpyro.sample("truth", dist.Categorical(prevalence), infer=infer)
        said = dist.Categorical(jnp.moveaxis(skill, 1, 0)[truth]).mask(ratings >= 0).to_event(1)
        numpyro.sample("ratings", said, obs=jnp.maximum(ratings, 0))


def simulate():
    rng = np.random.default_rng(0)
    truth = rng.choice(NUM_CLASSES, NUM_ITEMS, p=[0.5, 0.3, 0.2])
    skill = np.stack([rng.dirichlet(row, NUM_RATERS) for row in 2 * PRIOR], axis=1)
    ratings = np.array(
        [[rng.choice(NUM_CLASSES, p=skill[rater, k]) for rater in range(NUM_RATERS)] for k in truth]
    )
    return truth, np.where(rng.random(ratings.shape) < 0.2, -1, ratings)


TRUTH, RATINGS = simulate()


def given(prevalence, skill):
    """The exact probabilities of the classes given each draw of the globals, averaged."""
    seen = RATINGS[..., None] == np.arange(NUM_CLASSES)  # items, raters, what was said
    log_p = np.einsum("irs,drks->dik", seen, np.log(skill)) + np.log(prevalence)[:, None]
    p = np.exp(log_p - log_p.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).mean(0)


@pytest.fixture(scope="module")
def nuts():
    mcmc = MCMC(
        NUTS(model, init_strategy=init_to_median),
        num_warmup=300,
        num_samples=700,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), RATINGS)
    return {name: np.asarray(draws) for name, draws in mcmc.get_samples().items()}


@pytest.fixture(scope="module")
def posterior():
    start = partial(AutoMultivariateNormal, init_loc_fn=init_to_median)
    guide = AutoAmortizedNormal(model, global_guide=start)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 1500))
    svi = SVI(model, guide, optimizer, TraceEnum_ELBO(num_particles=4))
    return Posterior(guide, svi.run(jax.random.key(0), 1500, RATINGS, progress_bar=False))


@pytest.mark.slow
def test_probabilities_are_exact_given_what_is_global(posterior):
    draws = posterior.sample(jax.random.key(1), RATINGS, 400, var_names=["prevalence", "skill"])
    found = posterior.probabilities(jax.random.key(1), RATINGS, 400)["truth"]
    np.testing.assert_allclose(found, given(**draws), atol=1e-5)


@pytest.mark.slow
def test_probabilities_are_those_of_nuts(posterior, nuts):
    found = posterior.probabilities(jax.random.key(1), RATINGS, 1000)["truth"]
    expected = given(**nuts)
    distance = np.abs(found - expected).sum(-1) / 2  # in total variation
    assert distance.mean() <= 0.015
    assert distance.max() <= 0.08
    sure = expected.max(-1) > 0.6
    assert (found.argmax(-1) == expected.argmax(-1))[sure].all()


def test_classes_are_found_and_the_probabilities_are_calibrated(posterior):
    found = posterior.probabilities(jax.random.key(1), RATINGS, 500)["truth"]
    right = found.argmax(-1) == TRUTH
    majority = (RATINGS[..., None] == np.arange(NUM_CLASSES)).sum(1).argmax(-1) == TRUTH
    assert right.mean() >= majority.mean()
    confidence = found.max(-1)
    error = np.sqrt((confidence * (1 - confidence)).sum()) / NUM_ITEMS
    assert abs(right.mean() - confidence.mean()) <= 3 * error


def test_skills_are_those_of_nuts(posterior, nuts):
    draws = posterior.sample(jax.random.key(2), RATINGS, 2000)
    for name in ("prevalence", "skill"):
        error = (draws[name].mean(0) - nuts[name].mean(0)) / nuts[name].std(0)
        assert np.abs(error).mean() <= 0.1
        assert np.abs(error).max() <= 0.35
        assert abs((draws[name].std(0) / nuts[name].std(0)).mean() - 1) <= 0.1
    frequency = (draws["truth"][..., None] == np.arange(NUM_CLASSES)).mean(0)
    assert np.abs(frequency - given(**nuts)).mean() <= 0.015


@pytest.mark.slow
def test_minibatches_learn_the_same(posterior):
    start = partial(AutoMultivariateNormal, init_loc_fn=init_to_median)
    guide = AutoAmortizedNormal(model, global_guide=start)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 1200))
    svi = SVI(model, guide, optimizer, TraceEnum_ELBO(num_particles=4))
    result = fit(svi, jax.random.key(1), RATINGS, batch_size=40, num_epochs=600, progress_bar=False)
    found = Posterior(guide, result).probabilities(jax.random.key(1), RATINGS, 500)["truth"]
    expected = posterior.probabilities(jax.random.key(1), RATINGS, 500)["truth"]
    assert np.abs(found - expected).sum(-1).mean() / 2 <= 0.02
