"""Observed values outside the support of their distribution, of which NumPyro's density is 0."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints

from numpyro_vae.model.trace import event_shape_of, is_real, mask_of
from numpyro_vae.numpyro_internals import checked_support


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "bounds"),
    meta_fields=("distribution", "support"),
)
@dataclass(frozen=True)
class Outside:
    """Where an observed site has values outside its support.

    Attributes:
        values: booleans, ``(*batch_shape, ...)``.
        bounds: what the support is made of, where it is made of values.
        distribution: the name of the site's distribution.
        support: the name of its support.
    """

    values: Any  # unchecked, as JAX puts what it likes into the place of arrays
    bounds: Any
    distribution: str
    support: str


def outside_support(msg: dict[str, Any]) -> Outside | None:
    """Return where a site of a trace has values outside its support; None if all are inside.

    What the model masks is never outside, nor are the values of a distribution that is told not
    to look, by ``validate_args=False``.
    """
    fn = msg["fn"]
    checked = checked_support(fn)
    if checked is None or is_real(checked[1]) or not jnp.size(msg["value"]):
        return None
    base, support = checked
    bounds = jax.tree.leaves(support)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    value = jnp.broadcast_to(msg["value"], fn.batch_shape + event_shape_of(msg))
    outside, mask = ~support(value), mask_of(fn)
    if mask is not None:
        outside = outside & mask.reshape(mask.shape + (1,) * (outside.ndim - mask.ndim))
    return Outside(outside, bounds, base, type(support).__name__.strip("_"))
