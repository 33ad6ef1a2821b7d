"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from numpyro_vae.encoders.base import Standardize, dense_layers, flatten_with_mask, scaled, shorten

__all__ = ["MLP"]


class MLP(nnx.Module):
    """An encoder of dense layers, for inputs of any shape.

    The values of a datum are laid side by side (several inputs too) and pass through
    ``len(hidden_sizes)`` dense layers, each followed by ``activation``.

    Args:
        example_inputs: the first batch, an array or a dict of arrays, data along axis 0. Of
            `Masked` arrays the network is told the mask too.
        hidden_sizes: the width of each layer; the last is the number of features.
        activation: applied after each layer.
        standardize: whether to put the inputs on the scale of the first batch, see `Standardize`,
            of `Masked` arrays that of the values that are there; and to turn the norm of a datum's
            features into its asinh, so that no outlier's latents go far away in the first steps.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if ``hidden_sizes`` is empty or holds a size below 1, or if the inputs have
            another size than the example.

    Example:
        >>> import jax.numpy as jnp
        >>> encoder = MLP(jnp.ones((8, 5)), hidden_sizes=(16, 4), rngs=nnx.Rngs(0))
        >>> encoder(jnp.ones((3, 5))).shape
        (3, 4)
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: Callable[[Array], Array] = nnx.relu,
        standardize: bool = True,
        rngs: nnx.Rngs,
    ):
        example, there = flatten_with_mask(example_inputs)
        self.num_inputs = example.shape[-1]
        self.activation = activation
        self.standardize = Standardize(example, where=there) if standardize else None
        self.layers = dense_layers(self.num_inputs, hidden_sizes, rngs=rngs)

    def __call__(self, inputs: Any) -> Float[Array, "batch k"]:
        """Return the features of each datum, shape ``(batch, hidden_sizes[-1])``."""
        hidden = scaled(*flatten_with_mask(inputs), self.num_inputs, self.standardize)
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        return hidden if self.standardize is None else shorten(hidden)
