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


def words(x):
    """One site of each element."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", z[..., None] * LOCS)
            numpyro.sample("x", dist.Normal(LOCS[w], 1.0), obs=x)


def of_rows_too(x):
    """A site of the row, which those of its elements depend on, and a latent of each element."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        d = choose("d", jnp.array([0.3, 0.0]))
        numpyro.sample("seen", dist.Normal(d + z, 1.0), obs=x[:, :1])
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", jnp.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]])[d])
            u = numpyro.sample("u", dist.Normal(LOCS[w] * z, 1.0))
            numpyro.sample("x", dist.Normal(u + d, 0.5), obs=x)


def several(x):
    """Two sites of an element that depend on each other, with supports of 3 and 2 values."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", jnp.array([0.0, 0.5, 1.0]))
            logits = jnp.array([0.3, -0.4, 1.0])[w] + z
            b = numpyro.sample("b", dist.Bernoulli(logits=logits), infer=ENUMERATE)
            numpyro.sample("x", dist.Normal(LOCS[w] - b, 1.0), obs=x)


def nested(y):
    """Sites of a row, of its parts and of their words."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        d = choose("d", jnp.array([0.3, 0.0]))
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([[0.0, 1.0], [1.0, 0.0]])[d])
            with numpyro.plate("word", WORDS, dim=-1):
                w = choose("w", jnp.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]])[a])
                numpyro.sample("y", dist.Normal(LOCS[w] + d + z, 1.0), obs=y)


def side_by_side(y):
    """Sites in two plates of a row, and another one in both of them."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        d = choose("d", jnp.array([0.3, 0.0]))
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([[0.0, 1.0], [1.0, 0.0]])[d])
            numpyro.sample("of part", dist.Normal(a + z, 1.0), obs=y[:, :, :1])
        with numpyro.plate("word", WORDS, dim=-1):
            b = choose("b", jnp.array([[0.0, 0.3, 1.0], [1.0, 0.0, 0.5]])[d])
            numpyro.sample("of word", dist.Normal(LOCS[b] + d, 1.0), obs=y[:, :1])
            with numpyro.plate("part", PARTS, dim=-2):
                numpyro.sample("y", dist.Normal(LOCS[b], 1.0), obs=y)


def crossed(y):
    """Elements of two plates that come together in a site: all combinations count."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([0.0, 1.0]))
        with numpyro.plate("word", WORDS, dim=-1):
            b = choose("b", jnp.array([0.0, 0.3, 1.0]))
            with numpyro.plate("part", PARTS, dim=-2):
                numpyro.sample("y", dist.Normal(LOCS[b] * a + z, 1.0), obs=y)


def counted(x):
    """A site outside the plate reads the values of all of its elements."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
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
    state = svi.init(KEY, data)
    return Posterior(guide, svi.get_params(state))


def all_combinations(trace):
    """Return every combination of values of the enumerated sites of a row, by site."""
    sites = [site for site in trace.values() if site["type"] == "sample"]
    sites = [site for site in sites if site["infer"].get("enumerate")]
    supports = [np.asarray(site["fn"].enumerate_support(expand=False)).ravel() for site in sites]
    sizes = [site["value"].size for site in sites]
    entries = [s for support, size in zip(supports, sizes, strict=True) for s in [support] * size]
    found = jnp.array(list(itertools.product(*entries)))
    parts = jnp.split(found, np.cumsum(sizes)[:-1], axis=1)
    return {
        site["name"]: part.reshape(len(part), *site["value"].shape)
        for site, part in zip(sites, parts, strict=True)
    }


def joint_densities(model, row, latents):
    """Return the log joint densities of a row with all combinations, and the combinations."""
    trace = handlers.trace(handlers.seed(model, KEY)).get_trace(row)
    combinations = all_combinations(trace)

    def one(discrete):
        return log_density(model, (row,), {}, {**latents, **discrete})[0]

    return jax.vmap(one)(combinations), combinations


def log_q(posterior, data, draws):
    total = 0.0
    for name, (loc, scale) in posterior.encode(data).items():
        density = dist.Normal(loc, scale).log_prob(np.moveaxis(draws[name], 1, 0).swapaxes(0, 1))
        total += density.reshape(*density.shape[:2], -1).sum(-1)
    return total


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_weights_are_the_sum_over_all_joint_combinations(model):
    data = MODELS[model]
    posterior = untrained(model, data)
    draws = posterior.sample(KEY, data, 4)
    found = posterior.log_weights(KEY, data, 4)
    print(found.shape, {k: v.shape for k, v in draws.items()})
    q = {k: v for k, v in posterior.encode(data).items()}
    print({k: v.loc.shape for k, v in q.items()})
    for row in range(ROWS):
        for draw in range(2):
            latents = {n: draws[n][draw][row : row + 1] for n in q}
            joint, _ = joint_densities(model, data[row : row + 1], latents)
            lq = sum(dist.Normal(q[n].loc[row], q[n].scale[row]).log_prob(latents[n][0]).sum() for n in q)
            np.testing.assert_allclose(found[draw, row], logsumexp(joint) - lq, rtol=1e-4, atol=1e-4)
