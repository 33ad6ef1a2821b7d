"""The convolutional VAE of TensorFlow's tutorial in flax, with its loss by hand and as a model."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen, nnx
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal

LEARNING_RATE = 1e-4
LATENTS = 2


class Encoder(nnx.Module):
    """From images to ``(loc, log_variance)``, with any convolutions."""

    def __init__(self, conv, *, rngs):
        self.conv_1 = conv(1, 32, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.conv_2 = conv(32, 64, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(6 * 6 * 64, 2 * LATENTS, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.conv_2(nnx.relu(self.conv_1(images))))
        return tuple(jnp.split(self.dense(hidden.reshape(len(images), -1)), 2, axis=-1))


class Decoder(nnx.Module):
    """From latents to logits of pixels, with any transposed convolutions."""

    def __init__(self, transpose, *, rngs):
        self.dense = nnx.Linear(LATENTS, 7 * 7 * 32, rngs=rngs)
        self.conv_1 = transpose(32, 64, (3, 3), strides=2, rngs=rngs)
        self.conv_2 = transpose(64, 32, (3, 3), strides=2, rngs=rngs)
        self.conv_3 = transpose(32, 1, (3, 3), rngs=rngs)

    def __call__(self, latents):
        hidden = nnx.relu(self.dense(latents)).reshape(-1, 7, 7, 32)
        return self.conv_3(nnx.relu(self.conv_2(nnx.relu(self.conv_1(hidden)))))


class LinenEncoder(linen.Module):
    """`Encoder` in flax linen."""

    @linen.compact
    def __call__(self, images):
        hidden = images
        for features in (32, 64):
            layer = linen.Conv(features, (3, 3), strides=2, padding="VALID")
            hidden = linen.relu(layer(hidden))
        output = linen.Dense(2 * LATENTS)(hidden.reshape(len(images), -1))
        return tuple(jnp.split(output, 2, axis=-1))


class LinenDecoder(linen.Module):
    """`Decoder` in flax linen."""

    @linen.compact
    def __call__(self, latents):
        hidden = linen.relu(linen.Dense(7 * 7 * 32)(latents)).reshape(-1, 7, 7, 32)
        for features in (64, 32):
            hidden = linen.relu(linen.ConvTranspose(features, (3, 3), strides=(2, 2))(hidden))
        return linen.ConvTranspose(1, (3, 3))(hidden)


def normal_log_density(latents, loc, log_variance):
    density = -0.5 * ((latents - loc) ** 2 * jnp.exp(-log_variance) + log_variance)
    return (density - 0.9189385).sum(-1)


def loss(encode, decode, rng_key, images):
    loc, log_variance = encode(images)
    latents = loc + jnp.exp(0.5 * log_variance) * jax.random.normal(rng_key, loc.shape)
    logits = decode(latents)
    log_likelihood = -optax.sigmoid_binary_cross_entropy(logits, images).sum((1, 2, 3))
    prior = normal_log_density(latents, jnp.zeros(()), jnp.zeros(()))
    return -(log_likelihood + prior - normal_log_density(latents, loc, log_variance)).mean()


def step_by_hand(conv, transpose):
    """A training step ``(carry, images) -> (carry, loss)`` and the first carry."""
    rngs = nnx.Rngs(0)
    graph, params = nnx.split((Encoder(conv, rngs=rngs), Decoder(transpose, rngs=rngs)))
    optimizer = optax.adam(LEARNING_RATE)

    def step(carry, images):
        params, state, rng_key = carry
        rng_key, step_key = jax.random.split(rng_key)
        value, gradients = jax.value_and_grad(
            lambda params: loss(*nnx.merge(graph, params), step_key, images)
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state, rng_key), value

    return step, (params, optimizer.init(params), jax.random.key(0))


def make_svi(encoder, declare_decoder):
    """The same VAE as a NumPyro model with the library's guide.

    Args:
        encoder: what the guide takes.
        declare_decoder: called within the model, returns the decoder.
    """

    def model(images):
        decode = declare_decoder()
        with numpyro.plate("images", len(images)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENTS]).to_event(1))
            numpyro.sample("x", dist.BernoulliLogits(decode(z)).to_event(3), obs=images)

    guide = AutoAmortizedNormal(model, encoder, scale="log_variance")
    return SVI(model, guide, optax.adam(LEARNING_RATE), Trace_ELBO())


def nnx_svi():
    """A user's own networks of `flax.nnx` layers."""
    decoder = Decoder(nnx.ConvTranspose, rngs=nnx.Rngs(0))
    encoder = Encoder(nnx.Conv, rngs=nnx.Rngs(1))
    return make_svi(encoder, lambda: nnx_module("decoder", decoder))


def linen_svi():
    """A user's own networks of flax linen's layers."""
    decoder = LinenDecoder()
    return make_svi(
        LinenEncoder(), lambda: flax_module("decoder", decoder, input_shape=(1, LATENTS))
    )
