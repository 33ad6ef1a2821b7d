"""NumPyro's own log densities are the referee of the weights of any guide."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

from numpyro_vae import Posterior

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)
THERE = jnp.arange(12) % 3 > 0


def plain(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        s = numpyro.sample("s", dist.Gamma(3.0, 2.0))
        numpyro.sample("x", dist.Normal(z[:, None], s[:, None]).to_event(1), obs=x)


def plain_guide(x):
    mu = numpyro.sample("mu", dist.Normal(0.1, 0.4))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.5 * x.mean(-1) + 0.1 * mu, 0.6))
        numpyro.sample("s", dist.Gamma(4.0, 2.0 + jnp.abs(z)))


def with_columns(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    columns = numpyro.plate("columns", 3, dim=-1)
    with numpyro.plate("data", len(x), dim=-2):
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(4)))
        with columns:
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z + p[..., 0], 0.5), obs=x)


def with_columns_guide(x):
    numpyro.sample("mu", dist.Normal(0.0, 0.3))
    columns = numpyro.plate("columns", 3, dim=-1)
    with numpyro.plate("data", len(x), dim=-2):
        numpyro.sample("p", dist.Dirichlet(1.0 + jnp.abs(x[:, None, :1]) * jnp.ones(4)))
        with columns:
            numpyro.sample("z", dist.Normal(0.8 * x, 0.4))


def ragged(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.StudentT(4.0, mu, 1.0))
        with handlers.mask(mask=THERE[: len(x)]):
            numpyro.sample("x", dist.Normal(z[:, None], 0.7).to_event(1), obs=x)
        numpyro.factor("penalty", -0.1 * z**2)


def ragged_guide(x):
    numpyro.sample("mu", dist.Normal(0.0, 0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Laplace(0.8 * x.mean(-1), 0.5))


def scaled(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.LogNormal(mu, 1.0))
        with handlers.scale(scale=2.5):
            numpyro.sample("x", dist.Normal(z[:, None], 0.7).to_event(1), obs=x)


def scaled_guide(x):
    numpyro.sample("mu", dist.Normal(0.0, 0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.LogNormal(0.3 * x.mean(-1), 0.5))


CASES = {
    "plain": (plain, plain_guide),
    "columns": (with_columns, with_columns_guide),
    "masks and factors": (ragged, ragged_guide),
    "scales": (scaled, scaled_guide),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_are_differences_of_numpyros_log_densities(name):
    model, guide = CASES[name]
    posterior = Posterior(guide, {}, model=model, plate="data")
    draws = posterior.sample(KEY, X, 20)
    found = posterior.log_weights(KEY, X, 20).astype(float).sum(1)

    def expected(values):
        mu = values["mu"]
        of_model, _ = log_density(model, (X,), {}, values)
        of_guide, trace = log_density(guide, (X,), {}, values)
        globals_ = trace["mu"]["fn"].log_prob(mu) - dist.Normal(0.0, 1.0).log_prob(mu)
        return of_model - of_guide + globals_

    np.testing.assert_allclose(found, jax.vmap(expected)(draws), rtol=1e-4, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_tree_has_the_same_weights(name):
    model, guide = CASES[name]
    posterior = Posterior(guide, {}, model=model, plate="data")
    tree = posterior.to_datatree(KEY, X, 30)
    rows = tree.sample_stats["log_weights"].values[0]
    np.testing.assert_allclose(rows, posterior.log_weights(KEY, X, 30), rtol=1e-4, atol=1e-3)
    assert tree.log_likelihood["x"].dims == ("chain", "draw", "data")
