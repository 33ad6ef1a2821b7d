"""What most tests begin with: an SVI with a small network, or a trained posterior."""

from functools import partial
from typing import Any

import jax
import optax
from numpyro.infer import SVI, TraceMeanField_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior

SMALL = partial(MLP, hidden_sizes=(8,))


def make_svi(model, encoder=SMALL, *, loss=None, optimizer: Any = 1e-2, **options) -> SVI:
    """An SVI with an `AutoAmortizedNormal`, by Adam where only a learning rate is given."""
    optimizer = optax.adam(optimizer) if isinstance(optimizer, float) else optimizer
    guide = AutoAmortizedNormal(model, encoder, **options)
    return SVI(model, guide, optimizer, TraceMeanField_ELBO() if loss is None else loss)


def train(
    guide, *args, steps=800, rate=2e-2, loss=TraceMeanField_ELBO, particles=4, batch_axes=0
) -> Posterior:
    """Train a guide on all data at once, with a rate that falls to zero, by `SVI.run`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    svi = SVI(guide.model, guide, optimizer, loss(num_particles=particles))
    result = svi.run(jax.random.key(0), steps, *args, progress_bar=False)
    return Posterior(guide, result, batch_axes=batch_axes)
