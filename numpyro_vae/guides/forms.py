"""Automatic guides in a form whose trace says what they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import (
    AutoBatchedLowRankMultivariateNormal,
    AutoBatchedMultivariateNormal,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
)

from numpyro_vae.numpyro_internals import (
    batched_parts,
    batched_site,
    diagonal_parts,
    guide_parts,
    laplace_run,
)

Guide = Callable[..., Any]
BATCHED = (AutoBatchedMultivariateNormal, AutoBatchedLowRankMultivariateNormal)


def traceable(guide: Guide, params: dict[str, Any]) -> Guide:
    """Return a guide whose trace has its draws and their density, of guides whose own has not.

    NumPyro's ``AutoDiagonalNormal`` draws all latents as one vector: here each site has its
    Normals, in its plates; so does ``AutoBatchedMultivariateNormal``, if its batches are the rows.
    Its ``AutoLaplaceApproximation`` is a point while it trains, and a Normal afterwards. All other
    guides are returned as they are.

    Args:
        guide: any guide.
        params: its trained parameters.
    """
    if isinstance(guide, AutoGuideList):
        return _together([traceable(part, params) for part in guide_parts(guide)])
    if isinstance(guide, AutoLaplaceApproximation):
        return laplace_run(guide, params)
    if isinstance(guide, BATCHED):
        site = batched_site(guide)
        return guide if site is None else _by_row(guide, *site)
    return _by_site(guide) if isinstance(guide, AutoDiagonalNormal) else guide


def _together(parts: list[Guide]) -> Guide:
    def guide(*args: Any, **kwargs: Any) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for part in parts:
            found |= part(*args, **kwargs)
        return found

    return guide


def _by_site(guide: AutoDiagonalNormal) -> Guide:
    """Return the guide with a distribution for each site."""

    def by_site(*args: Any, **kwargs: Any) -> dict[str, Array]:
        del args, kwargs  # the guide depends on none of them
        found = {}
        for name, (fn, plates, loc, scale) in diagonal_parts(guide).items():
            event_dim = jnp.ndim(loc) - len(fn.batch_shape)
            with ExitStack() as stack:
                for plate in plates:
                    stack.enter_context(plate)
                loc, scale = (numpyro.subsample(x, event_dim) for x in (loc, scale))
                normal = dist.Normal(loc, scale).to_event(event_dim)
                transform = biject_to(fn.support)
                fn = dist.TransformedDistribution(normal, transform)
                found[name] = jnp.asarray(numpyro.sample(name, fn))
        return found

    return by_site


def _by_row(guide: Guide, name: str, prior: Any, plate_name: str) -> Guide:
    """Return the guide of one site with a Normal of several dimensions for each row."""
    transform = biject_to(prior.support)
    shape = transform.inverse_shape(prior.batch_shape + prior.event_shape)[1:]

    def by_row(*args: Any, **kwargs: Any) -> dict[str, Array]:
        del args, kwargs  # the guide depends on none of them
        normal, plate = batched_parts(guide, plate_name)
        with plate:
            loc: Any = numpyro.subsample(normal.loc, 1)
            scale_tril: Any = numpyro.subsample(normal.scale_tril, 2)
            fn: Any = dist.MultivariateNormal(loc, scale_tril=scale_tril)
            if not shape:
                fn = dist.Normal(loc[:, 0], scale_tril[:, 0, 0])
            elif len(shape) > 1:
                reshape = dist.transforms.ReshapeTransform(shape, loc.shape[1:])
                fn = dist.TransformedDistribution(fn, reshape)
            fn = dist.TransformedDistribution(fn, transform)
            return {name: jnp.asarray(numpyro.sample(name, fn))}

    return by_row
