"""One failure of each kind, planted where all else is right, and a posterior without any."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from helpers import train
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


class Linear(nnx.Module):
    """A loc that is linear in the data, and the same log-scale for all."""

    def __init__(self, gain, log_scale):
        self.gain, self.log_scale = nnx.Param(gain), nnx.Param(log_scale)

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


ORTHOGONAL = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], np.float32)
NUM_OBSERVED, NUM_LATENTS = ORTHOGONAL.shape


def learned(x):
    """A `linear` model, of weights and noise that are parameters."""
    weights = numpyro.param("weights", jnp.zeros((NUM_OBSERVED, NUM_LATENTS)))
    linear(weights, numpyro.param("noise", jnp.array(1.0)))(x)


# One guide for all linear models, so that what it compiles serves all cases.
LINEAR = AutoAmortizedNormal(
    learned, Linear(jnp.zeros((NUM_OBSERVED, NUM_LATENTS)), jnp.zeros(NUM_LATENTS))
)


def exact(weights, noise, *, factor=1.0, shift=0.0, draw=RNG.normal):
    """A right guide, but for a factor on its scale, and data that may not be the model's."""
    weights = np.pad(weights, ((0, NUM_OBSERVED - len(weights)), (0, 0)))  # the rest sees no latent
    data, reference = (simulate(weights, noise, n, draw) for n in (NUM_DATA, NUM_REFERENCE))
    posterior = Posterior(LINEAR, exact_params(weights, noise, factor))
    return Case(posterior, data + np.float32(shift), reference)


def exact_params(weights, noise, factor):
    """The model's, and those of its posterior up to the correlation of the latents."""
    precision = np.eye(NUM_LATENTS) + weights.T @ weights / noise**2
    gain = np.linalg.solve(precision, weights.T / noise**2).T
    # What minimizes KL(q || p) among diagonal Normals are the conditional variances.
    log_scale = np.log(factor / np.sqrt(np.diag(precision)))
    network = {"encoder": {"gain": jnp.asarray(gain), "log_scale": jnp.asarray(log_scale)}}
    model = {"weights": jnp.asarray(weights), "noise": jnp.asarray(noise, float)}
    return {f"{LINEAR.prefix}$params": network, **model}


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
    """A log-variance of one latent that is read as a log-scale: the square of an sd of 0.75."""
    weights, noise = np.eye(2, dtype=np.float32), np.sqrt(1 / (1 / 0.75**2 - 1))
    return exact(weights, noise, factor=np.array([0.75, 1.0]))


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
        Importance(num_samples=4000),
        Gap(num_samples=4000),
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
