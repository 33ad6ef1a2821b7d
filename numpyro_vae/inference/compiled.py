"""Compiled functions that any number of threads may call."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from numpyro_vae.data.whole_numbers import telling_of_floats
from numpyro_vae.numpyro_internals import HANDLERS

LEVEL = "xla_backend_optimization_level"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function that a program names


def options() -> dict[str, int] | None:
    """Return what to tell XLA: on a CPU, to compile these programs at level 2.

    They run as fast as at its level 3, and compile in half the time, of which most first calls
    consist. A level in the environment's ``XLA_FLAGS`` is kept.
    """
    chosen = LEVEL in os.environ.get("XLA_FLAGS", "")
    return None if chosen or jax.default_backend() != "cpu" else {LEVEL: 2}


class Compiled:
    """A compiled function whose model is run in one thread at a time.

    JAX runs the function's Python when it is first called with arguments of these shapes. A call
    returns before the results are there, so that threads wait for each other's compiling, and not
    for each other's results.

    Args:
        fn: the function.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = jax.jit(telling_of_floats(fn), compiler_options=options())

    def __call__(self, *args: Any) -> Any:
        """Call the function with arrays, or pytrees of them."""
        with HANDLERS:
            return self._fn(*args)

    def program(self, *args: Any) -> tuple[str, Any]:
        """Return what is computed, as text, and for each array of the arguments whether it is used.

        Args:
            args: arrays, or their shapes.
        """
        with HANDLERS:
            jaxpr = self._fn.trace(*args).jaxpr.jaxpr
        needed, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        text = ADDRESS.sub("", str(needed))
        return text, jax.tree.unflatten(jax.tree.structure(args), used)

    def shapes(self, *args: Any) -> Any:
        """Return the shapes of what it returns, for which nothing is computed."""
        with HANDLERS:
            return self._fn.eval_shape(*args)
