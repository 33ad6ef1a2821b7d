"""What an encoder is, on one page.

An **encoder** reads a batch of data and returns what the guide needs to know about the
latents of each datum. It is either

* a flax ``nnx.Module``, used with the parameters it has, or
* a **builder**: any callable ``encoder(example_inputs, *, rngs) -> nnx.Module``, for instance
  the class `MLP` itself or ``functools.partial(MLP, hidden_sizes=(400,))``. The guide calls it
  with the first batch it sees and with ``rngs`` derived from the SVI key, so another key is
  another initialization and no shape has to be written down.

The module is called with ``inputs`` (an array, or a dict of arrays by site name, the data along
the leading axis) and returns either

* **features**, an array of shape ``(batch, k)``, to which the guide adds a linear head, or
* the **pair** ``(loc, raw_scale)``, and nothing is added. Each is one array
  ``(batch, size)`` for all local sites, in the model's order, or a dict of arrays by site name,
  ``(batch, *event_shape)``. What ``raw_scale`` means is what the guide's ``scale=`` declares.

A complete encoder:

    >>> from flax import nnx
    >>> class OneLayer(nnx.Module):
    ...     def __init__(self, example_inputs, *, rngs):
    ...         self.linear = nnx.Linear(example_inputs.shape[-1], 32, rngs=rngs)
    ...
    ...     def __call__(self, inputs):
    ...         return nnx.relu(self.linear(inputs))
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Num
from jaxtyping import Float as FloatDtype

__all__ = ["Standardize", "flatten_inputs"]


def flatten_inputs(inputs: Any) -> FloatDtype[Array, "batch size"]:
    """Flatten an array, or a pytree of arrays, to one float matrix with a row for each datum.

    Args:
        inputs: arrays whose leading axis is the datum axis. Integers and booleans become floats.

    Returns:
        All values of a datum side by side, shape ``(batch, size)``, leaves in pytree order.

    Raises:
        ValueError: if there is no array, or one has no datum axis.

    Example:
        >>> flatten_inputs({"x": jnp.ones((3, 2, 2)), "y": jnp.arange(3)}).shape
        (3, 5)
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(
            f"The encoder expects arrays with the data along the leading axis, found shapes "
            f"{shapes}. Return such arrays from inputs=."
        )
    rows = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
    dtype = jnp.result_type(float, *(r.dtype for r in rows if jnp.issubdtype(r.dtype, jnp.inexact)))
    return jnp.concatenate([row.astype(dtype) for row in rows], axis=-1)


class Standardize(nnx.Module):
    """Subtracts the mean and divides by the standard deviation of the first data seen.

    Per feature, ``(inputs - loc) / scale``; a feature that was constant in the example keeps
    scale 1. ``loc`` and ``scale`` are parameters, so they travel wherever ``params`` goes, but
    they receive no gradient: an optimizer that decays weights should mask them.

    Args:
        example: a batch of data.
        axis: the axes over which the statistics are taken: 0 for one value per feature,
            ``(0, 1, 2)`` for one value per channel of images.

    Example:
        >>> standardize = Standardize(jnp.array([[0.0, 10.0], [2.0, 30.0]]))
        >>> standardize(jnp.array([[1.0, 40.0]]))
        Array([[0., 2.]], dtype=float32)
    """

    def __init__(self, example: Num[Array, "batch ..."], *, axis: int | tuple[int, ...] = 0):
        example = jnp.asarray(example, jnp.result_type(float))
        scale = jnp.std(example, axis=axis)
        self.loc = nnx.Param(jnp.mean(example, axis=axis))
        self.scale = nnx.Param(jnp.where(scale > 0, scale, 1.0))

    def __call__(self, inputs: Num[Array, "batch ..."]) -> FloatDtype[Array, "batch ..."]:
        """Return the inputs on the example's scale, in the same shape."""
        loc, scale = jax.lax.stop_gradient((self.loc[...], self.scale[...]))
        return (inputs - loc) / scale
