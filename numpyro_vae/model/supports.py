"""Observed values outside the support of their distribution, and draws that lie on its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.model.stacked import StackedConstraint, peeled
from numpyro_vae.model.trace import event_shape_of, mask_of
from numpyro_vae.numpyro_internals import checked_support

# By the name of a support: what it holds, and what may be done about other values.
SUPPORTS = {
    "Boolean": ("0 or 1", "Binarize them, as with x > 0.5"),
    "IntegerNonnegative": ("whole numbers from 0 on", "Round counts, and remove negative ones"),
    "IntegerInterval": ("whole numbers within bounds", "Correct the numbers or the bounds"),
    "Real": ("numbers that are finite", ""),
    "Positive": ("numbers above 0", "Correct them"),
    "Nonnegative": ("numbers from 0 on", "Correct them"),
    "UnitInterval": ("numbers from 0 to 1", "Rescale them, as with x / 255"),
}

MISSING = (
    "Remove them; or, if they stand for what is missing, let the model fill them in, as in "
    "obs=jnp.where(mask, x, 0.0) with mask = ~jnp.isnan(x), and leave them out with "
    "handlers.mask(mask=mask)"
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "bounds", "found"),
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
        found: by row one of these values, where rows are told apart.
    """

    values: Any  # unchecked, as JAX puts what it likes into the place of arrays
    bounds: Any
    distribution: str
    support: str
    found: Any = None


def explain(
    name: str, distribution: str, support: str, where: str, found: float | None = None
) -> tuple[str, str]:
    """Return what is wrong with values outside the support of their site, and what may be done.

    Args:
        name: of the site.
        distribution: the name of its distribution.
        support: the name of its support.
        where: in which rows.
        found: one of the values, if it is known.
    """
    expected, remedy = SUPPORTS.get(support, (f"{support} values", "Correct them"))
    text = (
        f"observed site {name!r} has values outside the support of its {distribution}{where}: "
        f"expected {expected}, as all else has a density of 0"
    )
    if support == "Real" or (found is not None and np.isnan(found)):
        return text, MISSING
    return text, (
        f"{remedy}, observe them under another distribution, or pass it validate_args=False to "
        "have them taken as they are"
    )


def outside_support(msg: dict[str, Any]) -> Outside | None:
    """Return where a site of a trace has values outside its support; None if all are inside.

    What the model masks is never outside, nor are the values of a distribution that is told not
    to look, by ``validate_args=False``.
    """
    fn = msg["fn"]
    checked = checked_support(fn)
    if checked is None or not jnp.size(msg["value"]):
        return None
    base, support = checked
    bounds = jax.tree.leaves(support)
    support, _ = peeled(support)
    shape = jnp.broadcast_shapes(jnp.shape(msg["value"]), fn.batch_shape + event_shape_of(msg))
    value = jnp.broadcast_to(msg["value"], shape)
    outside, mask = ~support(value), mask_of(fn)
    if mask is not None:
        outside = outside & mask.reshape(mask.shape + (1,) * (outside.ndim - mask.ndim))
    return Outside(outside, bounds, base, type(support).__name__.strip("_"))


def inside(support: Any, value: Any) -> Array:
    """Return draws with those moved off a bound of their support that rounding has put there.

    A `Uniform` in float32 draws its lower bound once in eight million times, and a `Gamma` whose
    concentration is small draws many a zero. The map to unconstrained values has infinity there. A
    draw is moved by no more than that map can tell apart, and not at all if it can.

    Args:
        support: that of a continuous site.
        value: draws from it.
    """
    support, _ = peeled(support)
    if isinstance(support, StackedConstraint):
        return support.map(inside, value)
    value = jnp.asarray(value)
    if support.is_discrete or not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    limits = jnp.finfo(value.dtype)
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    width = 1.0 if lower is None or upper is None else upper - lower
    if lower is not None:
        least = jnp.maximum(limits.eps * jnp.abs(lower), 4 * limits.tiny * jnp.maximum(width, 1.0))
        value = jnp.maximum(value, lower + least)
    if upper is not None:
        least = limits.eps * jnp.maximum(jnp.abs(upper), width)
        value = jnp.minimum(value, upper - least)
    return value
