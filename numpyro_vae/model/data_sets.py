"""A model of one data set as a model of many, in a plate of data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.data.arrays import count_rows, datum_axes
from numpyro_vae.data.ragged import Masked
from numpyro_vae.encoders import MLP, SetEncoder
from numpyro_vae.model.data_set import DataSet
from numpyro_vae.model.trace import Model
from numpyro_vae.numpyro_internals import draw_improper

__all__ = ["data_sets"]


def data_sets(model: Model, *, batch_axes: Any = 0, plate: str = "data_sets") -> DataSets:
    r"""Turn a model of one data set into a model of many, which are independent of each other.

    Each site of the model becomes one site in a plate of data sets, with all that it is in a data
    set as its event, so that the density is the sum of those of all data sets,

    .. math:: \log p(x_{1:n}, z_{1:n}) = \sum_i \log p(x_i, z_i).

    The model runs once, under `jax.vmap`. A guide of what is returned amortizes over data sets: its
    encoder reads a whole data set, and all latents of the model are those of a row.

    Args:
        model: a NumPyro model of one data set, with plates or without, that calls neither ``scan``
            nor networks with mutable state; its parameters are shared by all data sets.
        batch_axes: the axis of data sets of each array, as in `fit`, to which it is passed too;
            None for an array that all data sets share.
        plate: the name of the plate of data sets.

    Reference:
        Cranmer, Brehmer and Louppe, *The frontier of simulation-based inference*, PNAS 2020.

    Example:
        >>> import numpyro.distributions as dist
        >>> def model(y):  # of one data set
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("observation", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> with handlers.seed(rng_seed=0), handlers.trace() as trace:
        ...     data_sets(model)(np.zeros((100, 8)))
        >>> trace["mu"]["fn"].shape(), trace["y"]["fn"].shape()
        ((100,), (100, 8))
    """
    return DataSets(model, batch_axes, plate)


@dataclass(frozen=True)
class DataSets:
    """A model of many data sets, made by `data_sets` of a model of one."""

    model: Model
    batch_axes: Any = 0
    plate: str = "data_sets"

    def __call__(self, *args: Any, sizes: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Run the model on all data sets.

        Args:
            args: the model's arguments, with an axis of data sets.
            sizes: by plate of the model, how many of its rows each data set has; the other rows
                are padding, and count for nothing.
            kwargs: the model's keyword arguments. Beside positional data they are the same for all
                data sets.

        Raises:
            ValueError: if the arguments have no data sets, or disagree on their number; if sizes
                are not one for each, or of no plate; or if the model has what has no place in a
                data set.
        """
        self._run(args, kwargs, sizes or {})

    def inputs(self, *args: Any, sizes: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Return what a guide's encoder reads by default: all arguments that have data sets.

        Where all observations lie in one plate of the model, and no latent does, they are a set,
        and what each of its elements has is ``(num_sets, elements, k)``, `Masked` if sizes are
        given. Otherwise arrays are laid side by side by the encoder, as latents of the elements
        are to be told apart.

        Args:
            args: the model's arguments, with an axis of data sets.
            sizes: see `__call__`.
            kwargs: the model's keyword arguments.
        """
        arguments = self._arguments(args, kwargs)
        arrays = [
            jnp.moveaxis(x, axis, 0)
            for x, axis in zip(*arguments[:2], strict=True)
            if axis is not None
        ]
        lengths = _lengths(sizes or {}, len(arrays[0]))
        found: list[DataSet] = []
        draw = handlers.substitute(substitute_fn=draw_improper)
        with handlers.block(), handlers.seed(rng_seed=0), draw:
            jax.eval_shape(lambda: found.append(self._run(args, kwargs, lengths)))
        plates = found[0].plates
        count = found[0].set_size()
        if count is not None:
            return _elements(arrays, count, _mask(plates, lengths, (count,)))
        masks = [_mask(plates, lengths, x.shape[1:]) for x in arrays]
        pairs = zip(arrays, masks, strict=True)
        values = [x if mask is None else Masked(x, mask) for x, mask in pairs]
        return (*values, *lengths.values())

    def encoder(self, example_inputs: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """Return the encoder that a guide has by default: a set encoder of sets, else an MLP."""
        is_set = not isinstance(example_inputs, tuple)
        return (SetEncoder if is_set else MLP)(example_inputs, rngs=rngs)

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list, list, Any, int]:
        """Return the leaves of the arguments, their axes of data sets, structure, and number."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        data = args or kwargs
        num_sets = count_rows(data, self.batch_axes)
        axes = datum_axes(self.batch_axes, data)
        return leaves, axes + [None] * (len(leaves) - len(axes)), treedef, num_sets

    def _run(self, args: tuple, kwargs: dict[str, Any], sizes: Mapping[str, Any]) -> DataSet:
        """Run the model, and return what has met its sites."""
        leaves, axes, treedef, num_sets = self._arguments(args, kwargs)
        lengths, found = _lengths(sizes, num_sets), []
        plate = numpyro.plate(self.plate, num_sets)

        def one_set(number: Array, lengths: dict[str, Array], leaves: list[Any]) -> None:
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            found.append(DataSet(plate, number, lengths))
            with found[0]:
                self.model(*args, **kwargs)

        jax.vmap(one_set, in_axes=(0, 0, axes))(jnp.arange(num_sets), lengths, leaves)
        found[0].check_lengths()
        _check_range(lengths, found[0].plates)
        return found[0]


def _check_range(lengths: Mapping[str, Array], plates: Mapping[str, int]) -> None:
    """Raise if a data set has more rows than its arrays, where numbers are known."""
    for name, size in lengths.items():
        if isinstance(size, Tracer):
            continue
        known = np.asarray(size)
        wrong = np.flatnonzero((known < 0) | (known > plates[name]))
        if wrong.size:
            raise ValueError(
                f"sizes= gives data set {wrong[0]} {known[wrong[0]]} rows of plate {name!r}, which "
                f"has {plates[name]} rows. Pad arrays to the largest data set."
            )


def _mask(
    plates: Mapping[str, int], lengths: Mapping[str, Array], shape: tuple[int, ...]
) -> Array | None:
    """Return where an array of a data set is no padding; None if it has none.

    Args:
        plates: the lengths of the model's plates.
        lengths: by plate, how many of its rows each data set has.
        shape: of the array in a data set.
    """
    masks = [
        (jnp.arange(plates[name]) < length[:, None], shape.index(plates[name]))
        for name, length in lengths.items()
        if plates[name] in shape
    ]
    if not masks:
        return None
    ndim = 1 + max(axis for _, axis in masks)
    spread = [
        mask.reshape(len(mask), *[1] * axis, -1, *[1] * (ndim - axis - 1)) for mask, axis in masks
    ]
    every = jnp.broadcast_shapes(*(mask.shape for mask in spread), (1, *shape[:ndim]))
    return jnp.broadcast_to(jnp.stack([jnp.broadcast_to(x, every) for x in spread]).all(0), every)


def _elements(arrays: list[Array], count: int, mask: Array | None) -> Any:
    """Return what each element of a data set has, and what all have in common beside it."""
    parts = []
    for x in arrays:
        rows = x.reshape(len(x), -1) if x.shape[1:2] != (count,) else x
        rows = rows[:, None] if rows is not x else x.reshape(len(x), count, -1)
        parts.append(jnp.broadcast_to(rows, (len(x), count, rows.shape[-1])))
    values = jnp.concatenate([x.astype(jnp.result_type(float)) for x in parts], axis=-1)
    return values if mask is None else Masked(values, mask)


def _lengths(sizes: Mapping[str, Any], num_sets: int) -> dict[str, Array]:
    lengths = {name: jnp.asarray(size) for name, size in sizes.items()}
    for name, size in lengths.items():
        if size.shape != (num_sets,) or not jnp.issubdtype(size.dtype, jnp.integer):
            raise ValueError(
                f"sizes={{{name!r}: ...}} has shape {size.shape} and type {size.dtype}, expected "
                f"an integer for each of {num_sets} data sets: how many rows of plate {name!r} it "
                "has."
            )
    return lengths
