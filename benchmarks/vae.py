"""A VAE of dense layers: as a NumPyro model with the library's guide, and by hand in plain JAX.

Both do the same arithmetic: an encoder of one hidden layer, of pixels that are not standardized, a
Normal posterior sampled once, its analytic divergence from the prior, a decoder of one hidden
layer, Bernoulli pixels, Adam.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO

from numpyro_vae import MLP, AutoAmortizedNormal

LEARNING_RATE = 1e-3


class Sizes(NamedTuple):
    num_data: int
    pixels: int
    hidden: int
    latent: int
    batch_size: int

    @property
    def num_steps(self) -> int:
        """The steps of an epoch."""
        return -(-self.num_data // self.batch_size)

    def __str__(self) -> str:
        network = f"{self.pixels}-{self.hidden}-{self.latent}"
        return f"{network}, batch {self.batch_size}, N = {self.num_data:,}"


SMALL = Sizes(num_data=1_600, pixels=64, hidden=128, latent=8, batch_size=64)


def random_pixels(sizes: Sizes) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random((sizes.num_data, sizes.pixels)) < 0.3).astype(np.float32)


class Decoder(nnx.Module):
    def __init__(self, latent: int, hidden: int, pixels: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(latent, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, pixels, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.logits(nnx.relu(self.hidden(z)))


def make_model(sizes: Sizes, subsample_size: int | None = None) -> Callable[..., None]:
    decoder = Decoder(sizes.latent, sizes.hidden, sizes.pixels, rngs=nnx.Rngs(0))

    def model(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            batch = x if subsample_size is None else x[rows]
            z = numpyro.sample("z", dist.Normal(0, 1).expand([sizes.latent]).to_event(1))
            likelihood = dist.Bernoulli(logits=decode(z)).to_event(1)
            numpyro.sample("x", likelihood, obs=batch)

    return model


def make_svi(model: Callable[..., None], sizes: Sizes, loss: ELBO | None = None) -> SVI:
    guide = AutoAmortizedNormal(
        model, partial(MLP, hidden_sizes=(sizes.hidden,), standardize=False)
    )
    return SVI(model, guide, optax.adam(LEARNING_RATE), loss or TraceMeanField_ELBO())


def init_by_hand(sizes: Sizes, key: jax.Array) -> tuple[Any, Any]:
    """Return the first parameters and the optimizer's state."""
    dense = jax.nn.initializers.lecun_normal()
    shapes = {
        "e": (sizes.pixels, sizes.hidden),
        "loc": (sizes.hidden, sizes.latent),
        "log_scale": (sizes.hidden, sizes.latent),
        "d": (sizes.latent, sizes.hidden),
        "logits": (sizes.hidden, sizes.pixels),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: (dense(k, shape), jnp.zeros(shape[1]))
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params, optax.adam(LEARNING_RATE).init(params)


def apply_dense(params: Any, name: str, h: jax.Array) -> jax.Array:
    return h @ params[name][0] + params[name][1]


def encode_by_hand(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the location and the log-scale of each row's latents."""
    h = jax.nn.relu(apply_dense(params, "e", batch))
    return apply_dense(params, "loc", h), apply_dense(params, "log_scale", h)


def log_likelihood_by_hand(params: Any, batch: jax.Array, z: jax.Array) -> jax.Array:
    """Return the log density of each row of a batch given its latents."""
    logits = apply_dense(params, "logits", jax.nn.relu(apply_dense(params, "d", z)))
    return (batch * logits - jax.nn.softplus(logits)).sum(-1)


def loss_by_hand(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
    """Return the negative ELBO of a batch."""
    loc, log_scale = encode_by_hand(params, batch)
    scale = jnp.exp(log_scale)
    z = loc + scale * jax.random.normal(key, loc.shape)
    log_likelihood = log_likelihood_by_hand(params, batch, z)
    kl = (0.5 * (scale**2 + loc**2 - 1) - log_scale).sum(-1)
    return (kl - log_likelihood).sum()


def epoch_by_hand(
    sizes: Sizes, loss: Callable[[Any, jax.Array, jax.Array], jax.Array] = loss_by_hand
) -> Callable[..., Any]:
    """Return a compiled epoch ``(params, opt_state, key, x)``: one permutation and a scan."""
    optimizer = optax.adam(LEARNING_RATE)
    num_data, scale = sizes.num_data, sizes.num_data / sizes.batch_size

    @jax.jit
    def epoch(params, opt_state, key, x):
        order_key, next_key, step_key = jax.random.split(key, 3)
        order = jax.random.permutation(order_key, num_data)
        missing = sizes.num_steps * sizes.batch_size - num_data
        if missing:
            order = jnp.concatenate([order, jax.random.randint(next_key, (missing,), 0, num_data)])

        def step(carry, rows):
            params, opt_state, key = carry
            key, subkey = jax.random.split(key)
            value, grads = jax.value_and_grad(lambda params: loss(params, x[rows], subkey) * scale)(
                params
            )
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state, key), value / num_data

        carry = (params, opt_state, step_key)
        return jax.lax.scan(step, carry, order.reshape(sizes.num_steps, sizes.batch_size))

    return epoch
