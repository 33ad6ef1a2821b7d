"""What steps draw of their random keys alone, drawn before all that reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.interpreters import partial_eval
from jaxtyping import Array

from numpyro_vae.data.batch import Batch

MOST_BYTES = 2**27  # of what is drawn ahead; the noise of an epoch takes less, in most cases

Arrays = list[Array]
Batches = Callable[[Array], Batch]


class Ahead(NamedTuple):
    """A step in two parts: what it computes of its random key alone, and all else.

    On a CPU, XLA computes noise anew wherever a step reads it, forwards and backwards: in a small
    network a seventh of the step. Drawn before, it is computed once.

    Attributes:
        draw: of a step's key, that of the next step, and the arrays that the rest needs.
        rest: of a step's inputs without the key, and what was drawn, its outputs.
    """

    draw: Callable[[Array], Arrays]
    rest: Callable[..., Arrays]

    @classmethod
    def of(cls, step: ClosedJaxpr, key: int, next_key: int, num_steps: int) -> Ahead | None:
        """Return the two parts of a step; None if there is nothing to draw, or too much.

        Args:
            step: what a step computes.
            key: which of its inputs is the random key.
            next_key: which of its outputs is that of the next step.
            num_steps: how many steps are drawn for.
        """
        every = [True] * len(step.jaxpr.outvars)
        jaxpr, _ = partial_eval.dce_jaxpr(step.jaxpr, every, instantiate=True)
        begin, end = jaxpr.invars[key], jaxpr.outvars[next_key]
        alone, others, known = [], [], {begin}
        for eqn in jaxpr.eqns:
            read = _variables(eqn.invars)
            if read and read <= known and not eqn.effects:
                alone.append(eqn)
                known.update(eqn.outvars)
            else:
                others.append(eqn)
        needed = _variables(jaxpr.outvars).union(*(_variables(eqn.invars) for eqn in others))
        drawn = [var for eqn in alone for var in eqn.outvars if var in needed and var != end]
        num_bytes = num_steps * sum(var.aval.size * var.aval.dtype.itemsize for var in drawn)
        if end not in known or num_steps == 1 or not 0 < num_bytes <= MOST_BYTES:
            return None

        def part(eqns: Sequence, inputs: Sequence, outputs: Sequence) -> Callable[..., Arrays]:
            needed = jaxpr.replace(eqns=eqns, invars=inputs, outvars=outputs)
            return jaxpr_as_fun(step.replace(jaxpr=needed))

        inputs = [*jaxpr.invars[:key], *jaxpr.invars[key + 1 :], end, *drawn]
        return cls(part(alone, [begin], [end, *drawn]), part(others, inputs, jaxpr.outvars))


def scan_steps(
    step: ClosedJaxpr, given: Any, state: Any, batch: Batches, order: Array
) -> tuple[Any, Array]:
    """Scan over steps, and draw ahead for them on a CPU where that can be done.

    A GPU has nothing to gain: it would take as many kernels, and write and read what they draw.
    Where several devices share the rows, each draws for its own.

    Args:
        step: what a step computes of what is given, a state that ends with its random key, and a
            batch: the next state, and its loss.
        given: the same for all steps.
        state: the first one.
        batch: returns the batch of a row of the order.
        order: with a row for each step.

    Returns:
        The last state, and the losses.
    """
    parts, (*arrays, _) = None, jax.tree.leaves(state)
    mesh = jax.eval_shape(batch, order[0]).layout.devices.mesh
    if mesh is None and jax.default_backend() == "cpu":
        key = len(jax.tree.leaves((given, arrays)))
        parts = Ahead.of(step, key, len(arrays), len(order))
    if parts is None:
        return _scan(jaxpr_as_fun(step), given, state, batch, order)
    return _scan_parts(parts, given, state, batch, order)


def _scan(
    step: Callable[..., Arrays], given: Any, state: Any, batch: Batches, order: Array
) -> tuple[Any, Array]:
    def run(state: Any, which: Array) -> tuple[Any, Array]:
        *new, loss = step(*jax.tree.leaves((given, state, batch(which))))
        return jax.tree.unflatten(jax.tree.structure(state), new), loss

    return jax.lax.scan(run, state, order)


def _scan_parts(
    parts: Ahead, given: Any, state: Any, batch: Batches, order: Array
) -> tuple[Any, Array]:
    def draw(rng_key: Array, _: None) -> tuple[Array, Arrays]:
        drawn = parts.draw(rng_key)
        return drawn[0], drawn

    def run(arrays: Arrays, of_step: tuple[Array, Arrays]) -> tuple[Arrays, Array]:
        which, drawn = of_step
        *new, _, loss = parts.rest(*jax.tree.leaves((given, arrays, batch(which))), *drawn)
        return new, loss

    *arrays, rng_key = jax.tree.leaves(state)
    end, drawn = jax.lax.scan(draw, rng_key, length=len(order))
    new, losses = jax.lax.scan(run, arrays, (order, drawn))
    return jax.tree.unflatten(jax.tree.structure(state), [*new, end]), losses


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}
