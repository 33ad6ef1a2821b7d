"""The TensorFlow tutorial's convolutional VAE, as the tutorial writes it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

layers = tf.keras.layers


def encoder() -> tf.keras.Sequential:
    return tf.keras.Sequential(
        [
            layers.InputLayer(shape=(28, 28, 1)),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Conv2D(64, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )


def decoder() -> tf.keras.Sequential:
    return tf.keras.Sequential(
        [
            layers.InputLayer(shape=(2,)),
            layers.Dense(7 * 7 * 32, activation="relu"),
            layers.Reshape((7, 7, 32)),
            layers.Conv2DTranspose(64, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(1, 3, padding="same"),
        ]
    )


def log_density(latents: Any, loc: Any, log_variance: Any) -> Any:
    density = -0.5 * ((latents - loc) ** 2 * tf.exp(-log_variance) + log_variance)
    return tf.reduce_sum(density - 0.9189385, axis=-1)


def loss(encode: Any, decode: Any, images: Any) -> Any:
    loc, log_variance = tf.split(encode(images), 2, axis=1)
    latents = loc + tf.exp(0.5 * log_variance) * tf.random.normal(tf.shape(loc))
    cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(logits=decode(latents), labels=images)
    log_likelihood = -tf.reduce_sum(cross_entropy, axis=[1, 2, 3])
    ratio = log_density(latents, 0.0, 0.0) - log_density(latents, loc, log_variance)
    return -tf.reduce_mean(log_likelihood + ratio)


def dataset(images: np.ndarray) -> tf.data.Dataset:
    """Return a data set of images ``(num_images, 28, 28)`` with a channel each."""
    return tf.data.Dataset.from_tensor_slices(images[..., None])


def tensorflow_vae(
    batches: tf.data.Dataset, test_batches: tf.data.Dataset, learning_rate: float
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return an epoch over batches of images, and the mean ELBO of others by one draw of each."""
    encode, decode = encoder(), decoder()
    optimizer = tf.keras.optimizers.Adam(learning_rate)
    variables = encode.trainable_variables + decode.trainable_variables

    @tf.function
    def step(images: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(encode, decode, images)
        optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))
        return value

    @tf.function
    def test_loss(images: Any) -> Any:
        return loss(encode, decode, images)

    def epoch() -> float:
        for batch in batches:
            value = step(batch)
        return float(value)

    def elbo() -> float:
        losses = [(float(test_loss(batch)), len(batch)) for batch in test_batches]
        return -sum(value * size for value, size in losses) / sum(size for _, size in losses)

    return epoch, elbo
