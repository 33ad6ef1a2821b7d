"""Programs with guides written by hand, as NumPyro's examples have them: their bounds are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from jax.example_libraries import stax
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import Importance, Posterior

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
QUIET = {"progress_bar": False}


def assert_same_bound(posterior, svi, result, *data, num_data):
    """The mean ELBO by row is NumPyro's loss, within five Monte Carlo errors."""
    report = posterior.check(KEY, data if len(data) > 1 else data[0], Importance(500), **QUIET)
    mine = report.dataset["elbo"].values.sum()
    many = SVI(svi.model, svi.guide, svi.optim, Trace_ELBO(num_particles=500))
    many.init(KEY, *data)
    loss = float(many.evaluate(result.state, *data))
    error = 1.5 * np.sqrt(
        (report.dataset["elbo_mcse"].values ** 2).sum()
    )  # of both, 500 draws each
    np.testing.assert_allclose(mine, -loss, atol=5 * error)
    assert len(report.dataset["elbo"]) == num_data


@pytest.mark.slow
def test_an_autoencoder_of_binary_images():
    """As in NumPyro's ``vae.py``: stax networks, the image's plate, deviations by ``exp``."""
    images = (RNG.uniform(size=(60, 6)) < np.linspace(0.1, 0.9, 60)[:, None]).astype(np.float32)
    encoder = stax.serial(
        stax.Dense(8),
        stax.Softplus,
        stax.FanOut(2),
        stax.parallel(stax.Dense(2), stax.serial(stax.Dense(2), stax.Exp)),
    )
    decoder = stax.serial(stax.Dense(8), stax.Softplus, stax.Dense(6))

    def model(images):
        decode = numpyro.module("decoder", decoder, (len(images), 2))
        with numpyro.plate("batch", len(images)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            logits = decode(z)
            numpyro.sample("images", dist.Bernoulli(logits=logits).to_event(1), obs=images)

    def guide(images):
        encode = numpyro.module("encoder", encoder, (len(images), 6))
        loc, scale = encode(images)
        with numpyro.plate("batch", len(images)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    result = svi.run(KEY, 500, images, progress_bar=False)
    posterior = Posterior(guide, result, model=model)
    assert_same_bound(posterior, svi, result, images, num_data=60)
    assert set(posterior.encode(images[:3])) == {"z"}
    report = posterior.check(KEY, images, **QUIET)
    repair = posterior.repair(KEY, images, report)
    tree = repair.add_to(report.add_to(posterior.to_datatree(KEY, images)))
    assert {"checks", "repair", "posterior_predictive"} <= set(tree.children)
    assert not repair.remaining.size


class Concentrations(nn.Module):
    """Of a document's topics."""

    @nn.compact
    def __call__(self, counts):
        hidden = nn.softplus(nn.Dense(8)(jnp.log1p(counts)))
        normed = nn.BatchNorm(use_running_average=True)(nn.Dense(3)(hidden))
        return nn.softplus(normed) + 0.1


def topics(counts, size=None):
    words = numpyro.param("words", jnp.zeros((3, 7)))
    with numpyro.plate("documents", len(counts), subsample_size=size):
        batch = numpyro.subsample(counts, event_dim=1)
        theta = numpyro.sample("theta", dist.Dirichlet(jnp.full(3, 0.5)))
        logits = jnp.log(theta @ jax.nn.softmax(words) + 1e-9)
        total = jnp.full(batch.shape[:1], 20)
        fn = dist.Multinomial(total, logits=logits, total_count_max=20)
        numpyro.sample("counts", fn, obs=batch)


def topics_guide(counts, size=None):
    encode = flax_module("encoder", Concentrations(), mutable=["batch_stats"], input_shape=(1, 7))
    with numpyro.plate("documents", len(counts), subsample_size=size):
        batch = numpyro.subsample(counts, event_dim=1)
        numpyro.sample("theta", dist.Dirichlet(encode(batch)))


@pytest.mark.slow
def test_topics_of_documents():
    """As in NumPyro's ``prodlda.py``: a Dirichlet guide, flax with state, rows selected inside."""
    theta = RNG.dirichlet(np.full(3, 0.5), size=40)
    words = RNG.dirichlet(np.full(7, 0.3), size=3)
    counts = np.stack([RNG.multinomial(20, p) for p in theta @ words]).astype(np.float32)
    counts = jnp.asarray(counts)
    svi = SVI(topics, topics_guide, optax.adam(2e-2), Trace_ELBO())
    result = svi.run(KEY, 200, counts, 20, progress_bar=False)
    posterior = Posterior(topics_guide, result, model=topics)
    report = posterior.check(KEY, counts, Importance(500), **QUIET)
    loss = Trace_ELBO().loss
    keys = jax.random.split(KEY, 200)
    losses = jax.vmap(lambda key: loss(key, posterior.params, topics, topics_guide, counts))(keys)
    expected, spread = -losses.mean(), losses.std() / 200**0.5
    error = np.sqrt((report.dataset["elbo_mcse"].values ** 2).sum())
    np.testing.assert_allclose(report.dataset["elbo"].sum(), expected, atol=5 * (error + spread))
    repair = posterior.repair(KEY, counts, report.flagged[:2], num_samples=200)
    simplex = repair.groups["posterior"]["theta"]
    np.testing.assert_allclose(simplex.sum(-1), 1, atol=1e-4)


@pytest.mark.slow
def test_pupils_and_questions():
    """Item response: abilities by a network, difficulties by a guide of the global sites."""
    ability, difficulty = RNG.normal(size=50), np.array([-1.0, 0.0, 1.0, 0.5])
    right = RNG.uniform(size=(50, 4)) < 1 / (1 + np.exp(difficulty - ability[:, None]))
    right = right.astype(np.float32)

    def model(right):
        with numpyro.plate("items", 4):
            difficulty = numpyro.sample("difficulty", dist.Normal(0.0, 2.0))
        with numpyro.plate("pupils", len(right)):
            ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
            logits = ability[:, None] - difficulty
            numpyro.sample("right", dist.Bernoulli(logits=logits).to_event(1), obs=right)

    def guide(right):
        slope = numpyro.param("slope", jnp.ones(4))
        scale = numpyro.param("scale", 0.8, constraint=dist.constraints.positive)
        loc = numpyro.param("loc", jnp.zeros(4))
        sd = numpyro.param("sd", jnp.full(4, 0.3), constraint=dist.constraints.positive)
        with numpyro.plate("items", 4):
            numpyro.sample("difficulty", dist.Normal(loc, sd))
        with numpyro.plate("pupils", len(right)):
            numpyro.sample("ability", dist.Normal((right - 0.5) @ slope, scale))

    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO(4))
    result = svi.run(KEY, 1500, right, progress_bar=False)
    posterior = Posterior(guide, result, model=model, plate="pupils")
    report = posterior.check(KEY, right, "globals", **QUIET)
    assert report.dataset["globals_khat"].notnull()
    tree = posterior.to_datatree(KEY, right, 100)
    assert tree.posterior["difficulty"].dims == ("chain", "draw", "items")
    with pytest.raises(ValueError, match="Several plates"):
        Posterior(guide, result, model=model).sample(KEY, right, 2)
