"""The ELBO in which the first nats of information in a latent cost nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import kl_divergence
from numpyro.distributions.util import scale_and_mask

from numpyro_vae.model.trace import is_point
from numpyro_vae.numpyro_internals import mask_of_masked
from numpyro_vae.objectives.base import AbstractDivergence
from numpyro_vae.objectives.traces import (
    Site,
    Trace,
    divergence_of,
    samples,
    scaled_log_prob,
    total,
)

__all__ = ["FreeBitsELBO"]


class Group(NamedTuple):
    """Dimensions whose divergence is compared with what is free.

    Attributes:
        divergence: summed over rows; one number, or one for each dimension.
        size: how many rows times dimensions each of these numbers is of.
    """

    divergence: Any
    size: Any


class Terms(NamedTuple):
    """The parts of the objective, of which none is free but the groups."""

    log_likelihood: Any
    divergence: Any
    groups: Any


class FreeBitsELBO(AbstractDivergence):
    r"""The ELBO in which a latent's divergence from its prior costs nothing below a threshold.

    .. math::
        \mathbb{E}_q \log p(x \mid z) - \sum_j \max\Big(N \lambda,
        \sum_{i=1}^N \mathrm{KL}(q(z_{ij} \mid x_i) \,\|\, p(z_{ij}))\Big)

    over the dimensions :math:`j` of local sites (Kingma et al. 2016, eq. 15): on average over the
    batch each may hold :math:`\lambda` nats for free, and so does not collapse. Divergences are
    those of NumPyro's ``TraceMeanField_ELBO``: analytic where there is a closed form, and sampled
    elsewhere. A site whose divergence is not a sum over its dimensions is compared as a whole with
    :math:`\lambda` times their number, and so are the sites of a joint family together. Only sites
    in a plate have free bits; the average is over all plates that they are in.

    `fit` computes losses on validation data with the ELBO itself.

    Args:
        nats: :math:`\lambda`, by dimension.
        num_particles: how many particles are averaged, before they are compared.
        vectorize_particles: as in every ELBO of NumPyro's.

    Raises:
        ValueError: if ``nats`` is negative.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, optax, numpyro.distributions as dist
        >>> from numpyro.infer import SVI
        >>> from numpyro_vae import AutoAmortizedNormal
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-3), FreeBitsELBO(0.1))
        >>> svi.run(jax.random.key(0), 3, jnp.zeros(4), progress_bar=False).losses.shape
        (3,)
    """

    def __init__(
        self,
        nats: float,
        num_particles: int = 1,
        vectorize_particles: bool | Callable[..., Any] = True,
    ):
        if not nats >= 0:
            raise ValueError(f"nats is {nats}, expected a number from 0 on.")
        super().__init__(num_particles, vectorize_particles)
        self.nats = nats

    def terms(self, guide_trace: Trace, model_trace: Trace) -> Terms:
        """Return the log likelihood, the divergences of global sites, and those of local ones."""
        likelihood, divergence, groups, joint = [], [], [], []
        own = [site for name, site in samples(guide_trace).items() if name not in model_trace]
        is_joint = any(site["cond_indep_stack"] for site in own)
        for name, site in samples(model_trace).items():
            if site["is_observed"]:
                likelihood.append(scaled_log_prob(site).sum())
            elif not site["cond_indep_stack"]:
                divergence.append(divergence_of(guide_trace[name], site).sum())
            elif is_joint and is_point(guide_trace[name]["fn"]):
                joint.append(_whole(guide_trace[name], site))
            else:
                groups.append(_by_dimension(guide_trace[name], site))
        for site in own:
            found = scaled_log_prob(site).sum()
            if joint and site["cond_indep_stack"]:
                joint.append(Group(found, 0.0))
            else:
                divergence.append(found)
        if joint:
            groups.append(Group(*map(total, zip(*joint, strict=True))))
        return Terms(total(likelihood), total(divergence), groups)

    def combine(self, terms: Terms, params: dict[str, Any]) -> Array:
        """Return minus the objective."""
        del params
        costs = (jnp.maximum(self.nats * size, found).sum() for found, size in terms.groups)
        return terms.divergence + total(costs) - terms.log_likelihood


def _whole(guide_site: Site, model_site: Site) -> Group:
    """Return a site as one group."""
    fn = guide_site["fn"]
    masks = [mask for mask, _ in _masks(model_site["fn"])]
    size = _counted(guide_site["scale"], masks, fn.batch_shape).sum() * math.prod(fn.event_shape)
    return Group(divergence_of(guide_site, model_site).sum(), size)


def _by_dimension(guide_site: Site, model_site: Site) -> Group:
    """Return the dimensions of a site as groups, if its divergence is a sum over them."""
    guide, model = (_values(site["fn"]) for site in (guide_site, model_site))
    if guide.event_shape or model.event_shape:
        return _whole(guide_site, model_site)
    try:
        found = kl_divergence(guide, model)
    except NotImplementedError:
        value = guide_site["value"]
        found = guide.log_prob(value) - model.log_prob(value)
    fn = guide_site["fn"]
    shape = (*fn.batch_shape, *fn.event_shape)
    masks = [
        jnp.reshape(mask, (*jnp.shape(mask), *[1] * missing))
        for of in (guide_site, model_site)
        for mask, missing in _masks(of["fn"])
    ]
    scale = guide_site["scale"]
    if scale is not None:
        scale = jnp.reshape(scale, (*jnp.shape(scale), *[1] * len(fn.event_shape)))
    counted = _counted(scale, masks, shape)
    rows = tuple(range(len(fn.batch_shape)))
    found = jnp.where(counted > 0, jnp.broadcast_to(found, shape), 0.0)
    return Group((counted * found).sum(rows), counted.sum(rows))


def _counted(scale: Any, masks: list[Any], shape: tuple[int, ...]) -> Array:
    """Return what each value counts: its scale, and 0 where it is masked."""
    counted = jnp.broadcast_to(1.0 if scale is None else jnp.asarray(scale), shape)
    for mask in masks:
        counted = scale_and_mask(counted, mask=mask)
    return counted


def _layers(fn: Any) -> Iterator[Any]:
    """Yield a distribution and those inside it that hold its values one by one."""
    yield fn
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
        yield fn


def _values(fn: Any) -> Any:
    """Return the distribution of single values, without masks."""
    *_, last = _layers(fn)
    return last


def _masks(fn: Any) -> Iterator[tuple[Any, int]]:
    """Yield the masks of a distribution, and how many axes of values each lacks on the right."""
    for layer in _layers(fn):
        if isinstance(layer, dist.MaskedDistribution):
            yield mask_of_masked(layer), len(layer.event_shape)
