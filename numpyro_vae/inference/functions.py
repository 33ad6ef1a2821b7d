"""The functions that a runner compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_vae.data.batch import Batch
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.natural import sharpen

Quantity = Callable[..., Any]


class Trained(NamedTuple):
    """What a compiled function is given beside the rows.

    Attributes:
        params: the trained parameters.
        globals_: draws of the global sites, for the rows' natural-gradient steps.
    """

    params: dict[str, Any]
    globals_: dict[str, Array]


def globals_key(rng_key: Array) -> Array:
    """Return the key of the draws of the global sites, which is of no row."""
    return jax.random.fold_in(rng_key, 2**32 - 1)


def draws_of_globals(
    draw: Callable[..., Any],
    static_kwargs: dict[str, Any],
    num_samples: int,
    params: dict[str, Any],
    batch: Batch,
    rng_key: Array,
) -> Any:
    """Return so many draws of the global sites, made by a method of the guide."""
    args, kwargs = batch.arguments()
    return draw(rng_key, params, (num_samples,), args, {**kwargs, **static_kwargs})


def encoded(
    guide: AbstractGuide,
    static_kwargs: dict[str, Any],
    natural_steps: int,
    trained: Trained,
    batch: Batch,
) -> EncodedBatch:
    """Return what the guide says of a batch, and its rows after so many steps."""
    found = EncodedBatch.encode(guide, trained.params, batch, static_kwargs)
    return sharpen(found, natural_steps, trained.globals_) if natural_steps else found


def of_batch(
    encode: Callable, quantity: Quantity, trained: Trained, batch: Batch, *args: Any
) -> Any:
    """Return a quantity of a batch of rows."""
    return quantity(encode(trained, batch), *args)


def of_rows(
    encode: Callable,
    quantity: Quantity,
    trained: Trained,
    batch: Batch,
    rows: Array,
    by_row: Any,
    *args: Any,
) -> Any:
    """Return a quantity of rows one by one, given what belongs to each."""
    is_cut = batch.cuts or batch.fills_plate  # else the model takes the data whole

    def one(row: Array, of_row: Any) -> Any:
        alone = batch.at(row[None]) if is_cut else batch
        place = jnp.zeros_like(row) if is_cut else row
        return quantity(encode(trained, alone), place, of_row, *args)

    return jax.vmap(one)(rows, by_row)
