"""Whether what lies in an element of a plate depends on enumerated values in other elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.data.arrays import Layout
from numpyro_vae.model.one_set import draw_all, likes
from numpyro_vae.model.provenance import Names
from numpyro_vae.model.trace import Model, Rows, is_enumerated, trace_model

ENDS = (0, -1)  # the first element of a plate, and the last
Values = Mapping[str, Array]
Dims = dict[str, dict[str, int]]  # by site and plate


def mixed_plates(model: Model, layout: Layout, arrays: list[Any], rows: Rows) -> Names:
    """Return the plates in which elements depend on each other, though a plate says they do not.

    The model is run on random numbers, and then with other values in the first element of a plate,
    or in the last: no density of another element may change.

    Args:
        model: the model.
        layout: how arrays make its arguments.
        arrays: of which only the shapes are used.
        rows: by plate, its size and the rows that it holds.

    Returns:
        None also where the model cannot be run on random numbers.
    """
    try:
        with jax.ensure_compile_time_eval():
            return _mixed(model, layout, arrays, rows)
    except Exception:  # of any kind, as the model is run on numbers that are no data
        return frozenset()


def _mixed(model: Model, layout: Layout, arrays: list[Any], rows: Rows) -> Names:
    leaves = draw_all(likes(arrays, [None] * len(arrays)))
    held = {name: (size, jnp.arange(len(ids)) % size) for name, (size, ids) in rows.items()}
    dims: Dims = {}

    @jax.jit
    def run(values: Values) -> tuple[Values, Values, Values]:
        args, kwargs = layout.whole(leaves)
        given = handlers.substitute(model, data=dict(values))
        trace = trace_model(given, args, kwargs, jax.random.key(0), held)
        sites = {name: msg for name, msg in trace.items() if msg["type"] == "sample"}
        for name, msg in sites.items():
            dims[name] = {frame.name: frame.dim for frame in msg["cond_indep_stack"]}
        latent = {name: msg["value"] for name, msg in sites.items() if not msg["is_observed"]}
        summed = {name: msg["fn"] for name, msg in sites.items() if is_enumerated(msg)}
        supports = {name: fn.enumerate_support(expand=False) for name, fn in summed.items()}
        return latent, supports, {name: x["fn"].log_prob(x["value"]) for name, x in sites.items()}

    def is_mixed(plate: str, place: int) -> bool:
        changed = _change(values, supports, dims, plate, place)
        return _differ(before, run(changed)[-1], dims, plate, place)

    values, supports, before = run({})
    plates = {plate for name in supports for plate in dims[name]}
    return frozenset(x for x in plates if any(is_mixed(x, place) for place in ENDS))


def _change(values: Values, supports: Values, dims: Dims, plate: str, place: int) -> Values:
    """Return the values with others of enumerated sites in an element of a plate."""
    changed = dict(values)
    for name, support in supports.items():
        if plate in dims[name]:
            choices, dim = jnp.ravel(support), dims[name][plate]
            rows = jnp.moveaxis(values[name], dim, 0)
            other = jnp.where(rows[place] == choices[0], choices[-1], choices[0])
            changed[name] = jnp.moveaxis(rows.at[place].set(other), 0, dim)
    return changed


def _differ(before: Values, after: Values, dims: Dims, plate: str, place: int) -> bool:
    """Return whether a density in another element of a plate has changed."""
    pairs = [
        [np.delete(np.asarray(x[name]), place, around[plate]) for x in (before, after)]
        for name, around in dims.items()
        if plate in around
    ]
    return not all(np.allclose(*pair, 1e-4, 1e-4, equal_nan=True) for pair in pairs)
