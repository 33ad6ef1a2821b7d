"""Compiled functions that any number of threads may call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from numpyro_vae.numpyro_internals import HANDLERS


class Compiled:
    """A compiled function whose model is run in one thread at a time.

    JAX traces a function, and so runs its Python, when it is first called with arguments of these
    shapes and types. Later calls do not wait for each other.

    Args:
        fn: the function.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = jax.jit(fn)
        self._traced: set[Any] = set()

    def __call__(self, *args: Any) -> Any:
        """Call the function with arrays, or pytrees of them."""
        leaves, treedef = jax.tree.flatten(args)
        signature = (treedef, *map(jax.typeof, leaves))
        if signature in self._traced:
            return self._fn(*args)
        with HANDLERS:
            found = self._fn(*args)
        self._traced.add(signature)
        return found

    def shapes(self, *args: Any) -> Any:
        """Return the shapes of what it returns, for which nothing is computed."""
        with HANDLERS:
            return jax.eval_shape(self._fn, *args)
