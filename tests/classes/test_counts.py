"""Counts with an offset that is observed: negative binomial, zero-inflated, multinomial."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import MLP, AutoAmortizedMultivariateNormal, Importance, Posterior, fit

NUM_CELLS, NUM_GENES, SIZE = 400, 12, 2
RNG = np.random.default_rng(0)
LOADINGS = 0.5 * RNG.normal(size=(SIZE, NUM_GENES))
LEVEL = RNG.normal(size=NUM_GENES) - 3.5
CONCENTRATION = np.exp(RNG.normal(0.7, 0.5, NUM_GENES))
DROPPED = 0.2


def model(kind, counts, library):
    if kind != "multinomial":
        prior = dist.LogNormal(1.0, 1.0).expand([NUM_GENES]).to_event(1)
        concentration = numpyro.sample("concentration", prior)
    gate = numpyro.sample("gate", dist.Beta(1.0, 1.0)) if kind == "zero-inflated" else 0.0
    with numpyro.plate("cell", len(counts)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([SIZE]).to_event(1))
        log_rate = z @ LOADINGS + LEVEL
        if kind == "multinomial":
            fn = dist.Multinomial(library.astype(int), logits=log_rate, total_count_max=2000)
        else:
            fn = dist.NegativeBinomial2(library[:, None] * jnp.exp(log_rate), concentration)
            if kind == "zero-inflated":
                fn = dist.ZeroInflatedDistribution(fn, gate=gate)
            fn = fn.to_event(1)
        numpyro.sample("counts", fn, obs=counts)


def simulate(kind):
    """Latents, counts, and the size of each cell's library, as the model says."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(NUM_CELLS, SIZE))
    library = np.exp(rng.normal(5.5, 0.5, NUM_CELLS)).astype(np.float32).round()
    rate = np.exp(z @ LOADINGS + LEVEL)
    if kind == "multinomial":
        shares = rate / rate.sum(1, keepdims=True)
        counts = rng.multinomial(library.astype(int), shares)
    else:
        gamma = rng.gamma(CONCENTRATION, library[:, None] * rate / CONCENTRATION)
        counts = rng.poisson(gamma)
        if kind == "zero-inflated":
            counts[rng.random(counts.shape) < DROPPED] = 0
    return z, (counts.astype(np.float32), library)


def on_log_scale(counts, library):
    return {"counts": jnp.log1p(counts), "library": jnp.log(library)}


@pytest.fixture(scope="module", params=["negative binomial", "zero-inflated", "multinomial"])
def trained(request):
    kind = request.param
    z, data = simulate(kind)
    encoder = partial(MLP, hidden_sizes=(64, 64), standardize=True)
    guide = AutoAmortizedMultivariateNormal(partial(model, kind), encoder, inputs=on_log_scale)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 1000))
    svi = SVI(guide.model, guide, optimizer, Trace_ELBO())
    result = fit(svi, jax.random.key(0), data, batch_size=100, num_epochs=250, progress_bar=False)
    posterior = Posterior(guide, result)
    draws = posterior.sample(jax.random.key(1), data, 1000)
    return kind, z, data, posterior, draws


@pytest.mark.slow
def test_intervals_hold_what_they_say(trained):
    _, z, _, _, draws = trained
    low, high = np.quantile(draws["z"], [0.05, 0.95], axis=0)
    inside = (low < z) & (z < high)
    error = np.sqrt(0.9 * 0.1 / inside.size)
    assert abs(inside.mean() - 0.9) <= 3 * error
    assert draws["z"].std(0).mean() < 0.6  # and they say something
    assert np.corrcoef(draws["z"].mean(0).ravel(), z.ravel())[0, 1] > 0.75


def test_what_is_global_is_recovered(trained):
    kind, _, _, _, draws = trained
    if kind == "multinomial":
        assert set(draws) == {"z"}
        return
    found = np.log(draws["concentration"])
    # The guide is too sure of itself; a gene's concentration is known to a tenth or two at best.
    assert np.abs(found.mean(0) - np.log(CONCENTRATION)).mean() <= 0.15
    assert found.std(0).mean() <= 0.2
    if kind == "zero-inflated":
        assert abs(draws["gate"].mean() - DROPPED) <= 0.03


@pytest.mark.slow
def test_predictions_have_the_moments_of_the_data(trained):
    kind, _, (counts, library), posterior, _ = trained
    predicted = posterior.predict(jax.random.key(2), (counts, library), 20)["counts"]
    assert predicted.shape == (20, *counts.shape)
    if kind == "multinomial":
        assert (predicted.sum(-1) == library).all()
    share = (counts / library[:, None]).mean(0)
    assert np.abs((predicted / library[:, None]).mean((0, 1)) / share - 1).max() <= 0.15
    zeros = (counts == 0).mean(0)
    error = np.sqrt((zeros * (1 - zeros) + 0.01) / NUM_CELLS)
    assert (np.abs((predicted == 0).mean((0, 1)) - zeros) / error).max() <= 4


@pytest.mark.slow
def test_extreme_counts_are_finite(trained):
    kind, _, (counts, _), posterior, _ = trained
    far = np.array([np.zeros(NUM_GENES), np.full(NUM_GENES, 1e5), counts[0]], np.float32)
    far[1, 0] = 0.0
    library = far.sum(1) if kind == "multinomial" else np.array([1e2, 1e2, 1e7], np.float32)
    library = np.maximum(library, 1e-3)  # an empty cell, whose logarithm the encoder reads
    found = posterior.check(
        jax.random.key(3), (far, library), checks=(Importance(num_samples=100), "collapse")
    ).dataset
    assert np.isfinite(found["elbo"]).all()
    assert np.isfinite(found["log_evidence"]).all()

    def loss(params):
        svi = SVI(posterior.guide.model, posterior.guide, optax.sgd(0.0), Trace_ELBO())
        return svi.loss.loss(jax.random.key(4), params, svi.model, svi.guide, far, library)

    params = {k: v for k, v in posterior.params.items() if not k.endswith("$state")}
    rest = {k: v for k, v in posterior.params.items() if k.endswith("$state")}
    gradient = jax.jit(jax.grad(lambda params: loss(params | rest)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
