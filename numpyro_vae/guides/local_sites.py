"""Declares the local sites in a guide, as NumPyro sample sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost

from numpyro_vae.guides.blocks import Block
from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.model.sites import Site
from numpyro_vae.model.stacked import peeled
from numpyro_vae.model.trace import is_real


def sample_local(encoding: Encoding, prefix: str) -> Iterator[tuple[str, Array]]:
    """Sample every local site in the plates of the model.

    The sites of a factorized family have a distribution each, so that an objective may know their
    divergence from the prior. Those of another are a function of one auxiliary site with their
    joint distribution, as in NumPyro's ``AutoContinuous``.

    Yields:
        Each site's name and its value.
    """
    values: dict[str, Array] = dict(encoding.given)
    read = {name for block in encoding.blocks.values() for name in block.reads}
    if not encoding.family.is_factorized:
        names = (site.name for site in encoding.sites)
        remedy = ", or use AutoAmortizedNormal, whose latents do not depend on each other"
        encoding.run.require_whole(names, "Local site", remedy)
    sample = _each if encoding.family.is_factorized else partial(_jointly, prefix)
    for name, block in encoding.blocks.items():
        raw = block.raw(encoding.features[name], values)
        for site, value in sample(encoding, block, raw):
            yield site.name, value
            if site.name in read:
                values[site.name] = _unconstrained_rows(encoding, site, value)


def _each(encoding: Encoding, block: Block, raw: Any) -> Iterator[tuple[Site, Array]]:
    """Sample sites one by one, each from its own distribution."""
    run = encoding.run
    for site, part in block.raw_by_site(raw):
        by_value = jax.tree.map(
            lambda rows, site=site: run.held(site, site.unpack(rows, run.plate)), part
        )
        marginals, mask = block.head.marginals(by_value), run.mask(site)
        fn = _masked(marginals, site, run.support(site), mask)
        with run.enter_plates(site.plates), scaled(run.scale(site)):
            yield site, jnp.asarray(numpyro.sample(site.name, fn))


def scaled(factor: Any) -> AbstractContextManager:
    """Return the handler that scales a site as the model does, if it does."""
    return nullcontext() if factor is None else handlers.scale(scale=factor)


def _site_distribution(
    by_value: Any, support: Any, unconstrained_ndim: int, event_ndim: int
) -> dist.Distribution:
    """Return the distribution of events from that of their unconstrained values."""
    fn = by_value.to_event(unconstrained_ndim)
    if is_real(support):
        return fn
    transform = biject_to(support)
    if isinstance(by_value, dist.Delta):  # a point has no density for the transform to change
        return dist.Delta(transform(by_value.v), event_dim=event_ndim)
    return dist.TransformedDistribution(fn, transform)


def _masked(by_value: Any, site: Site, support: Any, mask: Array | None) -> dist.Distribution:
    """Return the distribution of a site, in which what the model leaves out is left out."""
    finer = 0 if mask is None else mask.ndim - len(site.batch_shape)
    ndims = len(site.unconstrained_shape), len(site.event_shape)
    if not finer:
        fn = _site_distribution(by_value, support, *ndims)
        return fn if mask is None else fn.mask(mask)
    support, num_axes = peeled(support)
    if finer > num_axes:
        raise _finer_mask(site)
    fn = _site_distribution(by_value, support, *(ndim - num_axes for ndim in ndims))
    return fn.mask(_with_axes(mask, len(fn.batch_shape))).to_event(num_axes)


def _with_axes(mask: Any, ndim: int) -> Array:
    """Return a mask with axes of length 1 at its end, ``ndim`` in all."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _finer_mask(site: Site) -> ValueError:
    return ValueError(
        f"The model masks single values of the events of the local site {site.name!r}, which its "
        "support ties to each other. Mask whole events with handlers.mask."
    )


def _jointly(
    prefix: str, encoding: Encoding, block: Block, raw: Any
) -> Iterator[tuple[Site, Array]]:
    """Sample all sites of a block at once, and yield them as functions of that draw."""
    run, mask = encoding.run, None
    if any(run.mask(site) is not None for site in block.sites):
        mask = block.pack({site.name: encoding.rows_of_mask(site) for site in block.sites})
    joint = "_".join(site.name for site in block.sites)
    name = f"_{prefix}_{joint}_latent"
    after = -run.plate.dim - 1  # axes of plates that hold nothing of the joint distribution
    raw, mask = jax.tree.map(
        lambda x: x.reshape(x.shape[0], *[1] * after, *x.shape[1:]), (raw, mask)
    )
    factor = run.row_scale(block.sites)
    factor = None if factor is None else factor.reshape(-1, *[1] * after)
    pack = partial(_packed, encoding, block, after)
    with run.enter_plates((run.plate.name,)), scaled(factor):
        fn = block.distribution(raw, mask)
        infer = {"is_auxiliary": True, "pack": pack}
        by_step = jnp.asarray(numpyro.sample(name, fn, infer=infer))
    packed = block.flatten(by_step.reshape(run.plate.length, *by_step.shape[after + 1 :]))
    for site, part in block.unpack(packed):
        fn = _function_of_draw(
            site, site.unpack(part, run.plate), run.support(site), run.mask(site)
        )
        with run.enter_plates(site.plates), scaled(run.scale(site)):
            yield site, jnp.asarray(numpyro.sample(site.name, fn))


def _packed(encoding: Encoding, block: Block, after: int, values: dict[str, Array]) -> Array:
    """Return the draw of which the sites of a block are functions, from the values of these."""
    rows = {
        site.name: _unconstrained_rows(encoding, site, values[site.name]) for site in block.sites
    }
    packed = block.by_step(block.pack(rows))
    return packed.reshape(packed.shape[0], *[1] * after, *packed.shape[1:])


def _function_of_draw(
    site: Site, unconstrained: Array, support: Any, mask: Array | None
) -> dist.Distribution:
    """Return a point on the site's support, with the density that the transform gives it."""
    batch_dim = len(site.batch_shape)
    is_finer = mask is not None and mask.ndim > batch_dim
    transform = biject_to(peeled(support)[0] if is_finer else support)
    value = transform(unconstrained)
    log_det = transform.log_abs_det_jacobian(unconstrained, value)
    if is_finer and not is_real(support):
        if log_det.ndim < mask.ndim:
            raise _finer_mask(site)
        log_det = jnp.where(_with_axes(mask, log_det.ndim), log_det, 0)
    log_det = sum_rightmost(log_det, log_det.ndim - batch_dim)
    fn = dist.Delta(value, log_density=-log_det, event_dim=len(site.event_shape))
    return fn if mask is None or is_finer else fn.mask(mask)


def _unconstrained_rows(encoding: Encoding, site: Site, value: Array) -> Array:
    """Return a site's value as heads read it, ``(batch, datum_size)``."""
    unconstrained = biject_to(encoding.run.support(site)).inv(value)
    return site.flat_rows(unconstrained, encoding.run.plate)
