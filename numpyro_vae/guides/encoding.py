"""What heads say of a batch: a distribution over the latents of each datum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped
from numpyro.distributions import biject_to

from numpyro_vae.families import AbstractFamily
from numpyro_vae.guides.abstract import AbstractEncoding
from numpyro_vae.guides.blocks import Block
from numpyro_vae.guides.even_points import even_points
from numpyro_vae.model.sites import Site

__all__ = ["Encoding"]


@dataclass(frozen=True)
class Encoding(AbstractEncoding):
    """What heads say of a batch of data; packed in the order of the blocks.

    Attributes:
        features: what each block reads of the data, by its name.
        blocks: the heads, in the order in which they are sampled.
        family: what they mean.
        given: unconstrained values of the global sites that the heads read, ``(*lead, size)``
            each; a guide without ``condition_on`` needs none.
    """

    features: Mapping[str, Any]
    blocks: Mapping[str, Block]
    family: AbstractFamily
    given: Mapping[str, Array] = field(default_factory=dict)
    has_features: ClassVar[bool] = True

    @property
    def sites(self) -> tuple[Site, ...]:
        """The local sites as they are in this batch, in packing order."""
        return tuple(site for block in self.blocks.values() for site in block.sites)

    def release(self) -> Encoding:
        """Return the same encoding with each datum's own variational parameters as features.

        They are the raw outputs of the heads; of a head that reads other sites, its features.
        """
        features = {
            name: self.features[name] if block.context else block.raw(self.features[name], {})
            for name, block in self.blocks.items()
        }
        blocks = {name: block.release() for name, block in self.blocks.items()}
        return replace(self, features=features, blocks=blocks)

    def condition(self, values: Mapping[str, Array]) -> Encoding:
        """Return the encoding given values of the global sites.

        Args:
            values: by site name; any number of leading axes of draws, and sites that no head
                reads are ignored.
        """
        local = {site.name for site in self.sites}
        reads = {name for block in self.blocks.values() for name in block.reads} - local
        return replace(self, given={name: self._flat(name, values[name]) for name in reads})

    def _flat(self, name: str, value: Array) -> Array:
        """Return a global site's value, unconstrained and flat, draws in front."""
        site = self.run.sites.sites[name]
        shape = site.batch_shape + site.event_shape
        lead = jnp.shape(value)[: jnp.ndim(value) - len(shape)]
        return (
            biject_to(self.run.support(site))
            .inv(jnp.broadcast_to(value, lead + shape))
            .reshape(*lead, -1)
        )

    def sample(
        self, row_keys: Shaped[Array, "batch *key"], num_samples: int
    ) -> Float[Array, "num_samples batch size"]:
        """Draw packed latents, each row from its own key.

        If global sites were given with an axis of draws, it is that of these draws.
        """

        def one_row(features: dict, rng_key: Array) -> Array:
            values: dict[str, Array] = dict(self.given)
            drawn = []
            for number, (name, block) in enumerate(self.blocks.items()):
                raw = block.raw(features[name], values)
                key = jax.random.fold_in(rng_key, number) if number else rng_key
                shape = () if self._has_draws(block) else (num_samples,)
                drawn.append(block.sample(raw, key, shape))
                values |= {site.name: part for site, part in block.unpack(drawn[-1])}
            return jnp.concatenate([*drawn, jnp.zeros((num_samples, 0))], axis=-1)

        return jax.vmap(one_row, out_axes=1)(dict(self.features), row_keys)

    def sample_evenly(
        self, row_keys: Shaped[Array, "batch *key"], num_samples: int
    ) -> Float[Array, "num_samples batch size"]:
        """Draw packed latents that are spread evenly, so that their means have less error.

        Each is a draw of the guide, but together they are functions of a randomly shifted lattice
        (*randomized quasi-Monte Carlo*; see `even_points`). Of a family that is not made of
        independent noise with known quantiles they are independent, as those of `sample`.

        Args:
            row_keys: a key for each row.
            num_samples: how many.
        """

        def one_row(features: dict, rng_key: Array) -> Array:
            values, start, drawn = dict(self.given), 0, []
            size = sum(block.num_values for block in self.blocks.values())
            uniform = even_points(rng_key, num_samples, size)
            for name, block in self.blocks.items():
                part = uniform[:, start : start + block.num_values]
                drawn.append(block.transport(block.raw(features[name], values), part))
                values |= {site.name: part for site, part in block.unpack(drawn[-1])}
                start += block.num_values
            return jnp.concatenate([*drawn, jnp.zeros((num_samples, 0))], axis=-1)

        try:
            return jax.vmap(one_row, out_axes=1)(dict(self.features), row_keys)
        except NotImplementedError:  # of a distribution without quantiles
            return self.sample(row_keys, num_samples)

    @property
    def is_factorized(self) -> bool:
        """Whether the family is."""
        return self.family.is_factorized

    @property
    def reads_globals(self) -> bool:
        """Whether a head reads global sites."""
        local = {site.name for site in self.sites}
        return any(set(block.reads) - local for block in self.blocks.values())

    def _has_draws(self, block: Block) -> bool:
        """Whether a block's raw outputs differ by draw: if it reads what does."""
        return any(
            self.given[name].ndim > 1 if name in self.given else True for name in block.reads
        )

    def log_prob(self, packed: Float[Array, "*lead batch size"]) -> Float[Array, "*lead batch"]:
        """Return the log-density of each datum's packed latents; what is masked does not count."""
        return self._over_rows(self._log_prob_of_row, packed)

    def _log_prob_of_row(self, features: dict, mask: Any, packed: Array) -> Array:
        values: dict[str, Array] = dict(self.given)
        total, start = jnp.zeros(packed.shape[:-1], packed.dtype), 0
        for name, block in self.blocks.items():
            part = packed[..., start : start + block.num_values]
            raw = block.raw(features[name], values)
            counts = mask[start : start + block.num_values] if self._is_masked(block) else None
            total += block.log_prob(raw, part, counts, self.family.is_factorized)
            values |= {site.name: unpacked for site, unpacked in block.unpack(part)}
            start += block.num_values
        return total

    def log_prob_of(
        self, name: str, packed: Float[Array, "*lead batch size"]
    ) -> Float[Array, "*lead batch"]:
        """Return the log-density of each datum's latents of one site; see `AbstractEncoding`."""
        return self._over_rows(partial(self._log_prob_of_site, name), packed)

    def _log_prob_of_site(self, name: str, features: dict, mask: Any, packed: Array) -> Array:
        values, start = dict(self.given), 0
        for block_name, block in self.blocks.items():
            stop, sizes = start + block.num_values, {x.name: x.datum_size for x in block.sites}
            part = packed[..., start:stop]
            if name in sizes:
                mine = block.pack(
                    {x: jnp.full(size(self.run.plate), x == name) for x, size in sizes.items()}
                )
                counts = mine if mask is None else mine & mask[start:stop]
                whole = len(sizes) == 1 and not self._is_masked(block)
                given = block.raw(features[block_name], values), part, None if whole else counts
                return block.log_prob(*given, self.family.is_factorized)
            values |= {site.name: unpacked for site, unpacked in block.unpack(part)}
            start = stop
        raise KeyError(name)

    def _is_masked(self, block: Block) -> bool:
        """Whether the model masks latents of a block."""
        return any(self.run.mask(site) is not None for site in block.sites)

    def _over_rows(self, fn: Callable[..., Array], packed: Array) -> Array:
        """Apply a function of a row's features, mask and packed latents to all rows."""
        axis = packed.ndim - 2
        mapped = jax.vmap(fn, in_axes=(0, None if self.mask is None else 0, axis), out_axes=axis)
        return mapped(dict(self.features), self.mask, packed)

    def marginal(
        self, fn: Callable[[Any], Array], packed: Float[Array, "batch size"] | None = None
    ) -> Float[Array, "batch size"]:
        """Return a function of the distribution of every packed latent by itself.

        Args:
            fn: from distributions to an array of the same batch shape, such as their mean.
            packed: a draw, for heads that read other local sites; the distribution of a latent is
                then given those.

        Raises:
            ValueError: if that distribution is not known in closed form.
        """
        found = [] if self.blocks else [jnp.zeros((self.run.plate.length, 0))]
        for block, marginals in self._marginals(packed):
            if marginals is None:
                raise ValueError(
                    f"The distribution of the sites {[site.name for site in block.sites]} in plate "
                    f"{self.run.plate.name!r}, one by one, is not known in closed form: they have "
                    f"the family {type(self.family).__name__} and read the sites "
                    f"{list(block.reads)}. Sample from the guide instead."
                )
            found.append(block.flatten(fn(marginals)))
        return jnp.concatenate(found, axis=-1)

    def has_marginals(self, packed: Float[Array, "batch size"] | None = None) -> bool:
        """Return whether `marginal` knows the distribution of every latent."""
        return all(marginals is not None for _, marginals in self._marginals(packed))

    def _marginals(self, packed: Array | None) -> Iterator[tuple[Block, Any]]:
        """Yield each block with the marginals of its latents, None if they are not known."""
        values, start = dict(self.given), 0
        local = {site.name for site in self.sites}
        for name, block in self.blocks.items():
            if packed is None and local & set(block.reads):
                yield block, None
                continue
            yield block, block.head.marginals(block.raw(self.features[name], values))
            if packed is not None:
                part = packed[..., start : start + block.num_values]
                values |= {site.name: unpacked for site, unpacked in block.unpack(part)}
                start += block.num_values

    def unpack(self, packed: Float[Array, "*lead batch size"]) -> Iterator[tuple[Site, Array]]:
        """Yield each site with its unconstrained value, ``(*lead, *batch_shape, ...)``."""
        start = 0
        for block in self.blocks.values():
            part = packed[..., start : start + block.num_values]
            for site, values in block.unpack(part):
                yield site, site.unpack(values, self.run.plate)
            start += block.num_values

    def pack_rows(self, rows: Mapping[str, Shaped[Array, "batch k"]]) -> Shaped[Array, "batch n"]:
        """Pack what each datum has of the sites, ``(batch, datum_size)`` each."""
        return jnp.concatenate([block.pack(rows) for block in self.blocks.values()], axis=-1)
