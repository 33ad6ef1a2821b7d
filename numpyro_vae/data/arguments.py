"""What users hand over beside data: random keys, and numbers of things."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def require_known(value: Any, name: str) -> None:
    """Raise if a value is not known yet, as inside of functions that JAX transforms.

    Raises:
        TypeError: if it is a tracer.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} is traced by jax.jit, vmap, grad or the like, and has no values yet. Training "
            "and the methods of a posterior compile themselves, and return NumPy arrays: call them "
            "outside of such functions; see Posterior.export for programs that JAX can call."
        )


def require_key(rng_key: Any) -> None:
    """Raise unless this is a random key, typed or of the old kind.

    Raises:
        TypeError: if it is something else, such as a seed, or the data in the key's place.
    """
    require_known(rng_key, "rng_key")
    if is_typed_key(rng_key) and rng_key.shape == ():
        return
    found = f"the {type(rng_key).__name__} {rng_key!r}"
    if hasattr(rng_key, "shape"):
        shape, dtype = rng_key.shape, rng_key.dtype
        if dtype == jnp.uint32 and len(shape) == 1:
            return
        found = f"an array of shape {shape} and type {dtype}"
    raise TypeError(
        f"rng_key is {found}, expected one random key. Pass jax.random.key(0), before the data."
    )


def is_typed_key(x: Any) -> bool:
    """Return whether these are keys as `jax.random.key` makes them."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def require_whole(name: str, value: Any) -> None:
    """Raise unless this is an int of at least 1, as shapes are made of.

    Raises:
        ValueError: if it is anything else, such as 100.0.

    Example:
        >>> require_whole("num_samples", 5)
    """
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected at least 1, and an int.")


def require_count(name: str, value: Any, least: int = 1) -> int:
    """Return a number of things as an int.

    Raises:
        ValueError: if it is no whole number, or too small.

    Example:
        >>> require_count("num_epochs", 5.0)
        5
    """
    try:
        if value == int(value) and value >= least:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}, expected at least {least}, and a whole number.")
