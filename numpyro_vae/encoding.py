"""What a guide says of a batch: a distribution over the latents of each datum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key
from numpyro.distributions import biject_to

from numpyro_vae.distributions import LogScaleNormal
from numpyro_vae.families import DiagonalNormal
from numpyro_vae.runs import Run
from numpyro_vae.sites import Site

__all__ = ["Encoding"]


@dataclass(frozen=True)
class Encoding:
    """What the guide says of a batch of data.

    Attributes:
        raw: the network's outputs, a row a datum.
        family: what they mean.
        sites: the local sites as they are in this batch, in packing order.
        run: the run of the model that was read.
    """

    raw: Any
    family: DiagonalNormal
    sites: tuple[Site, ...]
    run: Run

    @property
    def distribution(self) -> dist.Distribution:
        """The distribution over packed unconstrained latents, ``batch_shape == (batch,)``."""
        return self.family.distribution(self.raw)

    @property
    def normal(self) -> LogScaleNormal:
        """The Normals of the packed latents one by one, ``batch_shape == (batch, size)``."""
        return self.family.normal(self.raw)

    def sample(
        self, row_keys: Key[Array, "batch"], num_samples: int
    ) -> Float[Array, "num_samples batch size"]:
        """Draw packed unconstrained latents, each row from its own key."""

        def one_row(raw: Any, rng_key: Array) -> Array:
            return jnp.asarray(self.family.distribution(raw).sample(rng_key, (num_samples,)))

        return jax.vmap(one_row, out_axes=1)(self.raw, row_keys)

    def unpack(self, packed: Float[Array, "*lead batch size"]) -> Iterator[tuple[Site, Array]]:
        """Yield each site with its unconstrained value, ``(*lead, *batch_shape, ...)``."""
        start = 0
        for site in self.sites:
            stop = start + site.datum_size(self.run.plate)
            yield site, site.unpack(packed[..., start:stop], self.run.plate)
            start = stop

    def constrain(
        self, packed: Float[Array, "*lead batch size"]
    ) -> tuple[dict[str, Array], Float[Array, "*lead batch"]]:
        """Map packed unconstrained latents to the sites' supports.

        Returns:
            The values by site name, and the log-determinant of the map for each datum, so that
            ``log q(values) = log q(packed) - log_det``.
        """
        values, log_det = {}, jnp.zeros(packed.shape[:-1], packed.dtype)
        lead = packed.ndim - 2
        for site, unconstrained in self.unpack(packed):
            transform = biject_to(self.run.support(site))
            values[site.name] = transform(unconstrained)
            log_dets = transform.log_abs_det_jacobian(unconstrained, values[site.name])
            rows = jnp.moveaxis(log_dets, lead + site.axis(self.run.plate), lead)
            log_det += rows.sum(tuple(range(lead + 1, rows.ndim)))
        return values, log_det
