"""What the conformance tests share: data, a small encoder, the guides, and short runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)

X = jnp.linspace(-2, 2, 12)
SMALL = partial(MLP, hidden_sizes=(4,))
GUIDES = [
    AutoAmortizedNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedFlow,
    AutoAmortizedDelta,
]


def hierarchical(x):
    """A global mean, two latents of each datum that depend on it, and a deterministic site."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 2.0))
        w = numpyro.sample("w", dist.LogNormal(0.0, 1.0))
        mean = numpyro.deterministic("mean", z + w)
        numpyro.sample("x", dist.Normal(mean, 0.5), obs=x)


def run(model, guide, *args, loss=None, num_steps=3, init_state=None, **kwargs):
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO() if loss is None else loss)
    result = svi.run(
        jax.random.key(0), num_steps, *args, progress_bar=False, init_state=init_state, **kwargs
    )
    return svi, result


def start(model, guide, *args, **kwargs):
    """Initialize, and return the parameters; nothing is compiled."""
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), *args, **kwargs)
    assert jnp.isfinite(svi.evaluate(state, *args, **kwargs))
    return svi.get_params(state)
