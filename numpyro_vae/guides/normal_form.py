"""Sites of a guide that are Normals of their unconstrained values, whatever they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import biject_to

from numpyro_vae.families import DiagonalNormal, FullRankNormal
from numpyro_vae.families.base import Normal
from numpyro_vae.families.either import EitherHead, RawOfEither
from numpyro_vae.families.multivariate_normal import CholeskyForm, lower_root
from numpyro_vae.guides.blocks import Block
from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.model.run import Run
from numpyro_vae.model.sites import Site
from numpyro_vae.scales.log_scale_normal import LogScaleNormal

WRAPPERS = dist.Independent | dist.ExpandedDistribution


def unconstrained_form(fn: dist.Distribution, support: Any) -> dist.Distribution | None:
    """Return the distribution of a site's unconstrained value, if it is not to be computed.

    It is known of a real site, and of a distribution that is transformed from the reals as
    ``biject_to(support)`` does, such as a ``LogNormal``.

    Args:
        fn: the distribution of the site.
        support: of the model's site.
    """
    transform = biject_to(support)
    inner = fn
    while isinstance(inner, WRAPPERS):
        inner = inner.base_dist
    if isinstance(inner, dist.TransformedDistribution):
        return inner.base_dist if _same(inner.transforms, transform) else None
    identity = isinstance(_bare(transform), dist.transforms.IdentityTransform)
    return fn if identity else None


def _same(transforms: Any, transform: Any) -> bool:
    """Return whether transforms are the same as another one, their dimensions of events apart."""
    found = [_bare(each) for each in transforms]
    found = [each for each in found if not isinstance(each, dist.transforms.IdentityTransform)]
    wanted = _bare(transform)
    if isinstance(wanted, dist.transforms.IdentityTransform):
        return not found
    return len(found) == 1 and found[0] == wanted


def _bare(transform: Any) -> Any:
    while isinstance(transform, dist.transforms.IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, dist.transforms.ComposeTransform) and len(transform.parts) == 1:
        return _bare(transform.parts[0])
    return transform


def normal_encoding(trace: Mapping[str, Any], run: Run, sites: tuple[Site, ...]) -> Encoding | None:
    """Return local sites of a guide as Normals of packed latents; None if they are not.

    Args:
        trace: of the guide on a batch.
        run: of the model on it.
        sites: the local sites.
    """
    locs, log_scales = {}, {}
    for site in sites:
        found = _normal(trace[site.name]["fn"], run.support(site))
        if found is None:
            return None
        shape = site.batch_shape + site.unconstrained_shape
        for parts, value in zip((locs, log_scales), found, strict=True):
            parts[site.name] = site.flat_rows(jnp.broadcast_to(value, shape), run.plate)
    family = DiagonalNormal()
    block = Block(sites, run.plate, (), {}, family.pair(), None)
    features = {"local": (block.pack(locs), block.pack(log_scales))}
    return Encoding(run, features, {"local": block}, family)


def _normal(fn: dist.Distribution, support: Any) -> tuple[Array, Array] | None:
    """Return ``loc`` and ``log_scale`` of independent Normals of a site's unconstrained values."""
    found: Any = unconstrained_form(fn, support)
    while isinstance(found, WRAPPERS):
        found = found.base_dist
    if isinstance(found, LogScaleNormal):
        return found.loc, found.log_scale
    return (found.loc, jnp.log(found.scale)) if type(found) is dist.Normal else None


def joint_normal(encoding: Encoding) -> Normal | None:
    """Return all latents of each row as one Normal, of which the sites follow each other.

    Returns:
        ``loc`` and a ``scale_tril`` whose diagonal is positive; None if the row's latents are no
        Normal. No head may read values that are drawn.
    """
    locs, trils = [], []
    for name, block in encoding.blocks.items():
        found = block.head.as_normal(block.raw(encoding.features[name], {}))
        if found is None:
            return None
        places = jnp.arange(block.num_values)
        order = jnp.concatenate([part for _, part in block.unpack(places)])
        locs.append(block.flatten(found[0])[..., order])
        trils.append(_over_steps(found[1], len(block.steps))[..., order, :])
    loc = jnp.concatenate(locs, axis=-1)
    return loc, lower_root(jax.vmap(jax.scipy.linalg.block_diag)(*trils))


def of_normal(encoding: Encoding, normal: Normal) -> Encoding:
    """Return an encoding whose latents are those Normals; see `joint_normal`."""
    sites, family = encoding.sites, FullRankNormal()
    head = CholeskyForm(normal[0].shape[-1], family.parameterization)
    block = Block(sites, encoding.run.plate, (), {}, head, None)
    features = {"joint": head.raw_of(*normal)}
    return replace(encoding, features=features, blocks={"joint": block}, family=family, given={})


def either(encoding: Encoding, normal: Normal, share: Float[Array, "batch"]) -> Encoding:
    """Return an encoding whose rows have their Normal where a share is above 0.5.

    Args:
        encoding: of a single head, which is no Normal and knows no steps.
        normal: see `joint_normal`.
        share: of each row.
    """
    [[name, block]] = encoding.blocks.items()
    form = CholeskyForm(block.num_values, FullRankNormal().parameterization)
    head = EitherHead(form, block.release().head)
    raw = RawOfEither(form.raw_of(*normal), block.raw(encoding.features[name], {}), share)
    blocks = {name: Block(block.sites, block.plate, (), {}, head, None)}
    return replace(encoding, features={name: raw}, blocks=blocks)


def _over_steps(tril: Float[Array, "*shape k k"], num_steps: int) -> Float[Array, "batch n n"]:
    """Return the factor of all steps of a row, which are independent."""
    by_step = tril.reshape(tril.shape[0], -1, *tril.shape[-2:]) if num_steps else tril[:, None]
    joined = jnp.einsum("btij,ts->btisj", by_step, jnp.eye(by_step.shape[1], dtype=tril.dtype))
    size = by_step.shape[1] * tril.shape[-1]
    return joined.reshape(-1, size, size)
