"""Models of which the locals integrate out in closed form, and posteriors of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density as numpyro_density

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    LogScale,
    Posterior,
)
from numpyro_vae.inference.marginal import log_density

LINEAR = partial(MLP, hidden_sizes=(8,), activation=lambda hidden: hidden, standardize=False)
KEY = jax.random.key(1)
NUM_DATA, NUM_DRAWS = 40, 20
X = np.random.default_rng(0).normal(0.7, 1.5, NUM_DATA).astype(np.float32)
GROUP = np.arange(NUM_DATA, dtype=np.int32) % 3


def untrained(model, *args, auto=AutoAmortizedNormal, batch_axes=0, **options):
    """The posterior of a guide as it starts, which is wrong and wide, so that particles matter."""
    if auto is not AutoAmortizedFlow:
        options["scale"] = LogScale(init_scale=3.0)
    guide = auto(model, LINEAR, **options)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(*args)
    kinds = ("param", "mutable")
    params = {name: site["value"] for name, site in trace.items() if site["type"] in kinds}
    return Posterior(guide, params, batch_axes=batch_axes)


def found_and_draws(posterior, data, particles=256):
    """The densities of draws of the globals, their error, and the draws."""
    runner = posterior._runner
    rows = runner.read(data)
    draws, _ = runner.weigh_globals(KEY, rows, NUM_DRAWS)
    return log_density(runner, rows, jax.random.key(2), draws, particles), draws


def without_locals(marginal, draws, *args):
    """NumPyro's log density of a model in which the locals are integrated out by hand."""

    def one(values):
        return numpyro_density(handlers.seed(marginal, 0), args, {}, values)[0]

    return np.asarray(jax.vmap(one)(draws), float)


def hierarchical(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_any_guide(auto, steps=1500):
    """A posterior of an automatic guide of the whole model."""
    svi = SVI(hierarchical, auto(hierarchical), optax.adam(1e-2), Trace_ELBO(num_particles=8))
    return Posterior(svi.guide, svi.run(KEY, steps, X, progress_bar=False))


# -- densities, by NumPyro's own of the model without its locals -----------------------------------


def normal(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, tau))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mu, jnp.sqrt(1 + tau**2)), obs=x)


def scaled(x, factor=0.25):
    """Everything by a factor: the posterior that the ELBO leads to is the same."""
    with handlers.scale(scale=factor):
        normal(x)


def likelihood_scaled(x):
    """N(x | z, 1)^(1/4) is N(x | z, 2) times a constant."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        with handlers.scale(scale=0.25):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def likelihood_scaled_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mu, jnp.sqrt(5.0)), obs=x)
        numpyro.factor("constant", jnp.log(2 * (2 * jnp.pi) ** 0.375) + jnp.zeros(len(x)))


def outside(x):
    """What lies outside the plate: a plate of its own, a factor, an observation, a subsample."""
    with numpyro.plate("group", 3, subsample_size=2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("sum", -((mu.sum() - 1.0) ** 2))
    numpyro.sample("seen", dist.Normal(mu.sum(), 0.5), obs=0.3)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu.sum(), 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def outside_alone(x):
    with numpyro.plate("group", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("sum", -((mu.sum() - 1.0) ** 2))
    numpyro.sample("seen", dist.Normal(mu.sum(), 0.5), obs=0.3)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mu.sum(), jnp.sqrt(2.0)), obs=x)


def masked(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)), handlers.mask(mask=x > 0):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)), handlers.mask(mask=x > 0):
        numpyro.sample("x", dist.Normal(mu, jnp.sqrt(2.0)), obs=x)


def mixture(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = numpyro.sample("weight", dist.Beta(2.0, 2.0))
    with numpyro.plate("data", len(x)):
        kind = numpyro.sample("kind", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        z = numpyro.sample("z", dist.Normal(mu + 2.0 * kind, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixture_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = numpyro.sample("weight", dist.Beta(2.0, 2.0))
    parts = dist.Normal(jnp.stack([mu, mu + 2.0]), jnp.sqrt(2.0))
    mixing = dist.Categorical(jnp.stack([1 - weight, weight]))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.MixtureSameFamily(mixing, parts), obs=x)


def grouped(x, group):
    """The rows' observations lie in another plate."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", 3):
        z = jnp.asarray(numpyro.sample("z", dist.Normal(mu, 1.0)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(z[group], 1.0), obs=x)


def grouped_alone(x, group):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    covariance = jnp.eye(NUM_DATA) + (GROUP[:, None] == GROUP)
    loc = mu * jnp.ones(NUM_DATA)
    numpyro.sample("x", dist.MultivariateNormal(loc, covariance), obs=x)


CASES = {
    "normal": (normal, normal_alone, {}),
    "conditioned": (normal, normal_alone, {"condition_on": ("mu", "tau")}),
    "scaled": (scaled, normal_alone, {}),
    "likelihood scaled": (likelihood_scaled, likelihood_scaled_alone, {}),
    "outside": (outside, outside_alone, {"plate": "data"}),
    "masked": (masked, masked_alone, {}),
    "full rank": (normal, normal_alone, {"auto": AutoAmortizedMultivariateNormal}),
    "low rank": (normal, normal_alone, {"auto": AutoAmortizedLowRankMultivariateNormal}),
    "flow": (normal, normal_alone, {"auto": AutoAmortizedFlow}),
    "discrete": (mixture, mixture_alone, {}),
}
