"""A convolutional network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_vae.encoders.base import Standardize
from numpyro_vae.layers.convolution import Conv

__all__ = ["ConvNet"]


class ConvNet(nnx.Module):
    """An encoder of images: strided convolutions without pooling, then a dense layer.

    Each convolution halves the image with its stride of 2 (``"SAME"`` padding, so small images
    do not vanish) and is followed by ``activation``; so is the dense layer. Convolutions are
    `Conv`, fast on CPU too.

    Args:
        example_inputs: the first batch, ``(batch, height, width)`` or
            ``(batch, height, width, channels)``. Integers and booleans become floats, unscaled.
        channels: the number of filters of each convolution.
        kernel_size: the width, and the height, of the filters, for all convolutions.
        features: the size of the dense layer.
        standardize: whether to put each channel on the scale of the first batch, see
            `Standardize`.
        activation: applied after each layer.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if the inputs are not images, if a size is below 1, or if the encoder is
            called on images of another shape than the example.

    Example:
        >>> from functools import partial
        >>> encoder = ConvNet(jnp.ones((8, 28, 28)), channels=(16, 32), rngs=nnx.Rngs(0))
        >>> encoder(jnp.ones((3, 28, 28))).shape
        (3, 128)
        >>> builder = partial(ConvNet, channels=(16,), features=10)  # for the guide to call
        >>> builder(jnp.ones((8, 28, 28, 3)), rngs=nnx.Rngs(0))(jnp.ones((1, 28, 28, 3))).shape
        (1, 10)
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        features: int = 128,
        standardize: bool = True,
        activation: Callable[[Array], Array] = nnx.relu,
        rngs: nnx.Rngs,
    ):
        sizes = {"channels": channels, "kernel_size": (kernel_size,), "features": (features,)}
        for name, values in sizes.items():
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be at least 1, found {values}.")
        self.image_shape = _image_shape(example_inputs)
        height, width, depth = (*self.image_shape, 1)[:3]
        self.activation = activation
        self.standardize = None if not standardize else _by_channel(example_inputs, depth)
        self.convolutions = nnx.List(
            Conv(before, after, (kernel_size, kernel_size), strides=2, rngs=rngs)
            for before, after in zip((depth, *channels[:-1]), channels, strict=True)
        )
        shrinkage = 2 ** len(channels)
        positions = math.ceil(height / shrinkage) * math.ceil(width / shrinkage)
        self.dense = nnx.Linear(positions * channels[-1], features, rngs=rngs)

    def __call__(self, inputs: Any) -> Float[Array, "batch k"]:
        """Return the features of each image, shape ``(batch, features)``."""
        if _image_shape(inputs) != self.image_shape:
            raise ValueError(
                f"The encoder was built for images of shape {self.image_shape}, found "
                f"{_image_shape(inputs)}. Pass images of the shape it was trained on."
            )
        images = jnp.asarray(inputs)
        if len(self.image_shape) == 2:
            images = images[..., None]
        hidden = images.astype(self.dense.kernel.dtype)
        if self.standardize is not None:
            hidden = self.standardize(hidden)
        for convolution in self.convolutions:
            hidden = self.activation(convolution(hidden))
        return self.activation(self.dense(hidden.reshape(hidden.shape[0], -1)))


def _by_channel(example_inputs: Any, depth: int) -> Standardize:
    """Statistics over all pixels of each channel, whatever the dtype of the pixels."""
    pixels = jnp.asarray(example_inputs, jnp.result_type(float)).reshape(-1, depth)
    return Standardize(pixels)


def _image_shape(inputs: Any) -> tuple[int, ...]:
    """The shape of one image of the batch; an error if these are no images."""
    found = getattr(inputs, "shape", None)
    if found is not None and len(found) in (3, 4) and 0 not in found[1:]:
        return tuple(found[1:])
    described = f"an array of shape {found}" if found is not None else type(inputs).__name__
    raise ValueError(
        "ConvNet encodes images: one array of shape (batch, height, width) or (batch, height, "
        f"width, channels). Found {described}. Return images from inputs=, reshaping flattened "
        "ones, as in inputs=lambda x: x.reshape(-1, 28, 28); for other data use MLP."
    )
