"""How large the arrays are that a function computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Var, jaxpr_as_fun
from jax.interpreters import partial_eval

from numpyro_vae.model.provenance import inner_jaxprs


def measured(fn: Callable[..., Any], *shapes: Any) -> tuple[Callable[..., Any], int]:
    """Run a function's Python once, and return what it computes, and how large its arrays are.

    Args:
        fn: a function of pytrees of arrays.
        shapes: of its arguments.

    Returns:
        The function, of pytrees of these shapes, and the bytes of the largest array among those
        that it computes from its arguments.
    """
    closed, made = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    jaxpr = closed.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    needed = jaxpr_as_fun(closed.replace(jaxpr=jaxpr))

    def run(*args: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(made), needed(*jax.tree.leaves(args)))

    return run, max(1, _largest(jaxpr))


def _largest(jaxpr: Jaxpr) -> int:
    """Return the bytes of the largest array that a jaxpr computes from its arguments."""
    read, largest = set(jaxpr.invars), 0
    for eqn in jaxpr.eqns:
        if any(isinstance(var, Var) and var in read for var in eqn.invars):
            read.update(eqn.outvars)
            results: list[Any] = [var.aval for var in eqn.outvars]
            made = (x.size * x.dtype.itemsize for x in results if hasattr(x, "dtype"))
            largest = max(largest, *made, *map(_largest, inner_jaxprs(eqn)))
    return largest
