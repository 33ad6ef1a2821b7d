"""A linear Gaussian model with a guide written by hand, and its log weights without NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints

X = jnp.array([-1.5, -0.2, 0.4, 2.0])
NOISE = 0.7
PARAMS = {"loading": jnp.array(1.3), "slope": jnp.array(0.5), "scale": jnp.array(0.8)}
KEY = jax.random.key(7)


def model(x):
    loading = numpyro.param("loading", 1.0)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(loading * z, NOISE), obs=x)


def guide(x):
    slope = numpyro.param("slope", 0.1)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, scale))


def global_model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def global_guide(x):
    slope = numpyro.param("slope", 0.1)
    loc = numpyro.param("loc", 0.3)
    numpyro.sample("mu", dist.Normal(loc, 0.5))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, 0.6))


def normal(value, loc, scale):
    """The log density of a Normal."""
    return -0.5 * ((value - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * np.log(2 * np.pi)


def log_joint(params, z):
    return normal(z, 0.0, 1.0) + normal(X, params["loading"] * z, NOISE)


def log_guide(params, z):
    return normal(z, params["slope"] * X, params["scale"])


def draws(key, num_particles):
    """The standardized draws of a step's particles, ``(num_particles, batch)``."""

    def noise(key):
        _, guide_key = jax.random.split(key)
        seeded = handlers.substitute(handlers.seed(guide, guide_key), PARAMS)
        z = handlers.trace(seeded).get_trace(X)["z"]["value"]
        return (z - PARAMS["slope"] * X) / PARAMS["scale"]

    _, particle_key = jax.random.split(key)
    return jax.vmap(noise)(jax.random.split(particle_key, num_particles))


def latents(params, noise):
    return params["slope"] * X + params["scale"] * noise
