"""One training epoch of a VAE: numpyro_vae, the same written by hand in JAX, and svi.run's way.

    python benchmarks/epoch.py [--repeats 5]

All three do the same arithmetic: an encoder of one hidden layer, a Normal posterior sampled once,
its analytic divergence from the prior, a decoder of one hidden layer, Bernoulli pixels, Adam.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, TraceMeanField_ELBO
from timing import interleave, report

from numpyro_vae import MLP, AutoAmortizedNormal
from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.training.sources import ArraySource


class Decoder(nnx.Module):
    def __init__(self, latent, hidden, pixels, *, rngs):
        self.hidden = nnx.Linear(latent, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, pixels, rngs=rngs)

    def __call__(self, z):
        return self.logits(nnx.relu(self.hidden(z)))


def make_svi(pixels, hidden, latent, subsample_size=None):
    decoder = Decoder(latent, hidden, pixels, rngs=nnx.Rngs(0))

    def model(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            batch = x if subsample_size is None else x[rows]
            z = numpyro.sample("z", dist.Normal(0, 1).expand([latent]).to_event(1))
            likelihood = dist.Bernoulli(logits=decode(z)).to_event(1)
            numpyro.sample("x", likelihood, obs=batch)

    guide = AutoAmortizedNormal(model, partial(MLP, hidden_sizes=(hidden,)))
    return SVI(model, guide, optax.adam(1e-3), TraceMeanField_ELBO())


def library_epoch(x, hidden, latent, batch_size):
    source = ArraySource(make_svi(x.shape[1], hidden, latent), ArrayData.read(x), batch_size, None)
    state = source.trainer.init(jax.random.key(0), source.first(), None)
    return lambda: source.run(state, jax.random.key(1), 0)


def svi_run_epoch(x, hidden, latent, batch_size):
    """What svi.run compiles: a scan of updates, the plate drawing its own minibatches."""
    svi = make_svi(x.shape[1], hidden, latent, subsample_size=batch_size)
    x = jnp.asarray(x)
    state = svi.init(jax.random.key(0), x)
    steps = -(-len(x) // batch_size)
    scan = jax.jit(
        lambda state, x: jax.lax.scan(lambda s, _: svi.update(s, x), state, length=steps)
    )
    return lambda: jax.block_until_ready(scan(state, x))


def by_hand_epoch(x, hidden, latent, batch_size):
    """The same VAE in plain JAX: optax, a scan, one permutation."""
    num_data, pixels = x.shape
    steps = -(-num_data // batch_size)
    x = jnp.asarray(x)
    optimizer = optax.adam(1e-3)
    dense = jax.nn.initializers.lecun_normal()

    def init(key):
        sizes = {"e": (pixels, hidden), "loc": (hidden, latent), "log_scale": (hidden, latent)}
        sizes |= {"d": (latent, hidden), "logits": (hidden, pixels)}
        keys = jax.random.split(key, len(sizes))
        return {
            name: (dense(k, size), jnp.zeros(size[1]))
            for k, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    def apply(params, name, h):
        return h @ params[name][0] + params[name][1]

    def loss(params, batch, key):
        h = jax.nn.relu(apply(params, "e", batch))
        loc, log_scale = apply(params, "loc", h), apply(params, "log_scale", h)
        scale = jnp.exp(log_scale)
        z = loc + scale * jax.random.normal(key, loc.shape)
        logits = apply(params, "logits", jax.nn.relu(apply(params, "d", z)))
        log_likelihood = (batch * logits - jax.nn.softplus(logits)).sum(-1)
        kl = (0.5 * (scale**2 + loc**2 - 1) - log_scale).sum(-1)
        return (kl - log_likelihood).sum() * (num_data / batch_size)

    @jax.jit
    def epoch(params, opt_state, key, x):
        order_key, next_key, step_key = jax.random.split(key, 3)
        order = jax.random.permutation(order_key, num_data)
        missing = steps * batch_size - num_data
        if missing:
            order = jnp.concatenate([order, jax.random.randint(next_key, (missing,), 0, num_data)])

        def step(carry, rows):
            params, opt_state, key = carry
            key, subkey = jax.random.split(key)
            value, grads = jax.value_and_grad(loss)(params, x[rows], subkey)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state, key), value / num_data

        carry = (params, opt_state, step_key)
        return jax.lax.scan(step, carry, order.reshape(steps, batch_size))

    params = init(jax.random.key(0))
    state = (params, optimizer.init(params))
    return lambda: jax.block_until_ready(epoch(*state, jax.random.key(1), x))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for num_data, pixels, hidden, latent, batch_size in (
        (60_000, 784, 400, 50, 128),
        (1_600, 64, 128, 8, 64),
    ):
        x = (rng.random((num_data, pixels)) < 0.3).astype(np.float32)
        sizes = (x, hidden, latent, batch_size)
        runs = {
            "by hand in JAX": by_hand_epoch(*sizes),
            "numpyro_vae": library_epoch(*sizes),
            "svi.run with a subsampling plate": svi_run_epoch(*sizes),
        }
        repeats = args.repeats if num_data > 10_000 else 100 * args.repeats
        title = f"an epoch at {pixels}-{hidden}-{latent}, batch {batch_size}, N = {num_data:,}"
        report(title, interleave(runs, repeats), "by hand in JAX")


if __name__ == "__main__":
    main()
