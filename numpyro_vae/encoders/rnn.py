"""A recurrent network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from numpyro_vae.encoders.base import Standardize, flatten_elements, scaled

__all__ = ["RNN"]

# Whether each of the two cells runs backward in time.
DIRECTIONS = {"forward": (False,), "backward": (True,), "bidirectional": (False, True)}


class RNN(nnx.Module):
    """An encoder of sequences that returns features for every step.

    A cell carries its state from step to step; with ``direction="bidirectional"`` another one runs
    from the end, and the features of a step say what both know there. For state space models, where
    the posterior of a step's latent depends on the future too (Krishnan et al., *Structured
    Inference Networks for Nonlinear State Space Models*, AAAI 2017). At a step that is masked the
    state is passed on as it is.

    Args:
        example_inputs: the first batch: an array ``(batch, time, k)`` or ``(batch, time)``, such
            values `Masked`, with any mask, or a dict of these, laid side by side at each step. In
            later batches sequences may have any length.
        hidden_size: the size of each cell's state.
        direction: ``"bidirectional"``, ``"forward"`` (the features of a step depend on the past and
            present) or ``"backward"`` (on the present and future).
        cell: a flax cell, called as ``cell(in_features, hidden_size, rngs=rngs)``, such as
            ``nnx.GRUCell`` or ``nnx.OptimizedLSTMCell``.
        standardize: whether to put the steps on the scale of the first batch, see `Standardize`.
        rngs: where the initial weights come from.

    Raises:
        ValueError: if the direction is none of these, the size is below 1, the inputs are no
            sequences, or their steps have another size than those of the example.

    Example:
        >>> encoder = RNN(jnp.ones((8, 20, 3)), hidden_size=16, rngs=nnx.Rngs(0))
        >>> encoder(jnp.ones((2, 50, 3))).shape
        (2, 50, 32)
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        hidden_size: int = 64,
        direction: str = "bidirectional",
        cell: Callable[..., nnx.RNNCellBase] = nnx.GRUCell,
        standardize: bool = True,
        rngs: nnx.Rngs,
    ):
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {[*DIRECTIONS]}, found {direction!r}.")
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, found {hidden_size}.")
        example, there, _ = flatten_elements(example_inputs)
        self.num_inputs = example.shape[-1]
        self.direction = direction
        self.standardize = Standardize(example, axis=(0, 1), where=there) if standardize else None
        self.cells = nnx.List(
            cell(self.num_inputs, hidden_size, rngs=rngs) for _ in DIRECTIONS[direction]
        )

    def __call__(self, inputs: Any) -> Float[Array, "batch time k"]:
        """Return the features of each step, those of the two directions side by side."""
        rows, there, present = flatten_elements(inputs)
        steps = scaled(rows, there, self.num_inputs, self.standardize)
        features = [
            _run(cell, steps, present, reverse=reverse)
            for cell, reverse in zip(self.cells, DIRECTIONS[self.direction], strict=True)
        ]
        return jnp.concatenate(features, axis=-1)


def _run(
    cell: nnx.RNNCellBase,
    steps: Float[Array, "batch time k"],
    present: Bool[Array, "batch time"],
    *,
    reverse: bool,
) -> Float[Array, "batch time hidden"]:
    """Scan one cell over the steps; `nnx.RNN` masks nothing but the end of a sequence."""

    def step(carry: Any, now: tuple[Array, Array]) -> tuple[Any, Array]:
        inputs, present = now
        proposed = cell(carry[0], inputs)
        kept = jax.tree.map(lambda new, old: jnp.where(present[:, None], new, old), proposed, carry)
        return kept, kept[1]

    # Flax's cells start at zeros, and want a key for them all the same.
    start = cell.initialize_carry((steps.shape[0], steps.shape[-1]), nnx.Rngs(0))
    state, output = jax.eval_shape(cell, start, steps[:, 0])
    # The cell's arithmetic may be of higher precision than its weights.
    start = jax.tree.map(lambda old, new: old.astype(new.dtype), start, state)
    by_time = (jnp.moveaxis(steps, 1, 0), jnp.moveaxis(present, 1, 0))
    carry = (start, jnp.zeros(output.shape, output.dtype))
    _, outputs = jax.lax.scan(step, carry, by_time, reverse=reverse)
    return jnp.moveaxis(outputs, 0, 1)
