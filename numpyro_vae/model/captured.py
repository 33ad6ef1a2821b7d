"""What a function reads beside its arguments, so that nothing compiled outlives a change of it."""

from __future__ import annotations

import dis
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from flax import nnx
from numpyro.primitives import Messenger

LIBRARIES = ("stdlib", "platstdlib", "purelib", "platlib")
INSTALLED = tuple(sysconfig.get_path(name) for name in LIBRARIES)
INSTALLED += (str(Path(__file__).parents[1]),)  # the folders of code that does not change
CALLED = (FunctionType, partial, MethodType, Messenger)
LARGE = 2**24  # bytes of an array that is not read, as it may be on disk
PLAIN = (bool, int, float, complex, str, bytes, type(None))
READS_GLOBALS, WRITES_ITEMS = {"LOAD_GLOBAL", "LOAD_NAME"}, {"STORE_SUBSCR", "DELETE_SUBSCR"}
WRITES_NAMES = {"STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"}


def captured(*functions: Any) -> tuple[Any, ...]:
    """Return what functions read from their closures, globals, defaults and objects, to compare.

    These are numbers, strings and arrays, also in tuples, dicts and attributes of objects, and
    what functions of the same module read in turn. Other objects count as themselves, and so do
    lists and large arrays. What a function writes itself, such as a count of its calls, is left
    out, and so are the globals of installed packages.

    Args:
        functions: functions, methods, partials, or objects that are called.

    Example:
        >>> noise = {"scale": 1.0}
        >>> def model(x):
        ...     return noise["scale"] * x
        >>> before = captured(model)
        >>> noise["scale"] = 2.0
        >>> captured(model) == before
        False
    """
    seen: set[int] = set()
    return tuple(found for fn in functions for found in _of_callable(fn, seen))


def signature(value: Any) -> Any:
    """Return what tells a value from others, and from itself once it was changed in place.

    Args:
        value: anything; arrays and plain values count by what they hold, others by their hash.
    """
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, np.ndarray | np.generic) and _is_read(value):
        held = hashlib.blake2b(value.tobytes(), digest_size=16).digest()
        return value.dtype, value.shape, held
    if isinstance(value, nnx.Module):
        return nnx.graphdef(value)  # in which the mode of its layers is
    if type(value) is tuple:
        return tuple(map(signature, value))
    if type(value) is dict:
        return tuple((name, signature(held)) for name, held in value.items())
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


@dataclass(frozen=True, eq=False)
class _Same:
    """An object without a hash, which equals itself alone and is kept alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_read(value: np.ndarray | np.generic) -> bool:
    return value.nbytes <= LARGE and not value.dtype.hasobject


def _of_callable(fn: Any, seen: set[int]) -> Iterator[Any]:
    """Yield what a callable reads, unless it was seen."""
    if id(fn) in seen:
        return
    seen.add(id(fn))
    if isinstance(fn, FunctionType):
        yield from _of_function(fn, seen)
    elif isinstance(fn, partial):
        yield from _of_callable(fn.func, seen)
        yield from map(signature, (fn.args, fn.keywords))
    elif isinstance(fn, MethodType):
        yield from _of_callable(fn.__func__, seen)
        yield from _of_object(fn.__self__, _written(fn.__func__), seen)
    elif not isinstance(fn, type):
        call = vars(type(fn)).get("__call__")
        if isinstance(call, FunctionType):
            yield from _of_callable(call, seen)
        yield from _of_object(fn, _written(call), seen)


def _of_function(fn: FunctionType, seen: set[int]) -> Iterator[Any]:
    """Yield what a function reads: globals, its closure, and defaults."""
    read, written, writes_items = _names(fn.__code__)
    read = () if fn.__code__.co_filename.startswith(INSTALLED) else read
    own = {name: fn.__globals__[name] for name in read if name in fn.__globals__}
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    held = own | {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    for name, value in held.items():
        if name in written or (writes_items and isinstance(value, dict)):
            continue
        foreign = (
            name in own and getattr(value, "__globals__", fn.__globals__) is not fn.__globals__
        )
        yield name, signature(value)
        if isinstance(value, CALLED) and not foreign:
            yield from _of_callable(value, seen)
        else:
            yield from _of_object(value, written, seen)
    yield from map(signature, (fn.__defaults__, fn.__kwdefaults__))


def _of_object(value: Any, written: frozenset[str], seen: set[int]) -> Iterator[Any]:
    """Yield the plain values, arrays and functions among the attributes of an object."""
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return
    for name, held in vars(value).items():
        if isinstance(held, CALLED):
            yield from _of_callable(held, seen)
        elif isinstance(held, (*PLAIN, np.ndarray, np.generic, nnx.Module)) and name not in written:
            yield name, signature(held)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that has no value yet
        return False


def _written(fn: Any) -> frozenset[str]:
    """Return the names that a function writes."""
    return _names(fn.__code__)[1] if isinstance(fn, FunctionType) else frozenset()


@lru_cache
def _names(code: CodeType) -> tuple[tuple[str, ...], frozenset[str], bool]:
    """Return the global names that code reads, the names it writes, and whether it writes items."""
    steps = list(dis.get_instructions(code))
    read = dict.fromkeys(step.argval for step in steps if step.opname in READS_GLOBALS)
    written = {step.argval for step in steps if step.opname in WRITES_NAMES}
    writes_items = any(step.opname in WRITES_ITEMS for step in steps)
    for inner in (held for held in code.co_consts if isinstance(held, CodeType)):
        names = _names(inner)
        read |= dict.fromkeys(names[0])
        written |= names[1]
        writes_items |= names[2]
    return tuple(read), frozenset(written), writes_items
