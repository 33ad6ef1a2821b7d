"""An encoder of several inputs, each read by an encoder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_vae.encoders.base import dense_layers

__all__ = ["Fusion"]


class Fusion(nnx.Module):
    """An encoder of a dict of inputs: each has its own encoder, dense layers read all features.

    Args:
        example_inputs: the first batch, a dict of what the encoders read, data along axis 0.
        encoders: for each input a builder, called as ``builder(inputs[name], rngs=rngs)``; for a
            network of another framework write one that returns `as_module` of it.
        hidden_sizes: the width of each layer after them; the last is the number of features.
        activation: applied after each layer.
        rngs: where the initial weights come from.

    Raises:
        TypeError: if the inputs are no dict, or a builder returns something else than a module.
        ValueError: if the inputs and the encoders do not have the same names, if an encoder does
            not return features, or if a size is below 1.

    Example:
        >>> from numpyro_vae.encoders import MLP, ConvNet
        >>> inputs = {"image": jnp.ones((8, 28, 28)), "label": jnp.ones((8, 10))}
        >>> encoder = Fusion(inputs, encoders={"image": ConvNet, "label": MLP}, rngs=nnx.Rngs(0))
        >>> encoder(inputs).shape
        (8, 128)
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        encoders: Mapping[str, Callable[..., nnx.Module]],
        hidden_sizes: Sequence[int] = (128,),
        activation: Callable[[Array], Array] = nnx.relu,
        rngs: nnx.Rngs,
    ):
        _check_names(example_inputs, encoders)
        self.activation = activation
        built = {name: encoders[name](example_inputs[name], rngs=rngs) for name in sorted(encoders)}
        for name, encoder in built.items():
            if not isinstance(encoder, nnx.Module):
                raise TypeError(
                    f"The encoder of {name!r}, called as encoder(example_inputs, rngs=rngs), "
                    f"returned {type(encoder).__name__}. Return an nnx.Module, see as_module."
                )
        # nnx.Dict keeps its items as attributes, where an input called "items" would hide a method.
        self.encoders = nnx.data(built)
        sizes = {name: _num_features(name, built[name], example_inputs[name]) for name in built}
        self.layers = dense_layers(sum(sizes.values()), hidden_sizes, rngs=rngs)

    def __call__(self, inputs: Any) -> Float[Array, "batch k"]:
        """Return the features of each datum, shape ``(batch, hidden_sizes[-1])``."""
        _check_names(inputs, self.encoders)
        features = [self.encoders[name](inputs[name]) for name in sorted(self.encoders)]
        hidden = jnp.concatenate(features, axis=-1)
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        return hidden


def _check_names(inputs: Any, encoders: Mapping[str, Any]) -> None:
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"Fusion encodes a dict of inputs with the names {sorted(encoders)}, found "
            f"{type(inputs).__name__}. Return such a dict from inputs=."
        )
    if not encoders:
        raise ValueError("Fusion needs at least one encoder, by the name of its input.")
    if set(inputs) != set(encoders):
        raise ValueError(
            f"Fusion has encoders for the inputs {sorted(encoders)}, found inputs "
            f"{sorted(inputs)}. Give an encoder to each input, or return only those from inputs=."
        )


def _num_features(name: str, encoder: nnx.Module, inputs: Any) -> int:
    graphdef, state = nnx.split(encoder)
    # A copy is called, and only its shapes are: no state is updated.
    output = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s, copy=True)(x), state, inputs)
    if len(getattr(output, "shape", ())) != 2:
        raise ValueError(
            f"The encoder of {name!r} returned {getattr(output, 'shape', type(output).__name__)}; "
            "Fusion expects features of shape (batch, k)."
        )
    return output.shape[-1]
