"""What objectives cost, against the same written by hand in JAX, and the noise of their gradients.

    python benchmarks/objectives.py [--repeats 50]

The model is that of `vae.py`. An epoch of each objective of `numpyro_vae.objectives` is timed in
turn with one of the same arithmetic by hand; compile time is not counted. Then, after some
training, the signal-to-noise ratio of the encoder's gradient by the number of particles, as in
Tucker et al. (2019): the mean over parameters of the absolute mean of the gradient over keys,
divided by its standard deviation.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import stop_gradient
from library import library_epoch
from numpyro.infer.elbo import ELBO
from timing import interleave, report
from vae import (
    SMALL,
    Sizes,
    encode_by_hand,
    epoch_by_hand,
    init_by_hand,
    log_likelihood_by_hand,
    make_model,
    make_svi,
    random_pixels,
)

from numpyro_vae import fit
from numpyro_vae.objectives import (
    AnnealedELBO,
    FreeBitsELBO,
    ImportanceWeightedELBO,
    ReweightedWakeSleep,
)

MIDDLE = Sizes(num_data=6_400, pixels=784, hidden=200, latent=20, batch_size=128)
TINY = Sizes(num_data=96, pixels=16, hidden=8, latent=2, batch_size=32)
WEIGHT, NATS, PARTICLES = 0.5, 0.1, 8
KEY = jax.random.key(0)

# -- by hand ---------------------------------------------------------------------------------------


def draw(params, batch, key, num_particles):
    loc, log_scale = encode_by_hand(params, batch)
    noise = jax.random.normal(key, (num_particles, *loc.shape))
    return (loc, log_scale), loc + jnp.exp(log_scale) * noise


def log_normal(z, loc, log_scale):
    return (-0.5 * ((z - loc) * jnp.exp(-log_scale)) ** 2 - log_scale).sum(-1)


def log_joint(params, batch, z):
    return log_likelihood_by_hand(params, batch, z) + log_normal(z, 0.0, jnp.zeros(()))


def divergence_and_likelihood(params, batch, key):
    (loc, log_scale), z = draw(params, batch, key, 1)
    divergence = 0.5 * (jnp.exp(2 * log_scale) + loc**2 - 1) - log_scale
    return divergence, log_likelihood_by_hand(params, batch, z[0]).sum()


def weighted_by_hand(params, batch, key):
    divergence, likelihood = divergence_and_likelihood(params, batch, key)
    return WEIGHT * divergence.sum() - likelihood


def free_bits_by_hand(params, batch, key):
    divergence, likelihood = divergence_and_likelihood(params, batch, key)
    return jnp.maximum(divergence.sum(0), NATS * len(batch)).sum() - likelihood


def bound(log_weights):
    return (jax.nn.logsumexp(log_weights, axis=0) - np.log(PARTICLES)).sum()


def plain_by_hand(params, batch, key):
    q, z = draw(params, batch, key, PARTICLES)
    return -bound(log_joint(params, batch, z) - log_normal(z, *q))


def stl_by_hand(params, batch, key):
    q, z = draw(params, batch, key, PARTICLES)
    return -bound(log_joint(params, batch, z) - log_normal(z, *stop_gradient(q)))


def dreg_by_hand(params, batch, key):
    q, z = draw(params, batch, key, PARTICLES)

    def log_weights(z, params):
        return log_joint(params, batch, z) - log_normal(z, *stop_gradient(q))

    found, pull = jax.vjp(log_weights, *stop_gradient((z, params)))
    weights = jax.nn.softmax(found, axis=0)
    of_z, of_params = pull(weights)
    surrogate = (stop_gradient(weights[..., None] * of_z) * z).sum()
    pairs = zip(*map(jax.tree.leaves, (of_params, params)), strict=True)
    surrogate += sum((stop_gradient(grad) * param).sum() for grad, param in pairs)
    return -(stop_gradient(bound(found) - surrogate) + surrogate)


def wake_by_hand(params, batch, key):
    q, z = draw(params, batch, key, PARTICLES)
    model, guide = log_joint(params, batch, stop_gradient(z)), log_normal(stop_gradient(z), *q)
    weights = stop_gradient(jax.nn.softmax(model - guide, axis=0))
    surrogate = (weights * (model + guide)).sum()
    return -(stop_gradient(bound(model - guide) - surrogate) + surrogate)


OBJECTIVES: dict[str, tuple[ELBO, Callable[..., Any]]] = {
    "AnnealedELBO": (AnnealedELBO(WEIGHT), weighted_by_hand),
    "AnnealedELBO, schedule": (AnnealedELBO(optax.constant_schedule(WEIGHT)), weighted_by_hand),
    "FreeBitsELBO": (FreeBitsELBO(NATS), free_bits_by_hand),
    "ImportanceWeightedELBO plain": (ImportanceWeightedELBO(PARTICLES, "plain"), plain_by_hand),
    "ImportanceWeightedELBO stl": (ImportanceWeightedELBO(PARTICLES, "stl"), stl_by_hand),
    "ImportanceWeightedELBO dreg": (ImportanceWeightedELBO(PARTICLES, "dreg"), dreg_by_hand),
    "ReweightedWakeSleep": (ReweightedWakeSleep(PARTICLES), wake_by_hand),
}


def compare_epochs(sizes, repeats):
    x = random_pixels(sizes)
    for name, (loss, by_hand) in OBJECTIVES.items():
        epoch, state = epoch_by_hand(sizes, by_hand), init_by_hand(sizes, KEY)
        run = partial(epoch, *state, jax.random.key(1), jnp.asarray(x))
        runs = {
            "by hand in JAX": lambda run=run: jax.block_until_ready(run()),
            name: library_epoch(make_svi(make_model(sizes), sizes, loss), x, sizes.batch_size),
        }
        report(f"an epoch at {sizes}", interleave(runs, repeats), "by hand in JAX")


# -- the noise of gradients ------------------------------------------------------------------------


def signal_to_noise(svi, params, x, loss, num_keys):
    """Return the ratio of the encoder's gradient, averaged over parameters."""
    name = f"{svi.guide.prefix}$params"

    def grad(key):
        def of(encoder):
            return loss.loss(key, {**params, name: encoder}, svi.model, svi.guide, x)

        return jax.grad(of)(params[name])

    grads = jax.jit(partial(jax.lax.map, grad))(jax.random.split(KEY, num_keys))
    flat = np.concatenate([np.reshape(leaf, (num_keys, -1)) for leaf in jax.tree.leaves(grads)], 1)
    moving = flat[:, flat.std(0) > 0]
    return (np.abs(moving.mean(0)) / moving.std(0)).mean()


def compare_gradients(sizes, particles, num_epochs, num_keys):
    x = random_pixels(sizes)
    svi = make_svi(make_model(sizes), sizes)
    options = {"batch_size": sizes.batch_size, "progress_bar": False}
    params = fit(svi, KEY, x, num_epochs=num_epochs, **options).params
    print(f"\nsignal-to-noise ratio of the encoder's gradient at {sizes}, {num_keys} keys")
    print(f"  {'particles':<12}" + "".join(f"{number:9}" for number in particles))
    for name in ("plain", "stl", "dreg", "wake-phi"):
        found = [
            signal_to_noise(svi, params, jnp.asarray(x[: sizes.batch_size]), loss, num_keys)
            for loss in (
                ReweightedWakeSleep(number)
                if name == "wake-phi"
                else ImportanceWeightedELBO(number, name)
                for number in particles
            )
        ]
        print(f"  {name:<12}" + "".join(f"{ratio:9.3f}" for ratio in found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    if args.smoke:
        compare_epochs(TINY, 2)
        return compare_gradients(TINY, (1, 2), 1, 3)
    compare_epochs(MIDDLE, max(3, args.repeats // 5))
    compare_epochs(SMALL, args.repeats)
    compare_gradients(SMALL, (1, 8, 64), 20, 200)


if __name__ == "__main__":
    main()
