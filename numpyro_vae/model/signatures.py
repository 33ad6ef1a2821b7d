"""A model's arguments by position and by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numpyro_vae.data.arrays import as_arguments

BY_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def in_form(data: Any, model: Callable[..., Any], *, by_position: bool) -> Any:
    """Return data as a tuple of positional arguments, or as a dict of them by name.

    Data of which the model does not say what they are in the other form stay as they are.

    Args:
        data: see `ArrayData.read`.
        model: the model whose arguments they are.
        by_position: which of the two.

    Example:
        >>> in_form({"y": 2, "x": 1}, lambda x, y, z=0: None, by_position=True)
        (1, 2)
        >>> in_form((1, 2), lambda x, y, z=0: None, by_position=False)
        {'x': 1, 'y': 2}
    """
    if by_position != isinstance(data, dict):
        return data
    args, kwargs = as_arguments(data)
    names = _names(model)[: len(args) + len(kwargs)]
    if by_position:
        return tuple(data[name] for name in names) if {*names} == {*kwargs} else data
    return dict(zip(names, args, strict=True)) if len(names) == len(args) else data


def call_with(
    fn: Callable[..., Any], model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Call a function with a model's arguments, by position if it has other names for them.

    Args:
        fn: the function.
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Example:
        >>> call_with(lambda a, b: (a, b), lambda x, y: None, (), {"y": 2, "x": 1})
        (1, 2)
    """
    try:
        inspect.signature(fn).bind(*args, **kwargs)
    except (TypeError, ValueError):  # ValueError of what has no signature
        data = in_form(kwargs, model, by_position=True)
        if not args and isinstance(data, tuple):
            return fn(*data)
    return fn(*args, **kwargs)


def _names(model: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a model takes by position and by name."""
    try:
        parameters = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):  # of what has no signature
        return []
    if any(x.kind is inspect.Parameter.POSITIONAL_ONLY for x in parameters):
        return []
    return [x.name for x in parameters if x.kind is BY_EITHER]
