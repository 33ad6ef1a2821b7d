"""One failure of each kind, planted where all else is right, and a posterior without any."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from helpers import train
from numpyro import handlers
from numpyro.infer import Trace_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedNormal,
    Calibration,
    Gap,
    Importance,
    Novelty,
    Posterior,
)

NUM_DATA, NUM_REFERENCE = 300, 1000
SMALL = partial(MLP, hidden_sizes=(32,))
RNG = np.random.default_rng(0)


class Case(NamedTuple):
    """A posterior, data to check it on, and data to compare these with."""

    posterior: Posterior
    data: object
    reference: object


class Exact(nnx.Module):
    """The posterior of a linear Normal model, up to the correlation of the latents."""

    def __init__(self, weights, noise, factor=1.0):
        precision = np.eye(weights.shape[1]) + weights.T @ weights / noise**2
        self.gain = nnx.Param(jnp.asarray(np.linalg.solve(precision, weights.T / noise**2).T))
        # What minimizes KL(q || p) among diagonal Normals are the conditional variances.
        self.log_scale = nnx.Param(jnp.asarray(np.log(factor / np.sqrt(np.diag(precision)))))

    def __call__(self, x):
        loc = x.reshape(len(x), -1) @ self.gain[...]
        return loc, jnp.broadcast_to(self.log_scale[...], loc.shape)


def linear(weights, noise):
    """``x ~ Normal(W z, noise)``, the latents standard Normal."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([weights.shape[1]]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ weights.T, noise).to_event(1), obs=x)

    return model


def simulate(weights, noise, number, draw=RNG.normal):
    z = RNG.normal(size=(number, weights.shape[1]))
    return (z @ weights.T + noise * draw(size=(number, len(weights)))).astype(np.float32)


def untrained(model, encoder, data):
    """The posterior of a guide that is right as it stands."""
    guide = AutoAmortizedNormal(model, encoder)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(data)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    return Posterior(guide, params)


@cache
def exact_posterior(weights, noise, factor):
    """The same for the same model, so that what it compiles serves several cases."""
    weights = np.array(weights, np.float32)
    example = np.zeros((NUM_DATA, len(weights)), np.float32)
    return untrained(linear(weights, noise), Exact(weights, noise, factor), example)


def exact(weights, noise, *, factor=1.0, shift=0.0, draw=RNG.normal):
    """A right guide, but for a factor on its scale, and data that may not be the model's."""
    data, reference = (simulate(weights, noise, n, draw) for n in (NUM_DATA, NUM_REFERENCE))
    posterior = exact_posterior(tuple(map(tuple, weights.tolist())), noise, factor)
    return Case(posterior, data + np.float32(shift), reference)


ORTHOGONAL = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], np.float32)


def healthy():
    """Latents that are independent given the data, as they are in the guide."""
    return exact(ORTHOGONAL, 0.7)


def heavy_tail():
    """A posterior with heavier tails than a Normal, whose bound hardly shows it."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 3.0), obs=x)

    data, reference = (
        (RNG.standard_t(3, n) + 3 * RNG.normal(size=n)).astype(np.float32)
        for n in (NUM_DATA, NUM_REFERENCE)
    )
    return Case(trained(model, SMALL, (reference,), 1500), data, reference)


def small_encoder():
    """A posterior mean that goes up and down with a covariate, and one unit to follow it."""

    def model(x, c):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.7 * jnp.sin(3 * c), 0.5))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def draw(number):
        c = RNG.uniform(-3, 3, number)
        z = 0.7 * np.sin(3 * c) + 0.5 * RNG.normal(size=number)
        x = z + 0.5 * RNG.normal(size=number)
        return x.astype(np.float32), c.astype(np.float32)

    data, reference = draw(NUM_DATA), draw(NUM_REFERENCE)
    encoder = partial(MLP, hidden_sizes=(1,), activation=nnx.tanh)
    read = {"inputs": lambda x, c: jnp.stack([x, c], axis=-1)}
    return Case(trained(model, encoder, reference, 2000, **read), data, reference)


def trained(model, encoder, data, num_steps, guide=AutoAmortizedNormal, **options):
    return train(
        guide(model, encoder, **options), *data, steps=num_steps, rate=1e-2, loss=Trace_ELBO
    )


def correlated():
    """Latents that a datum ties together, and a guide in which they are independent."""
    return exact(np.array([[1.0, 1.0], [0.5, 0.0], [0.0, 0.5]], np.float32), 0.85)


def shifted():
    """Data far from those of the training, which a linear encoder reads rightly all the same."""
    return exact(ORTHOGONAL, 0.7, shift=3.5)


def wrong_scale():
    """A log-variance that is read as a log-scale: the square of a standard deviation of 0.75."""
    weights, noise = np.eye(1, dtype=np.float32), np.sqrt(1 / (1 / 0.75**2 - 1))
    return exact(weights, noise, factor=0.75)


def ignored():
    """A decoder that ignores the second latent."""
    return exact(np.array([[1.0, 0.0], [1.0, 0.0]], np.float32), 0.7)


def outliers():
    """Noise with heavy tails, and a likelihood without."""
    return exact(ORTHOGONAL, 0.7, draw=partial(RNG.standard_t, 2))


# What is planted, as a row of the table in docs/checks.md says it.
PLANTED = {
    "nothing": healthy,
    "a posterior with heavier tails than the guide": heavy_tail,
    "an encoder that is too small": small_encoder,
    "a diagonal family, a correlated posterior": correlated,
    "a log-variance read as a log-scale": wrong_scale,
    "a decoder that ignores a latent": ignored,
    "data unlike the training data": shifted,
    "outliers that the likelihood does not allow for": outliers,
}


def found_by(case: Case) -> set[str]:
    """Return which checks find a failure, the two gaps apart."""
    checks = (
        Importance(num_samples=20_000),
        Gap(num_samples=20_000),
        Calibration(),
        "collapse",
        Novelty(case.reference),
        "predictive",
    )
    report = case.posterior.check(jax.random.key(1), case.data, checks, progress_bar=False)
    bad = [finding for finding in report.findings if not finding.ok]
    return {
        f"{finding.text.split()[1]} gap" if finding.check == "gap" else finding.check
        for finding in bad
    }
