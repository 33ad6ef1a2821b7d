"""One distribution for each data set, as a single distribution with an axis of data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform

Axes = tuple[int | None, ...]  # by leaf of a pytree: 0 if it has an axis of data sets


class Stacked(dist.Distribution):
    """The distributions of a site in all data sets; NumPyro's own, under `jax.vmap`.

    Its batch is that of the data sets, and its event all that the site is in one of them.

    Args:
        base: the distribution in a data set, whose leaves may have an axis of data sets in front.
        axes: which of its leaves have one.
        support: that of the values of a data set, see `stacked_support`.
        mask: which entries of a site count, ``(num_sets, *leading part of the event)``.
        num_sets: the number of data sets.
        plates: the names of the plates around the site in a data set, by their dims.
    """

    pytree_data_fields = ("base_dist", "mask_by_set", "_bounds")
    pytree_aux_fields = ("axes", "_fixed", "inner_ndim", "plates")

    def __init__(
        self,
        base: dist.Distribution,
        axes: Axes,
        support: Any,
        mask: Bool[Array, "sets ..."] | None,
        num_sets: int,
        plates: tuple[str, ...] = (),
    ):
        self.base_dist, self.axes, self.mask_by_set = base, axes, mask
        self.plates = plates
        self.inner_ndim = len(base.batch_shape)
        has_bounds = bool(jax.tree.leaves(support))
        self._bounds, self._fixed = (support, None) if has_bounds else (None, support)
        super().__init__((num_sets,), base.batch_shape + base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of a data set's values."""
        return self._bounds if self._fixed is None else self._fixed

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw for each data set, from a key of its own."""
        keys, axis = jax.random.split(key, self.batch_shape[0]), len(sample_shape)
        return self.over_sets(lambda fn, key: fn.sample(key, sample_shape), keys, out_axis=axis)

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """Return the log-density of each data set's values."""
        del intermediates  # which are for one value, and none are kept
        axis = jnp.ndim(value) - self.event_dim - 1
        return self.over_sets(
            lambda fn, x: _sum_last(fn.log_prob(x), self.inner_ndim), value, axis, out_axis=-1
        )

    def over_sets(
        self, fn: Callable[..., Any], given: Any, axis: int = 0, out_axis: int = 0
    ) -> Any:
        """Apply a function of a data set's distribution and something else of it to all of them.

        Args:
            fn: the function; what it returns is a pytree of arrays.
            given: a pytree of arrays, each with an axis of data sets.
            axis: which one.
            out_axis: the axis of data sets in what is returned.
        """
        leaves, treedef = jax.tree.flatten(self.base_dist)
        return jax.vmap(
            lambda leaves, given: fn(jax.tree.unflatten(treedef, leaves), given),
            in_axes=(list(self.axes), axis),
            out_axes=out_axis,
            axis_size=self.batch_shape[0],
        )(leaves, given)


def _sum_last(x: Array, count: int) -> Array:
    """Sum over the last axes."""
    return x.sum(tuple(range(x.ndim - count, x.ndim))) if count else x


def peeled(support: Any) -> tuple[Any, int]:
    """Return the support of single values or events, and how many axes of them come before."""
    ndim = 0
    while isinstance(support, constraints.independent):
        ndim += support.reinterpreted_batch_ndims
        support = support.base_constraint
    return support, ndim


def stacked_support(base: Any, axes: Axes, event_ndim: int) -> Any:
    """Return the support of the values of a data set, for values with an axis of data sets.

    Args:
        base: that of single values or events, see `peeled`, whose leaves may have an axis of data
            sets in front.
        axes: which of them have one.
        event_ndim: the number of axes of all values of a data set.
    """
    if any(axis is not None for axis in axes):
        base = StackedConstraint(base, axes, event_ndim)
    more = event_ndim - base.event_dim
    return constraints.independent(base, more) if more else base


class StackedConstraint(constraints.Constraint):
    """A support with bounds of each data set's own.

    Args:
        base: the support in a data set, whose leaves may have an axis of data sets in front.
        axes: which of its leaves have one.
        depth: how many axes of a value come after that of the data sets.
    """

    def __init__(self, base: Any, axes: Axes, depth: int):
        self.base, self.axes, self.depth = base, axes, depth
        self.is_discrete, self.event_dim = base.is_discrete, base.event_dim

    def __call__(self, x: Any) -> Array:
        """Say which values lie in the support of their data set."""
        return self.map(lambda base, x: base(x), x, drops=self.event_dim)

    def feasible_like(self, prototype: Any) -> Array:
        """Return a value that does."""
        return self.map(lambda base, x: base.feasible_like(x), prototype)

    @property
    def first(self) -> Any:
        """The support in the first data set, whose transform has the shapes of all."""
        leaves, treedef = jax.tree.flatten(self.base)
        pairs = zip(leaves, self.axes, strict=True)
        return jax.tree.unflatten(treedef, [x if axis is None else x[0] for x, axis in pairs])

    def map(self, fn: Callable[..., Array], *values: Any, drops: int = 0) -> Array:
        """Apply a function of a data set's support and values to all data sets.

        Args:
            fn: the function.
            values: with an axis of data sets.
            drops: how many axes of an event the function leaves out.
        """
        leaves, treedef = jax.tree.flatten(self.base)
        axis = -self.depth - 1
        return jax.vmap(
            lambda leaves, *values: fn(jax.tree.unflatten(treedef, leaves), *values),
            in_axes=(list(self.axes), *[axis] * len(values)),
            out_axes=-self.depth - 1 + drops,
        )(leaves, *values)

    def eq(self, other: object, static: bool = False) -> Any:
        """Say whether the bounds are the same."""
        same = isinstance(other, StackedConstraint) and self.axes == other.axes
        return same and self.depth == other.depth and self.base.eq(other.base, static=static)

    def tree_flatten(self) -> tuple[Any, Any]:
        """Return the leaves, as NumPyro's constraints do."""
        names = ("axes", "depth", "is_discrete", "event_dim")
        return (self.base,), (("base",), {name: getattr(self, name) for name in names})


class _StackedTransform(Transform):
    """The map onto a support with bounds of each data set's own."""

    def __init__(self, constraint: StackedConstraint):
        self.constraint = constraint

    @property
    def domain(self) -> Any:
        return biject_to(self.constraint.first).domain

    @property
    def codomain(self) -> Any:
        return self.constraint

    def __call__(self, x: Any) -> Array:
        return self.constraint.map(lambda base, x: biject_to(base)(x), x)

    def _inverse(self, y: Any) -> Array:
        return self.constraint.map(lambda base, y: biject_to(base)._inverse(y), y)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:
        del intermediates

        def of_one(base: Any, x: Any, y: Any) -> Array:
            return biject_to(base).log_abs_det_jacobian(x, y)

        return self.constraint.map(of_one, x, y, drops=self.constraint.event_dim)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return biject_to(self.constraint.first).forward_shape(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return biject_to(self.constraint.first).inverse_shape(shape)

    def eq(self, other: object, static: bool = False) -> Any:
        same = isinstance(other, _StackedTransform)
        return same and self.constraint.eq(other.constraint, static=static)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.constraint,), (("constraint",), {})


@biject_to.register(StackedConstraint)
def _biject_to_stacked(constraint: StackedConstraint) -> _StackedTransform:
    return _StackedTransform(constraint)
