"""Whether the order of a plate's rows matters, of which an encoder of sets knows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.model.levels import axes_of
from numpyro_vae.model.one_set import Like, draw_all, likes
from numpyro_vae.model.trace import Model
from numpyro_vae.numpyro_internals import draw_improper

Densities = dict[str, Any]  # by site


def is_exchangeable(
    model: Model,
    treedef: Any,
    leaves: list[Any],
    axes: list[int | None],
    plates: Mapping[str, int],
) -> bool:
    """Return whether a model of a data set is the same if the rows of plates change places.

    It is run on random numbers, and then with the rows of a plate, in arguments and values of
    sites, moved by one; all densities have to move with them. A constant of the model's code that
    tells rows apart, such as times, does not, nor does a vector of latents with one for each row.

    Args:
        model: of one data set.
        treedef: how leaves make arguments ``(args, kwargs)``.
        leaves: the arguments of all data sets.
        axes: of data sets in each of them; one that all share is not read by the encoder.
        plates: the plates in question, and their lengths.

    Returns:
        True also where the model cannot be run on random numbers.
    """
    found = likes(leaves, axes)
    return _is_exchangeable(model, treedef, found, tuple(plates.items()))


@lru_cache
def _is_exchangeable(
    model: Model, treedef: Any, found: tuple[Any, ...], plates: tuple[tuple[str, int], ...]
) -> bool:
    leaves = draw_all(found)
    try:
        with jax.ensure_compile_time_eval():
            before = _run(model, treedef, leaves, {})
            return all(
                _moves(model, treedef, found, leaves, dict(plates), name, before)
                for name, _ in plates
            )
    except Exception:  # of any kind, as the model is run on numbers that are no data
        return True


def _run(
    model: Model, treedef: Any, leaves: list[Any], values: Mapping[str, Array]
) -> tuple[Densities, dict[str, Array], dict[str, dict[str, tuple[int, int]]]]:
    """Return by site the density of its entries, its value, and the dims of its plates."""
    args, kwargs = jax.tree.unflatten(treedef, leaves)
    fixed = handlers.substitute(data=dict(values))
    draw = handlers.substitute(substitute_fn=draw_improper)
    seeded = handlers.seed(rng_seed=0)
    with handlers.block(), handlers.trace() as trace, seeded, draw, fixed, handlers.uncondition():
        model(*args, **kwargs)
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    return (
        {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()},
        {name: site["value"] for name, site in sites.items()},
        {
            name: {x.name: (x.dim, site["fn"].event_dim) for x in site["cond_indep_stack"]}
            for name, site in sites.items()
        },
    )


def _moves(
    model: Model,
    treedef: Any,
    found: tuple[Any, ...],
    leaves: list[Any],
    plates: dict[str, int],
    name: str,
    before: tuple[Densities, dict[str, Array], dict[str, dict[str, tuple[int, int]]]],
) -> bool:
    """Return whether all densities move with the rows of a plate."""
    moved = []
    for leaf, like in zip(leaves, found, strict=True):
        axes = axes_of(like.shape, plates) if isinstance(like, Like) and like.is_own else {}
        moved.append(jnp.roll(leaf, 1, axes[name]) if name in axes else leaf)
    densities, values, dims = before

    def roll(x: Array, site: str, *, is_value: bool) -> Array:
        dim, event_dim = dims[site].get(name, (0, 0))
        return jnp.roll(x, 1, dim - event_dim * is_value) if dim else x

    given = {site: roll(x, site, is_value=True) for site, x in values.items()}
    after, _, _ = _run(model, treedef, moved, given)
    return all(
        np.allclose(after[site], roll(x, site, is_value=False), 1e-3, 1e-3, equal_nan=True)
        for site, x in densities.items()
    )
