"""An encoder of sets whose elements are sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from numpyro_vae.data.nested import Nested
from numpyro_vae.data.ragged import Masked
from numpyro_vae.encoders.base import FURTHEST, Standardize, dense_layers, scaled

__all__ = ["NestedSetEncoder"]

SMALLEST = 1e-3  # of the spread within a set, in units of the first batch


class NestedSetEncoder(nnx.Module):
    """An encoder of sets whose elements are sets, as groups and their rows, of any sizes.

    From the innermost level to the outermost, dense layers read what each element has, and what
    its own elements come to: the means of their features, and without any learning the mean and
    spread of their values, their number, and the same of all that is within these. Then,
    from the outermost level to the innermost, dense layers read an element beside the features of
    what it is an element of. So the features of a group are made of its rows, and of those of all
    other groups. The order of elements does not matter (Zaheer et al., *Deep Sets*, NeurIPS 2017;
    Heinrich et al., *Hierarchical Neural Simulation-Based Inference over Event Ensembles*, TMLR
    2024).

    Args:
        example_inputs: the first batch, `Nested`.
        element_sizes: the width of each layer for elements that have no latents of their own, and
            of which there are most.
        hidden_sizes: the width of each layer for all others.
        activation: applied after each layer.
        standardize: whether to put values on the scale of the first batch, see `Standardize`.
        rngs: where the initial weights come from.

    Raises:
        TypeError: if the inputs are not `Nested`.
        ValueError: if a size is below 1, or elements have another size than those of the example.

    Example:
        >>> rows = Masked(jnp.ones((4, 3, 9, 1)), jnp.ones((4, 3, 9), bool))
        >>> inputs = Nested((jnp.ones((4, 2)), jnp.ones((4, 3, 0)), rows), ("all", "group", None))
        >>> features = NestedSetEncoder(inputs, rngs=nnx.Rngs(0))(inputs)
        >>> {name: x.shape[:-1] for name, x in features.items()}
        {'all': (4,), 'group': (4, 3)}
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        element_sizes: Sequence[int] = (32,),
        hidden_sizes: Sequence[int] = (64, 64),
        activation: Callable[[Array], Array] = nnx.silu,
        standardize: bool = True,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        levels, names = _levels(example_inputs), example_inputs.names
        self.standardize = nnx.List(_standardize(*level) for level in levels if standardize)
        self.sizes = tuple(values.shape[-1] for values, _ in levels)
        self.upwards, widths = nnx.List(), []
        for number in reversed(range(len(levels))):
            label = "hidden_sizes" if names[number] else "element_sizes"
            sizes = hidden_sizes if names[number] else element_sizes
            size = _num_facts(self.sizes[number:]) + (widths[0] if widths else 0)
            self.upwards.insert(0, dense_layers(size, sizes, name=label, rngs=rngs))
            widths.insert(0, sizes[-1])
        above = [widths[0], *[hidden_sizes[-1]] * len(levels)]
        self.downwards = nnx.List(
            dense_layers(widths[number] + above[number - 1], hidden_sizes, rngs=rngs)
            for number in range(1, _depth(names))
        )

    def __call__(self, inputs: Any) -> dict[str, Float[Array, "batch ... k"]]:
        """Return the features of each named level, ``(batch, *elements, k)``."""
        facts, hidden = self._upwards(_levels(inputs))
        features, found = hidden[0], {}
        for number, name in enumerate(inputs.names[: _depth(inputs.names)]):
            if number:
                shape = hidden[number].shape[:-1]
                above = jnp.broadcast_to(features[..., None, :], (*shape, features.shape[-1]))
                both = jnp.concatenate([hidden[number], above], axis=-1)
                features = self._dense(self.downwards[number - 1], both)
            if name is not None:
                found[name] = jnp.concatenate([facts[number], features], axis=-1)
        return found

    def _upwards(self, levels: list[tuple[Array, Array]]) -> tuple[list[Array], list[Array]]:
        """Return by level what is known of each element without learning, and its features."""
        known = [self._scaled(number, *level) for number, level in enumerate(levels)]
        there = [there for _, there in levels]
        facts, hidden = list(known), list(known)
        for number in reversed(range(len(levels))):
            parts, learned = [known[number]], []
            if number + 1 < len(levels):
                parts += _summary(facts[number + 1], there[number + 1])
                learned = [_mean(hidden[number + 1], there[number + 1])]
            if number + 2 < len(levels):
                parts += _within(known[number + 2], there[number + 2])
            facts[number] = _bounded(jnp.concatenate(parts, axis=-1))
            every = jnp.concatenate([facts[number], *learned], axis=-1)
            hidden[number] = self._dense(self.upwards[number], every)
        return facts, hidden

    def _scaled(self, number: int, values: Array, there: Array) -> Array:
        standardize = self.standardize[number] if self.standardize else None
        where = jnp.broadcast_to(there[..., None], values.shape)
        return scaled(values, where, self.sizes[number], standardize)

    def _dense(self, layers: Sequence[nnx.Linear], x: Array) -> Array:
        for layer in layers:
            x = self.activation(layer(x))
        return x


def _levels(inputs: Any) -> list[tuple[Array, Bool[Array, "..."]]]:
    """Return the values of each level, and which elements are there."""
    if not isinstance(inputs, Nested):
        raise TypeError(
            f"NestedSetEncoder reads Nested sets, found {type(inputs).__name__}. Return these from "
            "inputs=, or take the encoder for a guide of data_sets, of which it is the default "
            "where latents lie in a plate."
        )
    return [
        (level.filled(), jnp.asarray(level.mask))
        if isinstance(level, Masked)
        else (jnp.asarray(level), jnp.ones(level.shape[:-1], bool))
        for level in inputs.levels
    ]


def _depth(names: tuple[str | None, ...]) -> int:
    """Return how many levels there are down to the last that has a name."""
    return max(number for number, name in enumerate(names) if name is not None) + 1


def _num_facts(sizes: Sequence[int]) -> int:
    """Return how much `_upwards` knows of an element without learning."""
    if len(sizes) == 1:
        return sizes[0]
    within = 5 * sizes[2] + 1 if len(sizes) > 2 else 0
    return sizes[0] + 2 * _num_facts(sizes[1:]) + 1 + within


def _standardize(values: Array, there: Array) -> Standardize:
    where = jnp.broadcast_to(there[..., None], values.shape)
    return Standardize(values, axis=tuple(range(values.ndim - 1)), where=where)


def _mean(x: Array, there: Array) -> Array:
    """Return the mean over the elements that are there; 0 of none."""
    share = there / jnp.maximum(there.sum(-1, keepdims=True), 1)
    return (share[..., None] * x).sum(-2)


def _variance(x: Array, there: Array) -> Array:
    return _mean(jnp.square(x - _mean(x, there)[..., None, :]), there)


def _summary(x: Array, there: Array) -> list[Array]:
    """Return the mean, the logarithm of the spread, and that of the number of elements."""
    return [_mean(x, there), _log_spread(_variance(x, there)), _log_number(there.sum(-1))]


def _within(x: Array, there: Array) -> list[Array]:
    """Return what the rows of all sets come to, with values and number of the same rows.

    The mean of all rows and their number; their spread within their sets, and that of the means of
    sets; and the mean of sets, each weighed by its precision, with its standard error.
    """
    number = there.sum(-1)[..., None]
    total, means = number.sum(-2), _mean(x, there)
    mean = (number * means).sum(-2) / jnp.maximum(total, 1)
    free = jnp.maximum(total - (number > 0).sum(-2), 1)
    within = (number * _variance(x, there)).sum(-2) / free
    between = (number * jnp.square(means - mean[..., None, :])).sum(-2)
    weighed, variance = _weighed(means, number, within, between)
    spreads = [within, between / jnp.maximum(total, 1), variance]
    return [mean, weighed, *map(_log_spread, spreads), _log_number(total[..., 0])]


def _weighed(means: Array, number: Array, within: Array, between: Array) -> tuple[Array, Array]:
    """Return the mean of sets, each weighed by its precision, and the variance of that mean.

    The variance of sets is that of DerSimonian and Laird (*Meta-analysis in clinical trials*,
    Controlled Clinical Trials 1986): what their means differ by beyond what they would by chance.

    Args:
        means: of sets, ``(..., sets, k)``.
        number: of their rows, ``(..., sets, 1)``.
        within: the variance of rows within their sets.
        between: the squared distance of the mean of a row's set from that of all, summed over rows.
    """
    total = number.sum(-2)
    unlike = total - jnp.square(number).sum(-2) / jnp.maximum(total, 1)  # 1 or more of two sets
    beyond = between - ((number > 0).sum(-2) - 1) * within
    of_sets = jnp.maximum(beyond, 0) / jnp.maximum(unlike, 1)
    noise = within + SMALLEST**2
    weight = number / (noise[..., None, :] + number * of_sets[..., None, :])
    precision = jnp.maximum(weight.sum(-2), SMALLEST**2)
    return (weight * means).sum(-2) / precision, 1 / precision


def _log_spread(variance: Array) -> Array:
    return 0.5 * jnp.log(variance + SMALLEST**2)


def _log_number(number: Array) -> Array:
    return jnp.log1p(number)[..., None]


def _bounded(x: Array) -> Array:
    """Return values, of which those far away grow with their logarithm."""
    beyond = jnp.log1p(jnp.maximum(jnp.abs(x) - FURTHEST, 0))
    return jnp.where(jnp.abs(x) < FURTHEST, x, jnp.sign(x) * (FURTHEST + beyond))
