"""Arrays of any kind as those that safetensors knows, and back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.families.multivariate_normal import gain
from numpyro_vae.saving.codec import Json

KINDS = "biuf"  # of dtypes; others, such as bfloat16, are stored as bytes


def store(arrays: dict[str, np.ndarray], value: Any, path: str) -> Json:
    """Put an array among others by its path, and return what else there is to know of it.

    Args:
        arrays: those that are stored already.
        value: the array, of numbers or of random keys.
        path: its name.
    """
    known: dict[str, Any] = {"name": path}
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        known["random_keys"] = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    array = np.asarray(value).copy(order="C")
    known |= {"dtype": array.dtype.name, "shape": list(array.shape)}
    is_number = array.dtype.kind in KINDS
    arrays[path] = array if is_number else np.frombuffer(array.tobytes(), np.uint8)
    return known


def upgrade(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return arrays of format 1 as those of format 2, of networks that compute the same.

    In format 1 a multivariate Normal's correlations were features times ``lower.kernel``; now the
    features are multiplied by a gain first, which is 1 for most.
    """
    found = dict(arrays)
    for name, array in arrays.items():
        if name.endswith("['lower']['kernel']"):
            num_features, entries = array.shape
            found[name] = array / array.dtype.type(gain(num_features, _size(entries)))
    return found


def _size(entries: int) -> int:
    """Return the rows of a matrix with so many entries below the diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def restore(arrays: dict[str, np.ndarray], known: Json) -> Array:
    """Return an array as it was stored.

    Raises:
        ValueError: if it is not there in this form, or has values of a precision that JAX has been
            told not to use.
    """
    array, dtype = arrays[known["name"]], jnp.dtype(known["dtype"])
    if dtype.kind not in KINDS:
        array = np.frombuffer(array.tobytes(), dtype).reshape(known["shape"])
    if array.dtype != dtype or list(array.shape) != known["shape"]:
        raise ValueError(f"{known['name']} is not of the shape and type that the manifest says")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{known['name']} has values of type {dtype}, and JAX is set to fewer digits. Call "
            "numpyro.enable_x64() before anything else, as the posterior was trained so."
        )
    found = jnp.asarray(array)
    if "random_keys" in known:
        return jax.random.wrap_key_data(found, impl=known["random_keys"])
    return found
