"""Values as JSON, and back: what a manifest can hold, and nothing that runs code.

Plain values stand for themselves. All else is an object whose first key says what it is: ``list``,
``tuple``, ``dict``, ``items`` (of a dict with integer keys, which stay integers), ``name`` of what
`numpyro_vae.saving.registry` knows, ``partial`` of such, ``make`` for a dataclass of this library,
``array``, and ``float`` for those that JSON lacks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from numpyro_vae.saving.registry import KNOWN, name_of

Json = Any


class CannotStoreError(TypeError):
    """A value that a manifest cannot hold."""


class CannotRestoreError(ValueError):
    """JSON that stands for nothing that this version knows."""


def refuse(array: Any, path: str) -> Json:
    """Raise, as arrays have no place here."""
    raise CannotStoreError(f"{path or 'the value'} is an array")


def pack(value: Any, leaf: Callable[[Any, str], Json] = refuse, path: str = "") -> Json:
    """Return a value as JSON.

    Args:
        value: the value.
        leaf: from an array and its path to what is to be stored of it.
        path: of the value, for messages and for the names of arrays.

    Raises:
        CannotStoreError: naming the part that JSON cannot hold.

    Example:
        >>> pack((1, {0: "a"}))
        {'tuple': [1, {'items': [[0, 'a']]}]}
    """
    within = partial(pack, leaf=leaf)
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (list, tuple):
        parts = [within(part, path=f"{path}[{place}]") for place, part in enumerate(value)]
        return {type(value).__name__: parts}
    if type(value) is dict and all(type(key) in (int, str) for key in value):
        parts = {key: within(part, path=f"{path}[{key!r}]") for key, part in value.items()}
        if all(type(key) is str for key in value):
            return {"dict": parts}
        return {"items": [list(pair) for pair in parts.items()]}
    if isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return {"array": leaf(value, path)}
    if name := name_of(value):
        return {"name": name}
    if isinstance(value, partial):
        of, args, keywords = map(within, (value.func, value.args, value.keywords))
        return {"partial": of, "args": args, "with": keywords}
    if dataclasses.is_dataclass(value) and (name := name_of(type(value))):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"make": name, "with": within(fields, path=path)}
    raise CannotStoreError(f"{path or 'the value'} is {told(value)}")


def unpack(packed: Json, leaf: Callable[[Json], Any] | None = None) -> Any:
    """Return the value that `pack` made JSON of.

    Args:
        packed: the JSON.
        leaf: from what is stored of an array to the array.

    Raises:
        CannotRestoreError: if it is no such JSON, or refers to what this version does not know.
    """
    within = partial(unpack, leaf=leaf)
    match packed:
        case None | bool() | int() | float() | str():
            return packed
        case {"float": text}:
            return float(text)
        case {"list": [*parts]}:
            return [within(part) for part in parts]
        case {"tuple": [*parts]}:
            return tuple(within(part) for part in parts)
        case {"dict": {**parts}}:
            return {name: within(part) for name, part in parts.items()}
        case {"items": [*pairs]}:
            return {key: within(part) for key, part in pairs}
        case {"array": known} if leaf is not None:
            return leaf(known)
        case {"name": str(name)} if name in KNOWN:
            return KNOWN[name]
        case {"partial": of, "args": args, "with": keywords}:
            return partial(within(of), *within(args), **within(keywords))
        case {"make": str(name), "with": {"dict": {**fields}}} if name in KNOWN:
            if dataclasses.is_dataclass(KNOWN[name]):  # which runs no more than its own checks
                return KNOWN[name](**{field: within(part) for field, part in fields.items()})
    raise CannotRestoreError(f"it refers to {packed!r}, which this version does not know")


def told(value: Any) -> str:
    """Return what to call a value in a message.

    Example:
        >>> told(len), told(np.random.default_rng(0))
        ('builtins.len', 'an object of type numpy.random._generator.Generator')
    """
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"an object of type {type(value).__module__}.{type(value).__qualname__}"
