"""A multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from numpyro_vae.encoders.base import Standardize, flatten_inputs

__all__ = ["MLP"]


class MLP(nnx.Module):
    """An encoder of dense layers, for inputs of any shape.

    The values of a datum are laid side by side (several inputs too) and pass through
    ``len(hidden_sizes)`` dense layers, each followed by ``activation``.

    Args:
        example_inputs: the first batch, an array or a dict of arrays, data along axis 0.
        hidden_sizes: the width of each layer; the last is the number of features.
        activation: applied after each layer.
        standardize: whether to put the inputs on the scale of the first batch, see `Standardize`.
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
        standardize: bool = False,
        rngs: nnx.Rngs,
    ):
        if not hidden_sizes or min(hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes must be sizes of at least 1, found {hidden_sizes}.")
        example = flatten_inputs(example_inputs)
        sizes = (example.shape[-1], *hidden_sizes)
        self.num_inputs = sizes[0]
        self.activation = activation
        self.standardize = Standardize(example) if standardize else None
        self.layers = nnx.List(
            nnx.Linear(fan_in, fan_out, rngs=rngs) for fan_in, fan_out in itertools.pairwise(sizes)
        )

    def __call__(self, inputs: Any) -> Float[Array, "batch k"]:
        """Return the features of each datum, shape ``(batch, hidden_sizes[-1])``."""
        hidden = flatten_inputs(inputs)
        if hidden.shape[-1] != self.num_inputs:
            raise ValueError(
                f"The encoder was built for data of {self.num_inputs} values each, found "
                f"{hidden.shape[-1]}. Pass data of the shape it was trained on."
            )
        if self.standardize is not None:
            hidden = self.standardize(hidden)
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        return hidden
