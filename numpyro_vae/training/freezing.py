"""Parameters that training leaves as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.example_libraries.optimizers import (
    JoinPoint,
    OptimizerState,
    pack_optimizer_state,
    unpack_optimizer_state,
)
from numpyro.infer.svi import SVIState

Freeze = str | Sequence[str]


def parts_of(
    params: Collection[str], of_model: Collection[str], network: str
) -> dict[str, frozenset[str]]:
    """Return the names of parameters by the part of model and guide that they belong to.

    Args:
        params: the names of all parameters.
        of_model: of those that the model declares.
        network: of those of the network that reads each datum.
    """
    of_guide = frozenset(params) - set(of_model)
    return {
        "model": frozenset(params) & set(of_model),
        "guide": of_guide,
        "globals": of_guide - {network},
    }


def frozen_names(freeze: Freeze, parts: dict[str, frozenset[str]]) -> frozenset[str]:
    """Return the names of the parameters that are to stay as they are.

    Args:
        freeze: what `fit` was given.
        parts: see `parts_of`.

    Raises:
        ValueError: if there is no such part or parameter, or nothing is left to train.
    """
    params, frozen = parts["model"] | parts["guide"], frozenset[str]()
    for name in (freeze,) if isinstance(freeze, str) else freeze:
        found = parts.get(name, params & {name, f"{name}$params"})
        if not found and name not in parts:
            raise ValueError(
                f"freeze= names {name!r}; model and guide have the parameters {sorted(params)}. "
                f"Name some of these, or {', '.join(map(repr, parts))}."
            )
        frozen |= found
    if frozen >= params:
        raise ValueError(
            f"freeze= names all parameters {sorted(params)}, so that nothing is left to train."
        )
    return frozen


def keep(new: SVIState, old: SVIState, params: dict[str, Any], names: frozenset[str]) -> SVIState:
    """Return the new state with some parameters as they were.

    What an optimizer knows of them, such as moments, is kept too: weight decay or momentum would
    move them without any gradient. So is the state of their networks.

    Args:
        new: the state after a step.
        old: the state before it.
        params: all unconstrained parameters.
        names: of those to keep.
    """
    owners = {path: path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def choose(path: tuple, new: Any, old: Any) -> Any:
        ends = (path[start:] for start in range(len(path)))  # from the longest on
        return old if next((owners[end] for end in ends if end in owners), None) in names else new

    states = (_unpacked(new.optim_state), _unpacked(old.optim_state))
    optim_state = _packed(jax.tree_util.tree_map_with_path(choose, *states))
    held, kept = {f"{name.removesuffix('$params')}$state" for name in names}, new.mutable_state
    if kept is not None:
        kept = {name: (old.mutable_state if name in held else kept)[name] for name in kept}
    return new._replace(optim_state=optim_state, mutable_state=kept)


def _unpacked(state: Any) -> Any:
    """Return an optimizer's state with the names of the parameters, which JAX's own hide."""
    step, inner = state
    return (step, unpack_optimizer_state(inner)) if isinstance(inner, OptimizerState) else state


def _packed(state: Any) -> Any:
    step, inner = state
    joined = any(isinstance(leaf, JoinPoint) for leaf in jax.tree.leaves(inner))
    return (step, pack_optimizer_state(inner)) if joined else state
