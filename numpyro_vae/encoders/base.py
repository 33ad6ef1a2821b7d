"""What an encoder is, on one page.

An **encoder** reads a batch of data and returns what the guide needs to know about the
latents of each datum. It is either

* a flax ``nnx.Module``, used with the parameters it has, or
* a **builder**: any callable ``encoder(example_inputs, *, rngs) -> nnx.Module``, for instance
  the class `MLP` itself or ``functools.partial(MLP, hidden_sizes=(400,))``. The guide calls it
  with the first batch it sees and with ``rngs`` derived from the SVI key, so another key is
  another initialization and no shape has to be written down, or
* a flax linen module, an Equinox module or a pair of functions ``(init, apply)``; see `as_module`.

The module is called with ``inputs``, the data along the leading axis: an array, a dict of arrays
by site name, or in the place of an array a `Masked` one, of which some entries are not there, or
`Segments`, groups of unequal size. It returns one of

* **features**, an array of shape ``(batch, k)``, to which the guide adds a head;
* features **by step**, ``(batch, *steps, k)``, one vector for each step, where every local site
  has ``steps`` as the leading part of a datum's shape (time, positions): the head is applied
  step by step;
* a **dict** of features by site name, each as above, and every site gets a head of its own;
* of data sets, a **dict** of features by plate, ``(batch, *elements, k)``, see
  `numpyro_vae.model.data_sets`: sites in a plate share a head, applied element by element, which
  reads the sampled values of the sites around;
* the **pair** ``(loc, raw_scale)``, and nothing is added. Each is one array
  ``(batch, size)`` for all local sites, in the model's order, or a dict of arrays by site name,
  ``(batch, *event_shape)``. What ``raw_scale`` means is what the guide's ``scale=`` declares: a
  log-scale by default, and with ``scale="scale"`` the standard deviation itself.

To write one, copy this into a file of ``encoders/``, fill it, and give it a row in
``tests/cases.py``; `flatten_inputs` reads all inputs but `Segments`:

    >>> from flax import nnx
    >>> class OneLayer(nnx.Module):
    ...     def __init__(self, example_inputs, *, features=32, rngs):
    ...         size = flatten_inputs(example_inputs).shape[-1]
    ...         self.linear = nnx.Linear(size, features, rngs=rngs)
    ...
    ...     def __call__(self, inputs):
    ...         return nnx.relu(self.linear(flatten_inputs(inputs)))
    >>> OneLayer(jnp.ones((8, 5)), rngs=nnx.Rngs(0))(jnp.ones((3, 5))).shape
    (3, 32)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Num
from jaxtyping import Float as FloatDtype

from numpyro_vae.data.ragged import Masked, Segments

__all__ = ["Standardize", "flatten_inputs"]

FURTHEST = 5.0  # no value of the first data is more scales away from their mean


def flatten_inputs(inputs: Any) -> FloatDtype[Array, "batch size"]:
    """Flatten an array, or a pytree of arrays, to one float matrix with a row for each datum.

    Args:
        inputs: arrays whose leading axis is the datum axis. Integers and booleans become floats.
            A `Masked` array becomes its values, zeros where there are none, and its mask.

    Returns:
        All values of a datum side by side, shape ``(batch, size)``, leaves in pytree order.

    Raises:
        ValueError: if there is no array, or one has no datum axis, or there are `Segments`.

    Example:
        >>> flatten_inputs({"x": jnp.ones((3, 2, 2)), "y": jnp.arange(3)}).shape
        (3, 5)
        >>> flatten_inputs(Masked(jnp.array([[jnp.nan, 2.0]]), jnp.array([[False, True]])))
        Array([[0., 2., 0., 1.]], dtype=float32)
    """
    return flatten_with_mask(inputs)[0]


def flatten_with_mask(
    inputs: Any,
) -> tuple[FloatDtype[Array, "batch size"], Bool[Array, "batch size"]]:
    """Return what `flatten_inputs` does, and where in it there is a value (a mask is one)."""
    pairs = [pair for leaf in _leaves(inputs) for pair in _with_mask(leaf)]
    shapes = [values.shape for values, _ in pairs]
    if not shapes or () in shapes:
        raise ValueError(
            f"The encoder expects arrays with the data along the leading axis, found shapes "
            f"{shapes}. Return such arrays from inputs=."
        )
    return _side_by_side(pairs, num_axes=1)


def flatten_elements(
    inputs: Any,
) -> tuple[
    FloatDtype[Array, "batch elements k"],
    Bool[Array, "batch elements k"],
    Bool[Array, "batch elements"],
]:
    """Flatten arrays ``(batch, elements, ...)``, or with times for elements, element by element.

    Args:
        inputs: an array, or a pytree of arrays, any of them `Masked`. Masks are values too, but for
            the mask ``(batch, elements)`` of a lone array, which says no more than the last result.

    Returns:
        The values of each element side by side; where in them there is one; and which elements
        have any.

    Raises:
        ValueError: if the arrays are not alike in two leading axes, or there are `Segments`.
    """
    pairs = [_with_mask(leaf) for leaf in _leaves(inputs)]
    shapes = [array.shape for pair in pairs for array, _ in pair]
    if len({shape[:2] for shape in shapes}) != 1 or len(shapes[0]) < 2:
        raise ValueError(
            "The encoder expects arrays (masks too) of shape (batch, elements, k) or (batch, "
            f"elements), or with times for elements, alike in these axes. Found shapes {shapes}."
        )
    _, there = _side_by_side([pair[0] for pair in pairs], num_axes=2)
    present = there.any(axis=-1)
    if len(pairs) == 1 and len(shapes[-1]) == 2:
        pairs = [pairs[0][:1]]
    return *_side_by_side([part for pair in pairs for part in pair], num_axes=2), present


def refuse_segments(inputs: Any, who: str) -> None:
    """Raise a ValueError if there are ragged groups among the inputs of ``who``."""
    leaves = jax.tree.leaves(inputs, is_leaf=lambda leaf: isinstance(leaf, Segments))
    if any(isinstance(leaf, Segments) for leaf in leaves):
        raise ValueError(
            f"{who} cannot read Segments, groups of unequal size. Use SetEncoder, or, where they "
            "are one of several inputs, Fusion with a SetEncoder for them."
        )


def _leaves(inputs: Any) -> list[Any]:
    refuse_segments(inputs, "This encoder")
    return jax.tree.leaves(inputs, is_leaf=lambda leaf: isinstance(leaf, Masked))


def _with_mask(leaf: Any) -> list[tuple[Array, Array]]:
    """The arrays that a leaf contributes, each with where it has values."""
    if isinstance(leaf, Masked):
        mask = jnp.asarray(leaf.mask)
        return [(leaf.filled(), leaf.broadcast_mask()), (mask, jnp.ones_like(mask))]
    values = jnp.asarray(leaf)
    return [(values, jnp.ones(values.shape, bool))]


def _side_by_side(pairs: list[tuple[Array, Array]], num_axes: int) -> tuple[Array, Array]:
    """Concatenate arrays along what is left when the leading axes are kept; the masks likewise."""
    dtypes = [values.dtype for values, _ in pairs if jnp.issubdtype(values.dtype, jnp.inexact)]
    dtype = jnp.result_type(float, *dtypes)
    flat = [[array.reshape(*array.shape[:num_axes], -1) for array in pair] for pair in pairs]
    values = jnp.concatenate([values.astype(dtype) for values, _ in flat], axis=-1)
    return values, jnp.concatenate([mask for _, mask in flat], axis=-1)


class Standardize(nnx.Module):
    """Puts data on the scale of the first that were seen: ``(inputs - loc) / scale`` by feature.

    ``loc`` is the mean, and ``scale`` the standard deviation, or a fifth of the largest distance
    from the mean if this is more: no value of the example is further than 5 from 0, be it a pixel
    that is rarely on. A feature that is constant in the example keeps scale 1, and what it turns
    out to be later is kept between -5 and 5. One row has no scale, and changes nothing.

    What is kept are parameters, so that they travel wherever ``params`` goes, but they receive no
    gradient. An optimizer that decays weights shrinks the outputs with them, and no more.

    Args:
        example: a batch of data.
        axis: the axes over which the statistics are taken: 0 for one value per feature,
            ``(0, 1, 2)`` for one value per channel of images.
        where: where the example has values; the statistics are taken over these.

    Example:
        >>> standardize = Standardize(jnp.array([[0.0, 10.0], [2.0, 30.0]]))
        >>> standardize(jnp.array([[1.0, 40.0]]))
        Array([[0., 2.]], dtype=float32)
    """

    def __init__(
        self,
        example: Num[Array, "batch ..."],
        *,
        axis: int | tuple[int, ...] = 0,
        where: Bool[Array, "batch ..."] | None = None,
    ):
        if jnp.iscomplexobj(example):
            raise TypeError(
                "The encoder is given complex values, and reads real ones. Say what it reads with "
                "inputs=, such as lambda x: jnp.concatenate([x.real, x.imag], -1)."
            )
        example = jnp.asarray(example, jnp.result_type(float))
        where = jnp.ones(example.shape, bool) if where is None else where
        where = where | ~where.any(axis, keepdims=True)  # of no values, what fills them counts
        loc = jnp.mean(example, axis, where=where, keepdims=True)
        distance = jnp.abs(jnp.where(where, example - loc, 0.0))
        largest = distance.max(axis, keepdims=True, initial=0.0)
        constant = largest == 0
        largest = jnp.where(constant, 1.0, largest)
        # Of distances in units of the largest, as squares of large numbers overflow.
        spread = jnp.sqrt(jnp.mean(jnp.square(distance / largest), axis, where=where))
        scale = largest.reshape(spread.shape) * jnp.maximum(spread, 1 / FURTHEST)
        is_alone = example.size <= spread.size
        constant = constant.reshape(spread.shape) & (not is_alone)
        scale = jnp.where(constant | is_alone, 1.0, scale)
        loc = jnp.where(is_alone, 0.0, loc.reshape(spread.shape))
        self.factor, self.shift = nnx.Param(1 / scale), nnx.Param(loc / scale)
        self.constant = nnx.Param(constant.astype(scale.dtype))

    def __call__(
        self,
        inputs: Num[Array, "batch ..."],
        *,
        where: Bool[Array, "batch ..."] | None = None,
    ) -> FloatDtype[Array, "batch ..."]:
        """Return the inputs on the example's scale, in the same shape; zero if not ``where``."""
        held = (self.factor[...], self.shift[...], self.constant[...])
        factor, shift, constant = jax.lax.stop_gradient(held)
        bound = jnp.where(constant > 0, FURTHEST, jnp.inf)
        outputs = jnp.clip(inputs * factor - shift, -bound, bound)
        return outputs if where is None else jnp.where(where, outputs, 0)


def scaled(
    rows: FloatDtype[Array, "*batch k"],
    there: Bool[Array, "*batch k"],
    num_inputs: int,
    standardize: Standardize | None,
) -> FloatDtype[Array, "*batch k"]:
    """Return the rows on the scale of the example; an error if they have another length."""
    if rows.shape[-1] != num_inputs:
        raise ValueError(
            f"The encoder was built for data of {num_inputs} values each, found "
            f"{rows.shape[-1]}. Pass data of the shape it was trained on."
        )
    return rows if standardize is None else standardize(rows, where=there)


def shorten(features: FloatDtype[Array, "*batch k"]) -> FloatDtype[Array, "*batch k"]:
    """Return features of the norm ``asinh(norm)``: the same if short, logarithmic if long.

    A step of Adam moves every weight by the learning rate, so that the longer the features of a
    datum, the further its latents move: those of an outlier go far enough in the first steps, to
    rates of exp(20), to fill Adam's second moments for thousands of steps.

    Example:
        >>> norms = jnp.linalg.norm(shorten(jnp.array([[0.03, 0.04], [3e4, 4e4]])), axis=-1)
        >>> [f"{norm:.2f}" for norm in norms]
        ['0.05', '11.51']
    """
    # Of features in units of the largest, as squares of large numbers overflow.
    largest = jax.lax.stop_gradient(jnp.maximum(1, jnp.abs(features).max(-1, keepdims=True)))
    square = jnp.square(features / largest).sum(-1, keepdims=True)
    norm = largest * jnp.sqrt(square + 1e-12)  # which has a gradient at 0 too
    return features * (jnp.arcsinh(norm) / norm)


def dense_layers(
    num_inputs: int, sizes: Sequence[int], *, name: str = "hidden_sizes", rngs: nnx.Rngs
) -> Sequence[nnx.Linear]:
    """Return dense layers of these widths; an error naming the option if they are no widths."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name} must be sizes of at least 1, found {sizes}.")
    return nnx.List(
        nnx.Linear(fan_in, fan_out, rngs=rngs)
        for fan_in, fan_out in itertools.pairwise((num_inputs, *sizes))
    )
