"""The latents of a posterior whose family has no location in closed form."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedFlow, LogScale, Posterior, plot_latents


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(z, 0.2).to_event(1), obs=x)


def test_latents_of_a_flow_are_means_of_draws():
    x = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    guide = AutoAmortizedFlow(model, scale=LogScale(init_scale=0.1))
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    posterior = Posterior(guide, svi.get_params(svi.init(jax.random.key(0), x)))
    points = plot_latents(posterior, x, dims=(2, 0)).collections[0].get_offsets()
    draws = posterior.sample(jax.random.key(1), x, 400, var_names=["z"])["z"][..., [2, 0]]
    error = np.sqrt(draws.var(0) * (1 / 400 + 1 / 256))
    assert (abs(points - draws.mean(0)) < 5 * error).all()
    assert points.std(0).min() > 3 * error.mean()
