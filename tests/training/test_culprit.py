"""A step that is skipped is blamed on the site that failed in it, in the state that it had."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import fit

X = np.zeros(64, np.float32)


def moving_guide(x):
    """A guide whose parameter leaves the origin by 1 a step, under SGD."""
    loc = numpyro.param("loc", jnp.zeros(()))
    numpyro.factor("drift", -loc * 64.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, 1e-3))


def test_the_state_is_that_of_the_step():
    """The second site fails once the parameter is above 3, and not at the start of the chunk."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 10.0, validate_args=False))
            scale = jnp.where(z > 3.5, jnp.nan, 1.0)
            numpyro.sample("x", dist.Normal(0.0, scale, validate_args=False), obs=x)

    svi = SVI(model, moving_guide, optax.sgd(1.0), Trace_ELBO())
    with pytest.warns(UserWarning, match="at site 'x' of the model"):
        fit(svi, jax.random.key(0), X, batch_size=8, num_epochs=1, progress_bar=False)


def test_every_particle_is_looked_at():
    """One draw in some hundred fails, seldom that of the first particle."""

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(())), 1.0))

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            scale = jnp.where(z > 2.6, jnp.nan, 1.0)
            numpyro.sample("x", dist.Normal(0.0, scale, validate_args=False), obs=x)

    svi = SVI(model, guide, optax.sgd(1e-6), Trace_ELBO(num_particles=8))
    with pytest.warns(UserWarning, match="at site 'x' of the model"):
        fit(svi, jax.random.key(0), X, batch_size=8, num_epochs=20, progress_bar=False)
