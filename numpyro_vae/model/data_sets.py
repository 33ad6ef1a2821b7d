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
from numpyro_vae.data.nested import Nested
from numpyro_vae.data.ragged import Masked
from numpyro_vae.encoders import MLP, NestedSetEncoder, SetEncoder
from numpyro_vae.model.data_set import DataSet
from numpyro_vae.model.exchangeable import is_exchangeable
from numpyro_vae.model.levels import Padding, axes_of, nested_inputs, nested_plates
from numpyro_vae.model.one_set import likes, plates_of
from numpyro_vae.model.trace import NEEDS_VALUES, Model
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
            sizes: by plate of the model, how many of its rows each data set has, ``(num_sets,)``;
                of a plate within another one also how many each row of that has, ``(num_sets,
                rows)``. The other rows are padding, and count for nothing.
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
        given. Where latents lie in a plate, or in plates within each other, a data set is a set of
        sets, `Nested`. Otherwise arrays are laid side by side by the encoder.

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
        found = self._read(args, kwargs, lengths)
        padding = Padding(found.plates, lengths)
        plate = found.set_plate()
        levels = nested_plates(found.sites, {name: x.ndim for name, x in lengths.items()})
        levels = levels if plate is None else (plate,)
        leaves, axes, treedef, _ = arguments
        plates = {name: found.plates[name] for name in levels}
        if not levels or not is_exchangeable(self.model, treedef, leaves, axes, plates):
            return (*(_masked(x, padding) for x in arrays), *lengths.values())
        if plate is not None:
            return _elements(arrays, found.plates[plate], padding.mask({plate: 0}, 1))
        return nested_inputs(arrays, levels, self._names(found, levels), padding)

    def _read(self, args: tuple, kwargs: dict[str, Any], lengths: Mapping[str, Array]) -> DataSet:
        """Return what has met the sites of the model, of which nothing is computed."""
        found: list[DataSet] = []
        draw = handlers.substitute(substitute_fn=draw_improper)
        with handlers.block(), handlers.seed(rng_seed=0), draw:
            jax.eval_shape(lambda: found.append(self._run(args, kwargs, lengths)))
        return found[0]

    def _names(self, found: DataSet, levels: tuple[str, ...]) -> tuple[str | None, ...]:
        """Return the name of each level that has latents of its own, the whole first."""
        latent = [set(names) & set(levels) for is_observed, names in found.sites if not is_observed]
        depths = {len(names) for names in latent}
        return tuple(
            name if depth in depths else None for depth, name in enumerate((self.plate, *levels))
        )

    def encoder(self, example_inputs: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """Return the encoder that a guide has by default: one of what `inputs` returns."""
        if isinstance(example_inputs, Nested):
            return NestedSetEncoder(example_inputs, rngs=rngs)
        is_set = not isinstance(example_inputs, tuple)
        return (SetEncoder if is_set else MLP)(example_inputs, rngs=rngs)

    def sizes(
        self, *args: Any, sizes: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, tuple[int, int]]:
        """Return by plate the least and the largest number of rows that data sets have of it.

        Args:
            args: the model's arguments, with an axis of data sets.
            sizes: see `__call__`.
            kwargs: the model's keyword arguments.
        """
        leaves, axes, treedef, num_sets = self._arguments(args, kwargs)
        plates = plates_of(self.model, treedef, likes(leaves, axes))
        lengths = {name: np.asarray(x) for name, x in _lengths(sizes or {}, num_sets).items()}
        found = {name: (size, size) for name, size in plates.items()}
        for name, length in lengths.items():
            known = length[_of_rows(length, lengths, plates)]
            if name in plates and known.size:
                found[name] = (int(known.min()), int(known.max()))
        return found

    def require_seen(
        self, seen: Mapping[str, tuple[int, int]], args: tuple, kwargs: Mapping[str, Any]
    ) -> None:
        """Raise if data sets have other numbers of rows than those that a guide was trained on.

        Args:
            seen: what `sizes` returned for those.
            args: the model's arguments.
            kwargs: its keyword arguments.

        Raises:
            ValueError: naming the plate and the numbers.
        """
        for name, (least, most) in self.sizes(*args, **kwargs).items():
            low, high = seen.get(name, (least, most))
            if least < low or most > high:
                raise ValueError(
                    f"There are data sets with {least if least < low else most} rows of plate "
                    f"{name!r}; the guide was trained on data sets with {low} to {high}, and knows "
                    "nothing of others. Train it on such sizes too, with Simulations(like=...) "
                    "that have them."
                )

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list, list, Any, int]:
        """Return the leaves of the arguments, their axes of data sets, structure, and number."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        data = args or kwargs
        try:
            num_sets = count_rows(data, self.batch_axes)
        except ValueError as error:
            raise ValueError(
                f"{error} Arrays hold all data sets along one axis: pad those of other shapes to "
                "the largest, and say with sizes= how many rows each has."
            ) from None
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

        try:
            jax.vmap(one_set, in_axes=(0, 0, axes))(jnp.arange(num_sets), lengths, leaves)
        except NEEDS_VALUES as error:
            raise ValueError(
                "The model asks for the values of its arguments, as a plate of a length that is a "
                "value does, and all data sets run at once. Take lengths from the shapes of "
                "arrays, and say with sizes= how many rows each data set has."
            ) from error
        except TypeError as error:
            numbers = [x for x, axis in zip(leaves, axes, strict=True) if axis is not None]
            if any(np.ndim(x) == 1 for x in numbers):
                error.add_note(
                    "data_sets gives the model one data set, which is a number where an array has "
                    "one axis. Data of one data set are x[None]."
                )
            raise
        found[0].check_lengths()
        _check_range(lengths, found[0].plates)
        return found[0]


def _of_rows(
    length: np.ndarray, lengths: Mapping[str, np.ndarray], plates: Mapping[str, int]
) -> np.ndarray:
    """Return which lengths are those of rows of the plate around that are no padding."""
    rows = length.shape[-1]
    around = [x for name, x in lengths.items() if plates.get(name) == rows and x.ndim == 1]
    if length.ndim == 1 or len(around) != 1:
        return np.ones(length.shape, bool)
    return np.arange(rows) < around[0][:, None]


def _check_range(lengths: Mapping[str, Array], plates: Mapping[str, int]) -> None:
    """Raise if a data set has more rows than its arrays, where numbers are known."""
    for name, size in lengths.items():
        if isinstance(size, Tracer):
            continue
        known = np.asarray(size)
        wrong = np.argwhere((known < 0) | (known > plates[name]))
        if len(wrong):
            raise ValueError(
                f"sizes= gives data set {wrong[0][0]} {known[tuple(wrong[0])]} rows of plate "
                f"{name!r}, which has {plates[name]} rows. Pad arrays to the largest data set."
            )


def _masked(x: Array, padding: Padding) -> Any:
    """Return an array, with a mask if some of it is padding."""
    axes = axes_of(x.shape[1:], padding.known)
    mask = padding.mask(axes, max(axes.values(), default=-1) + 1)
    return x if mask is None else Masked(x, mask)


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
        is_integer = jnp.issubdtype(size.dtype, jnp.integer)
        if size.shape[:1] != (num_sets,) or size.ndim > 2 or not is_integer:
            raise ValueError(
                f"sizes={{{name!r}: ...}} has shape {size.shape} and type {size.dtype}, expected "
                f"an integer for each of {num_sets} data sets: how many rows of plate {name!r} it "
                "has; or for each data set one for each row of the plate around."
            )
    return lengths
