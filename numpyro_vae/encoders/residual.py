"""A residual network of dense layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Bool, Float

from numpyro_vae.encoders.base import Standardize, flatten_with_mask, scaled

__all__ = ["ResidualMLP"]


class ResidualMLP(nnx.Module):
    """An encoder for inputs of any shape that trains when it is deep.

    The values of a datum, laid side by side, pass through a linear layer and then through
    pre-activation residual blocks ``h + linear(activation(linear(activation(norm(h)))))`` with
    LayerNorm (He et al., *Identity Mappings in Deep Residual Networks*, ECCV 2016). Nothing stands
    between the inputs and the features but these sums, and blocks start at zero: at first features
    are linear in the data, as the posterior mean of a conjugate Normal is, and from few data no
    noise of random blocks is learned.

    Args:
        example_inputs: the first batch, an array or a dict of arrays, data along axis 0. Of
            `Masked` arrays the network is told the mask too.
        hidden_size: the width of every layer, and the number of features.
        num_blocks: the number of residual blocks.
        activation: applied in the blocks.
        log_scale: whether to read ``sign(x) log(1 + |x|)`` of the inputs ``x``, as is right for
            counts: a few of a hundred are then no further from the others than they say.
        standardize: whether to put the inputs on the scale of the first batch, see `Standardize`;
            of `Masked` arrays, that of the values that are there.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if a size is below 1, or if the inputs have another size than the example.

    Example:
        >>> import jax.numpy as jnp
        >>> encoder = ResidualMLP(jnp.ones((8, 5)), hidden_size=16, rngs=nnx.Rngs(0))
        >>> encoder(jnp.ones((3, 5))).shape
        (3, 16)
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        hidden_size: int = 128,
        num_blocks: int = 2,
        activation: Callable[[Array], Array] = nnx.relu,
        log_scale: bool = False,
        standardize: bool = True,
        rngs: nnx.Rngs,
    ):
        for name, size in {"hidden_size": hidden_size, "num_blocks": num_blocks}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}.")
        self.log_scale = log_scale
        example, there = self._flatten(example_inputs)
        self.num_inputs = example.shape[-1]
        self.standardize = Standardize(example, where=there) if standardize else None
        self.linear = nnx.Linear(self.num_inputs, hidden_size, rngs=rngs)
        self.blocks = nnx.List(
            _Block(hidden_size, activation, rngs=rngs) for _ in range(num_blocks)
        )

    def __call__(self, inputs: Any) -> Float[Array, "batch k"]:
        """Return the features of each datum, shape ``(batch, hidden_size)``."""
        rows = scaled(*self._flatten(inputs), self.num_inputs, self.standardize)
        hidden = self.linear(rows)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden

    def _flatten(self, inputs: Any) -> tuple[Float[Array, "batch k"], Bool[Array, "batch k"]]:
        """Return the inputs of each datum, and where there are any."""
        rows, there = flatten_with_mask(inputs)
        return (jnp.sign(rows) * jnp.log1p(jnp.abs(rows)) if self.log_scale else rows), there


class _Block(nnx.Module):
    def __init__(self, size: int, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        self.activation = activation
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.first = nnx.Linear(size, size, rngs=rngs)
        self.second = nnx.Linear(size, size, kernel_init=initializers.zeros, rngs=rngs)

    def __call__(self, hidden: Float[Array, "batch k"]) -> Float[Array, "batch k"]:
        hidden = self.first(self.activation(self.norm(hidden)))
        return self.second(self.activation(hidden))
