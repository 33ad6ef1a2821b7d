"""One epoch of a convolutional VAE on CPU: TensorFlow, our convolutions, flax's convolutions.

The network and its loss are those of the TensorFlow tutorial on convolutional VAEs, written out
by hand for each library: 12,800 images of 28 x 28, batches of 32, Adam at 1e-4, one draw from the
posterior, the ELBO by Monte Carlo. Flax's layers, being slow here, see fewer images and their
time is scaled up. The contenders take turns, so that ratios of medians hold on a busy machine.

    python benchmarks/convolution.py                     synthetic images
    python benchmarks/convolution.py --data mnist.npz    MNIST, as Keras publishes it

Without TensorFlow its row is skipped. Compile time is not counted.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from numpyro_vae.layers.convolution import Conv, ConvTranspose

BATCH_SIZE = 32
LEARNING_RATE = 1e-4


class VAE(nnx.Module):
    """The tutorial's networks: encoder to (loc, log_variance), decoder to logits of pixels."""

    def __init__(self, conv, transpose, *, rngs):
        size = (3, 3)
        self.encode_1 = conv(1, 32, size, strides=2, padding="VALID", rngs=rngs)
        self.encode_2 = conv(32, 64, size, strides=2, padding="VALID", rngs=rngs)
        self.encode_3 = nnx.Linear(6 * 6 * 64, 4, rngs=rngs)
        self.decode_1 = nnx.Linear(2, 7 * 7 * 32, rngs=rngs)
        self.decode_2 = transpose(32, 64, size, strides=2, rngs=rngs)
        self.decode_3 = transpose(64, 32, size, strides=2, rngs=rngs)
        self.decode_4 = transpose(32, 1, size, rngs=rngs)

    def encode(self, images):
        hidden = nnx.relu(self.encode_2(nnx.relu(self.encode_1(images))))
        return jnp.split(self.encode_3(hidden.reshape(hidden.shape[0], -1)), 2, axis=-1)

    def decode(self, latents):
        hidden = nnx.relu(self.decode_1(latents)).reshape(-1, 7, 7, 32)
        return self.decode_4(nnx.relu(self.decode_3(nnx.relu(self.decode_2(hidden)))))


def normal_log_density(latents, loc, log_variance):
    density = -0.5 * ((latents - loc) ** 2 * jnp.exp(-log_variance) + log_variance)
    return (density - 0.9189385).sum(-1)


def loss(vae, rng_key, images):
    loc, log_variance = vae.encode(images)
    latents = loc + jnp.exp(0.5 * log_variance) * jax.random.normal(rng_key, loc.shape)
    logits = vae.decode(latents)
    log_likelihood = -optax.sigmoid_binary_cross_entropy(logits, images).sum((1, 2, 3))
    prior = normal_log_density(latents, jnp.zeros(()), jnp.zeros(()))
    return -(log_likelihood + prior - normal_log_density(latents, loc, log_variance)).mean()


def jax_step(conv, transpose):
    """A training step ``(carry, images) -> (carry, loss)`` and the first carry."""
    graph, params = nnx.split(VAE(conv, transpose, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(LEARNING_RATE)

    def step(carry, images):
        params, state, rng_key = carry
        rng_key, step_key = jax.random.split(rng_key)
        value, gradients = jax.value_and_grad(
            lambda params: loss(nnx.merge(graph, params), step_key, images)
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state, rng_key), value

    return step, (params, optimizer.init(params), jax.random.key(0))


def in_scan(conv, transpose, batches):
    """An epoch as one compiled `lax.scan`."""
    step, carry = jax_step(conv, transpose)
    epoch = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    epoch = epoch.lower(carry, batches).compile()
    return lambda: float(epoch(carry, batches)[1][-1])


def in_loop(conv, transpose, batches):
    """An epoch as a Python loop over a compiled step."""
    step, first = jax_step(conv, transpose)
    step = jax.jit(step).lower(first, batches[0]).compile()

    def epoch():
        carry = first
        for images in batches:
            carry, value = step(carry, images)
        return float(value)

    return epoch


def in_tensorflow(batches):
    """An epoch in TensorFlow as the tutorial has it; None without TensorFlow."""
    try:
        import tensorflow as tf
    except ImportError:
        return None
    layers = tf.keras.layers
    encoder = tf.keras.Sequential(
        [
            layers.InputLayer(shape=(28, 28, 1)),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Conv2D(64, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    decoder = tf.keras.Sequential(
        [
            layers.InputLayer(shape=(2,)),
            layers.Dense(7 * 7 * 32, activation="relu"),
            layers.Reshape((7, 7, 32)),
            layers.Conv2DTranspose(64, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(1, 3, padding="same"),
        ]
    )
    optimizer = tf.keras.optimizers.Adam(LEARNING_RATE)
    variables = encoder.trainable_variables + decoder.trainable_variables

    def log_density(latents, loc, log_variance):
        density = -0.5 * ((latents - loc) ** 2 * tf.exp(-log_variance) + log_variance)
        return tf.reduce_sum(density - 0.9189385, axis=-1)

    @tf.function
    def step(images):
        with tf.GradientTape() as tape:
            loc, log_variance = tf.split(encoder(images), 2, axis=1)
            latents = loc + tf.exp(0.5 * log_variance) * tf.random.normal(tf.shape(loc))
            cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(
                logits=decoder(latents), labels=images
            )
            log_likelihood = -tf.reduce_sum(cross_entropy, axis=[1, 2, 3])
            ratio = log_density(latents, 0.0, 0.0) - log_density(latents, loc, log_variance)
            value = -tf.reduce_mean(log_likelihood + ratio)
        optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))
        return value

    images = np.asarray(batches).reshape(-1, *batches.shape[2:])
    data = tf.data.Dataset.from_tensor_slices(images).batch(BATCH_SIZE)

    def epoch():
        for batch in data:
            value = step(batch)
        return float(value)

    return epoch


def load(path, num_images):
    """Binary images, in batches ``(num_batches, batch, 28, 28, 1)``."""
    if path:
        with np.load(path) as file:
            images = (file["x_train"][:num_images] > 127.5).astype(np.float32)
    else:
        images = np.random.default_rng(0).binomial(1, 0.2, (num_images, 28, 28)).astype(np.float32)
    return images.reshape(-1, BATCH_SIZE, 28, 28, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="an .npz file with MNIST's x_train; else synthetic images")
    parser.add_argument("--images", type=int, default=12_800, help="a multiple of 32")
    parser.add_argument(
        "--slow-images", type=int, default=640, help="images for flax's layers; 0 leaves them out"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    batches = load(args.data, args.images)
    device_batches = jnp.asarray(batches)
    few = device_batches[: max(1, args.slow_images // BATCH_SIZE)]
    scaled = len(batches) / len(few)
    contenders = {
        "TensorFlow": (in_tensorflow(batches), 1.0),
        "numpyro_vae, scan": (in_scan(Conv, ConvTranspose, device_batches), 1.0),
        "numpyro_vae, loop": (in_loop(Conv, ConvTranspose, device_batches), 1.0),
    }
    if args.slow_images:
        contenders["flax, scan"] = (in_scan(nnx.Conv, nnx.ConvTranspose, few), scaled)
        contenders["flax, loop"] = (in_loop(nnx.Conv, nnx.ConvTranspose, few), scaled)
    if contenders["TensorFlow"][0] is None:
        print("TensorFlow is not installed: its row is skipped.")
        del contenders["TensorFlow"]
    seconds = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        for name, (epoch, factor) in contenders.items():
            start = time.perf_counter()
            epoch()
            if number:  # The first round warms up.
                seconds[name].append((time.perf_counter() - start) * factor)
    report(seconds, len(few) * BATCH_SIZE, args.images)


def report(seconds, slow_images, num_images):
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["numpyro_vae, scan"]
    scaled = f"; flax's from {slow_images}, scaled up" if "flax, scan" in seconds else ""
    print(f"Seconds for an epoch of {num_images} images{scaled}.")
    print(f"{'':20}{'median':>9}{'fastest':>9}{'median, in ours':>17}")
    for name, values in seconds.items():
        print(f"{name:20}{medians[name]:9.2f}{min(values):9.2f}{medians[name] / ours:17.2f}")


if __name__ == "__main__":
    main()
