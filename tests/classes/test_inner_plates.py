"""Discrete latents in plates within a row, which are summed over element by element.

The referee is the sum over all joint combinations of NumPyro's own log densities.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.special import logsumexp
from numpyro import handlers
from numpyro.infer import SVI, TraceEnum_ELBO
from numpyro.infer.util import log_density

from numpyro_vae import AutoAmortizedNormal, Posterior

KEY = jax.random.key(0)
ENUMERATE = {"enumerate": "parallel"}
ROWS, PARTS, WORDS = 3, 2, 2
LOCS = jnp.array([-1.0, 0.5, 2.0])
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, WORDS)).astype(np.float32)
Y = RNG.normal(size=(ROWS, PARTS, WORDS)).astype(np.float32)


def choose(name, logits):
    return numpyro.sample(name, dist.Categorical(logits=logits), infer=ENUMERATE)


def words(x, z=None):
    """One site of each element."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", z[..., None] * LOCS)
            numpyro.sample("x", dist.Normal(LOCS[w], 1.0), obs=x)


def of_rows_too(x, z=None):
    """A site of the row, which those of its elements depend on, and a latent of each element."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        d = choose("d", jnp.array([0.3, 0.0]))
        numpyro.sample("seen", dist.Normal(d + z, 1.0), obs=x[:, :1])
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", jnp.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]])[d])
            u = numpyro.sample("u", dist.Normal(LOCS[w] * z, 1.0), obs=None if z is None else 2 * x)
            numpyro.sample("x", dist.Normal(u + d, 0.5), obs=x)


def several(x, z=None):
    """Two sites of an element that depend on each other, with supports of 3 and 2 values."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", jnp.array([0.0, 0.5, 1.0]))
            logits = jnp.array([0.3, -0.4, 1.0])[w] + z
            b = numpyro.sample("b", dist.Bernoulli(logits=logits), infer=ENUMERATE)
            numpyro.sample("x", dist.Normal(LOCS[w] - b, 1.0), obs=x)


def nested(y, z=None):
    """Sites of a row, of its parts and of their words."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        d = choose("d", jnp.array([0.3, 0.0]))
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([[0.0, 1.0], [1.0, 0.0]])[d])
            with numpyro.plate("word", WORDS, dim=-1):
                w = choose("w", jnp.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]])[a])
                numpyro.sample("y", dist.Normal(LOCS[w] + d + z, 1.0), obs=y)


def side_by_side(y, z=None):
    """Sites in two plates of a row, and another one in both of them."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        d = choose("d", jnp.array([0.3, 0.0]))
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([[0.0, 1.0], [1.0, 0.0]])[d])
            numpyro.sample("of part", dist.Normal(a + z, 1.0), obs=y[:, :, :1])
        with numpyro.plate("word", WORDS, dim=-1):
            b = choose("b", jnp.array([[0.0, 0.3, 1.0], [1.0, 0.0, 0.5]])[d])
            numpyro.sample("of word", dist.Normal(LOCS[b] + d, 1.0), obs=y[:, :1])
            with numpyro.plate("part", PARTS, dim=-2):
                numpyro.sample("y", dist.Normal(LOCS[b], 1.0), obs=y)


def crossed(y, z=None):
    """Elements of two plates that come together in a site: all combinations count."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([0.0, 1.0]))
        with numpyro.plate("word", WORDS, dim=-1):
            b = choose("b", jnp.array([0.0, 0.3, 1.0]))
            with numpyro.plate("part", PARTS, dim=-2):
                numpyro.sample("y", dist.Normal(LOCS[b] * a + z, 1.0), obs=y)


def counted(x, z=None):
    """A site outside the plate reads the values of all of its elements."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", z[..., None] * LOCS)
            numpyro.sample("x", dist.Normal(LOCS[w], 1.0), obs=x)
        numpyro.sample("total", dist.Normal(w.sum(-1, keepdims=True), 1.0), obs=x[:, :1])


MODELS = {
    words: X,
    of_rows_too: X,
    several: X,
    nested: Y,
    side_by_side: Y,
    crossed: Y,
    counted: X,
}


def untrained(model, data, **options):
    guide = AutoAmortizedNormal(model, plate="row", **options)
    svi = SVI(model, guide, optax.adam(1e-2), TraceEnum_ELBO())
    return Posterior(guide, svi.get_params(svi.init(KEY, *data)))


def all_combinations(trace):
    """Return every combination of values of the enumerated sites of a row, by site."""
    sites = [site for site in trace.values() if site["type"] == "sample"]
    sites = [site for site in sites if site["infer"].get("enumerate")]
    supports = [np.asarray(site["fn"].enumerate_support(expand=False)).ravel() for site in sites]
    sizes = [site["value"].size for site in sites]
    entries = [s for support, size in zip(supports, sizes, strict=True) for s in [support] * size]
    parts = np.split(np.array(list(itertools.product(*entries))), np.cumsum(sizes)[:-1], axis=1)
    return {
        site["name"]: part.reshape(len(part), *site["value"].shape)
        for site, part in zip(sites, parts, strict=True)
    }


def joint_densities(model, data):
    """Return the log densities of rows with all joint combinations, and these by site."""
    rows = [tuple(x[row : row + 1] for x in data) for row in range(len(data[0]))]
    combinations = all_combinations(handlers.trace(handlers.seed(model, KEY)).get_trace(*rows[0]))

    @jax.jit
    def of_row(row):
        return jax.vmap(lambda values: log_density(model, row, {}, values)[0])(combinations)

    return np.stack([of_row(row) for row in rows]), combinations


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_they_are_as_if_all_joint_combinations_were_summed_over(model):
    data = (MODELS[model], Z.reshape(-1, *[1] * (MODELS[model].ndim - 1)))
    joint, combinations = joint_densities(model, data)
    posterior = untrained(model, data)
    found = posterior.log_evidence(KEY, data, 1, num_particles=1)[0]
    np.testing.assert_allclose(found, logsumexp(joint, axis=1), rtol=1e-5)

    weights = np.exp(joint - logsumexp(joint, axis=1)[:, None])
    found = posterior.probabilities(KEY, data, 1, num_particles=1)
    assert {name: value.shape[-1] for name, value in found.items()} == SUPPORTS[model]
    for name, values in combinations.items():
        chosen = values.squeeze(1)[..., None] == np.arange(found[name].shape[-1])
        expected = np.tensordot(weights, chosen, axes=(1, 0))
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
