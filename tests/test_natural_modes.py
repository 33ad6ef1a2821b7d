"""Steps of rows leave a guide that knows several modes of a posterior as it is."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from helpers import SMALL
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedFlow, Posterior

KEY, NOISE = jax.random.key, 0.3
X = np.array([1.0, 2.0, 3.0], np.float32)


def square(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z**2, NOISE), obs=x)


def test_a_row_of_a_flow_keeps_all_modes():
    """A Normal at one of them has the larger ELBO, and weights that do not show the other."""
    guide, at = AutoAmortizedFlow(square, SMALL), np.linspace(-6, 6, 10_001)[:, None]
    svi = SVI(square, guide, optax.adam(1e-3), Trace_ELBO())
    posterior = Posterior(guide, svi.get_params(svi.init(KEY(0), X)), natural_steps=8)
    joint = dist.Normal(0.0, 1.0).log_prob(at) + dist.Normal(at**2, NOISE).log_prob(X)
    exact = jax.nn.logsumexp(joint, axis=0) + np.log(at[1] - at[0])
    found = posterior.log_evidence(KEY(0), X, 1, num_particles=4000)[0]
    np.testing.assert_allclose(found, exact, atol=0.2)
