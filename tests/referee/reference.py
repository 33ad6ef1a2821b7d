"""What NumPyro says of a case: its own log-densities and predictions, and changes of variables."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import compute_log_probs
from program import DATA


def is_local(site: dict) -> bool:
    return any(frame.name == DATA for frame in site["cond_indep_stack"])


def is_latent(site: dict) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def is_enumerated(site: dict) -> bool:
    return site["infer"].get("enumerate") == "parallel"


def density(fn: Any, args: tuple, kwargs: dict, values: dict) -> tuple[dict[str, Array], dict]:
    """Return the log-density of each site, scaled and not summed, and the trace."""
    return compute_log_probs(handlers.seed(fn, 0), args, kwargs, values, sum_log_prob=False)


def total(log_probs: dict[str, Array]) -> Array:
    return sum((jnp.sum(x) for x in log_probs.values()), jnp.zeros(()))


def as_one(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of arrays, always of the same shapes, that may return traces.

    Its operations one by one would take longer to compile.
    """
    rest: list[Any] = []

    def arrays_of(*args: Any) -> list[Array]:
        leaves, tree = jax.tree.flatten(fn(*args))
        rest[:] = tree, [None if isinstance(leaf, Array) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Array)]

    compiled = jax.jit(arrays_of)

    def run(*args: Any) -> Any:
        arrays = iter(compiled(*args))
        tree, leaves = rest
        return jax.tree.unflatten(tree, [next(arrays) if x is None else x for x in leaves])

    return run


def by_row(log_prob: Array, site: dict, num_data: int) -> np.ndarray:
    """Sum what has the shape of a site's batch over all but the local plate."""
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == DATA)
    rows = np.moveaxis(np.asarray(log_prob, np.float64), dim, 0)
    assert len(rows) == num_data
    return rows.reshape(num_data, -1).sum(-1)


def rows_in_front(value: Any, site: dict, event_dim: int) -> Any:
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == DATA)
    return jnp.moveaxis(value, dim - event_dim, 0)


def shared_scale(trace: dict, num_data: int) -> np.ndarray | None:
    """Return the factor of each row's latents that a guide draws, or None if they have several."""
    return _factor(trace, num_data, enumerated=False)


def scale_of_enumerated(trace: dict, num_data: int) -> np.ndarray | None:
    """Return the factor of each row's latents that are summed over; None if there are several."""
    return _factor(trace, num_data, enumerated=True)


def _factor(trace: dict, num_data: int, *, enumerated: bool) -> np.ndarray | None:
    factors = [np.ones((num_data, 0))]
    for site in trace.values():
        if is_latent(site) and is_local(site) and is_enumerated(site) == enumerated:
            scale = jnp.broadcast_to(
                1.0 if site["scale"] is None else site["scale"], site["fn"].batch_shape
            )
            factors.append(np.asarray(rows_in_front(scale, site, 0)).reshape(num_data, -1))
    by_row = np.concatenate(factors, axis=1)
    if not by_row.size:
        return np.ones(num_data)
    return by_row[:, 0] if np.ptp(by_row, axis=1).max() == 0 else None


# -- masks, supports and volumes ------------------------------------------------------------------


def mask_of(fn: dist.Distribution) -> Any:
    """Return a site's mask, of its batch or with axes of its event too; None if it has none.

    A mask of ``False`` says that a site is scored elsewhere, and its guide's part is scored.
    """
    if isinstance(fn, dist.Independent):
        return mask_of(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution):
        inner = mask_of(fn.base_dist)
        missing = 0 if inner is None else len(fn.base_dist.batch_shape)
        return (
            None
            if inner is None
            else jnp.broadcast_to(inner, fn.batch_shape + inner.shape[missing:])
        )
    if not isinstance(fn, dist.MaskedDistribution):
        return None
    inner = mask_of(fn.base_dist)
    if isinstance(fn._mask, bool):
        return inner
    outer = jnp.broadcast_to(fn._mask, fn.batch_shape)
    return (
        outer
        if inner is None
        else outer.reshape(outer.shape + (1,) * (inner.ndim - outer.ndim)) & inner
    )


def log_det(support: Any, unconstrained: Array, event_dim: int) -> Array:
    """Return the log-volume of the map to a support by autodiff, with the shape of the batch.

    Args:
        support: a constraint.
        unconstrained: values that are mapped to it, the batch in front.
        event_dim: of the site.
    """
    base = support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    transform = biject_to(base)
    own, shape = transform.domain.event_dim, unconstrained.shape
    if own:
        flat = unconstrained.reshape(-1, *shape[len(shape) - own :])
        volumes = jax.vmap(lambda u: _log_volume(base, transform, u))(flat)
        volumes = volumes.reshape(shape[: len(shape) - own])
    else:  # each value has bounds of its own
        slopes = jax.jvp(transform, (unconstrained,), (jnp.ones(shape, unconstrained.dtype),))[1]
        volumes = jnp.log(jnp.abs(slopes))
    extra = event_dim - support_event_dim(base)
    return volumes.sum(tuple(range(volumes.ndim - extra, volumes.ndim)))


def support_event_dim(support: Any) -> int:
    return support.event_dim


def _log_volume(base: Any, transform: Any, u: Array) -> Array:
    jacobian = jax.jacfwd(lambda u: _free(base, transform(u)))(u).reshape(-1, u.size)
    if jacobian.shape[0] == u.size:
        return jnp.linalg.slogdet(jacobian)[1]
    return 0.5 * jnp.linalg.slogdet(jacobian.T @ jacobian)[1]


def _free(base: Any, value: Array) -> Array:
    """Return the coordinates of a value that are free."""
    if base is constraints.simplex:
        return value[:-1]
    if base is constraints.lower_cholesky:
        return value[jnp.tril_indices(len(value))]
    if base is constraints.corr_cholesky:
        return value[jnp.tril_indices(len(value), -1)]
    return value


# -- the guide, from what it says of each datum ----------------------------------------------------


def normal_log_q(encoded: dict, trace: dict, values: dict) -> dict[str, Array]:
    """Return by local site the log-density of a diagonal Normal guide, scaled and not summed.

    Args:
        encoded: ``loc`` and ``scale`` of the unconstrained values, rows in front.
        trace: the model's, with all rows.
        values: of the latent sites.
    """
    found = {}
    for name, (loc, scale) in encoded.items():
        site = trace[name]
        unconstrained, counts, volume = parts_of(site, values[name])
        event_dim = unconstrained.ndim - len(site["fn"].batch_shape)
        rows = rows_in_front(unconstrained, site, event_dim)
        normal = dist.Normal(jnp.reshape(loc, rows.shape), jnp.reshape(scale, rows.shape))
        log_prob = jnp.where(rows_in_front(counts, site, event_dim), normal.log_prob(rows), 0.0)
        sums = log_prob.sum(tuple(range(log_prob.ndim - event_dim, log_prob.ndim)))
        terms = jnp.moveaxis(sums, 0, _axis(site, sums)) - volume
        found[name] = terms if site["scale"] is None else site["scale"] * terms
    return found


def parts_of(site: dict, value: Any) -> tuple[Array, Array, Array]:
    """Return a value without bounds, which of its entries count, and the volume of the map.

    Returns:
        Two arrays with the shape of the unconstrained value, and one with that of the batch.
    """
    fn, support = site["fn"], site["fn"].support
    unconstrained = biject_to(support).inv(value)
    volume, mask = log_det(support, unconstrained, fn.event_dim), mask_of(fn)
    if mask is None:
        return unconstrained, jnp.ones(unconstrained.shape, bool), volume
    counts = mask.reshape(mask.shape + (1,) * (unconstrained.ndim - mask.ndim))
    volume = jnp.where(mask, volume, 0.0) if mask.ndim == volume.ndim else volume
    return unconstrained, jnp.broadcast_to(counts, unconstrained.shape), volume


def _axis(site: dict, value: Array) -> int:
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == DATA)
    return value.ndim + dim


def auxiliary_values(guide_trace: dict, trace: dict, values: dict) -> dict[str, Array]:
    """Return the values of a guide's joint sites that give the latents their values."""
    latent = {name: site for name, site in trace.items() if is_latent(site)}
    local = [name for name, site in latent.items() if is_local(site) and not is_enumerated(site)]
    subsets = chain.from_iterable(combinations(local, n) for n in range(1, len(local) + 1))
    by_name = {"_auto_" + "_".join(names) + "_latent": names for names in subsets}
    found = {}
    for name in (name for name in guide_trace if name in by_name):
        parts = [_unconstrained_rows(trace[part], values[part]) for part in by_name[name]]
        shape = guide_trace[name]["value"].shape
        found[name] = jnp.concatenate(parts, -1).reshape(shape)
    return found


def _unconstrained_rows(site: dict, value: Any) -> Array:
    unconstrained = biject_to(site["fn"].support).inv(value)
    event_dim = unconstrained.ndim - len(site["fn"].batch_shape)
    rows = rows_in_front(unconstrained, site, event_dim)
    return rows.reshape(len(rows), -1)
