"""An encoder of sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_vae.data.ragged import Masked, Segments
from numpyro_vae.encoders.base import (
    Standardize,
    dense_layers,
    flatten_elements,
    flatten_with_mask,
    scaled,
)

__all__ = ["SetEncoder"]

POOLINGS = ("mean", "sum", "attention")


class SetEncoder(nnx.Module):
    """An encoder of data that are sets of any size, whatever the order of their elements.

    Every element passes through the same dense layers; what comes out is pooled over the elements
    of a set, and passes with ``log(1 + number of elements)``, on which the width of a posterior
    depends, through further dense layers (Zaheer et al., *Deep Sets*, NeurIPS 2017). With
    ``pooling="attention"`` the pool is a mean whose weights are learned, ``softmax(v' tanh(V h))``
    (Ilse et al., *Attention-based Deep Multiple Instance Learning*, ICML 2018). An empty set pools
    to zeros.

    Args:
        example_inputs: the first batch: `Segments`, whose values may be a dict of arrays, laid side
            by side for each element; or padded sets, `Masked` values ``(batch, elements, k)`` with
            a mask ``(batch, elements)``; or arrays ``(batch, elements, k)`` or
            ``(batch, elements)``. Both forms of the same sets have the same features.
        element_sizes: the width of each layer before pooling.
        hidden_sizes: the width of each layer after it; the last is the number of features.
        pooling: ``"mean"``, ``"sum"`` or ``"attention"``.
        activation: applied after each layer.
        standardize: whether to put the elements on the scale of the first batch, see `Standardize`.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if the pooling is none of these, a size is below 1, the inputs are not sets, or
            their elements have another size than those of the example.

    Example:
        >>> houses = Segments(jnp.ones((5, 2)), jnp.array([0, 0, 2, 2, 2]), num_segments=3)
        >>> encoder = SetEncoder(houses, hidden_sizes=(16,), rngs=nnx.Rngs(0))
        >>> encoder(houses).shape
        (3, 16)
        >>> encoder(Masked(jnp.ones((4, 9, 2)), jnp.ones((4, 9), bool))).shape
        (4, 16)
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        element_sizes: Sequence[int] = (64, 64),
        hidden_sizes: Sequence[int] = (64,),
        pooling: str = "mean",
        activation: Callable[[Array], Array] = nnx.relu,
        standardize: bool = True,
        rngs: nnx.Rngs,
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, found {pooling!r}.")
        example, there, _ = _read(example_inputs)
        self.num_inputs = example.shape[-1]
        self.pooling, self.activation = pooling, activation
        axes = tuple(range(example.ndim - 1))
        self.standardize = Standardize(example, axis=axes, where=there) if standardize else None
        self.element_layers = dense_layers(
            self.num_inputs, element_sizes, name="element_sizes", rngs=rngs
        )
        self.layers = dense_layers(element_sizes[-1] + 1, hidden_sizes, rngs=rngs)
        self.attention = None if pooling != "attention" else _Scores(element_sizes[-1], rngs=rngs)

    def __call__(self, inputs: Any) -> Float[Array, "batch k"]:
        """Return the features of each set, shape ``(batch, hidden_sizes[-1])``."""
        rows, there, sets = _read(inputs)
        elements = scaled(rows, there, self.num_inputs, self.standardize)
        for layer in self.element_layers:
            elements = self.activation(layer(elements))
        log_count = jnp.log1p(sets.counts())[:, None].astype(elements.dtype)
        hidden = jnp.concatenate([self._pool(sets, elements), log_count], axis=-1)
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        return hidden

    def _pool(self, sets: Masked | Segments, elements: Array) -> Array:
        if self.attention is not None:
            return sets.sum(sets.softmax(self.attention(elements)) * elements)
        return sets.sum(elements) if self.pooling == "sum" else sets.mean(elements)


class _Scores(nnx.Module):
    """How much attention each element asks for; the softmax would cancel a last bias."""

    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(size, size, rngs=rngs)
        self.score = nnx.Linear(size, 1, use_bias=False, rngs=rngs)

    def __call__(self, elements: Float[Array, "... k"]) -> Float[Array, "... 1"]:
        return self.score(nnx.tanh(self.hidden(elements)))


def _read(inputs: Any) -> tuple[Array, Array, Masked | Segments]:
    """A vector for each element, where in it there are values, and what pools over elements."""
    if isinstance(inputs, Segments):
        return *flatten_with_mask(inputs.values), inputs
    rows, there, present = flatten_elements(inputs)
    return rows, there, Masked(rows, present)
