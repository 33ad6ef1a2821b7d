"""The functions that a runner compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_vae.data.batch import Batch
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.inference.encoded import EncodedBatch, Trained
from numpyro_vae.inference.natural import Stepped, take_steps, with_steps

Quantity = Callable[..., Any]


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
    trained: Trained,
    batch: Batch,
    stepped: Stepped | None = None,
) -> EncodedBatch:
    """Return what is said of a batch: by the guide, and by steps of its rows.

    Args:
        guide: the guide.
        static_kwargs: keyword arguments of the model that are the same in every call.
        trained: what rows are encoded with.
        batch: the rows.
        stepped: what their steps came to; by default they are taken here.
    """
    found = EncodedBatch.encode(guide, trained, batch, static_kwargs)
    if trained.natural_steps and stepped is None:
        stepped = take_steps(found, trained.globals_, num_steps=trained.natural_steps)
    return found if stepped is None else with_steps(found, stepped)


def encoded_alike(known: EncodedBatch, batch: Batch) -> EncodedBatch:
    """Return what is said of other rows of the data of a batch."""
    _, given = batch.arguments()
    static = {name: value for name, value in known.kwargs.items() if name not in given}
    return encoded(known.guide, static, known.trained, batch)


def of_batch(
    encode: Callable,
    quantity: Quantity,
    trained: Trained,
    batch: Batch,
    stepped: Stepped | None,
    *args: Any,
) -> Any:
    """Return a quantity of a batch of rows."""
    return quantity(encode(trained, batch, stepped), *args)


def of_rows(
    encode: Callable,
    quantity: Quantity,
    trained: Trained,
    batch: Batch,
    stepped: Stepped | None,
    rows: Array,
    by_row: Any,
    *args: Any,
) -> Any:
    """Return a quantity of rows one by one, given what belongs to each.

    Data that the model takes whole have the steps of all rows, and else they are by row.
    """
    is_cut = batch.cuts or batch.fills_plate  # else the model takes the data whole

    def one(row: Array, of_row: Any, mine: Stepped | None) -> Any:
        if not is_cut:
            return quantity(encode(trained, batch, stepped), row, of_row, *args)
        mine = jax.tree.map(lambda x: x[None], mine)
        alone = encode(trained, batch.at(row[None]), mine)
        return quantity(alone, jnp.zeros_like(row), of_row, *args)

    return jax.vmap(one)(rows, by_row, stepped if is_cut else None)
