"""A head, the sites that it serves, and what it reads beside the features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from numpyro_vae.families import AbstractHead
from numpyro_vae.guides.even_points import transported
from numpyro_vae.model.sites import Plate, Site


class Context(nnx.Module):
    """Lets the head read sampled values: beside the features, and mixed with them.

    Returns ``[features, context, relu(W [features, context])]``, so that a linear head can be
    linear in both, as conjugate models need, and what is between them is learned as well.
    """

    def __init__(self, num_features: int, num_context: int, *, rngs: nnx.Rngs):
        self.mix = nnx.Linear(num_features + num_context, num_features, rngs=rngs)
        self.size = 2 * num_features + num_context

    def __call__(
        self, features: Float[Array, "*b k"], context: Float[Array, "*b c"]
    ) -> Float[Array, "*b m"]:
        """Return features that know the context."""
        both = jnp.concatenate([features, context.astype(features.dtype)], axis=-1)
        return jnp.concatenate([both, nnx.relu(self.mix(both))], axis=-1)


class Released(AbstractHead):
    """A head that is given its raw outputs, so that they can be a datum's own parameters."""

    def __init__(self, head: AbstractHead):
        self.head = head

    def __call__(self, features: Any) -> Any:
        """Return what is given."""
        return features

    def distribution(self, raw: Any) -> dist.Distribution:
        """Return the head's distribution."""
        return self.head.distribution(raw)

    def marginals(self, raw: Any) -> dist.Distribution | None:
        """Return the head's marginals."""
        return self.head.marginals(raw)

    def as_normal(self, raw: Any) -> Any:
        """Return the head's Normal."""
        return self.head.as_normal(raw)

    def part(self, raw: Any, mask: Array) -> dist.Distribution | None:
        """Return the head's distribution with the density of some latents alone."""
        return self.head.part(raw, mask)


class Block(nnx.Module):
    """The distribution over the latents of some local sites, given features and other sites.

    Packed values are ``(..., num_values)``: the sites' values side by side, or, if the features
    are per step, those of the first step, of the second, and so on.

    Args:
        sites: the sites, in the model's order.
        plate: the local plate.
        steps: the shape of the features between their first and last axis.
        reads: the sites whose values it reads, global and local ones: how many leading axes of the
            steps each of them has, so that a step reads its own part.
        head: from features to a distribution over the values of a step.
        context: lets the head read those values; None if it reads none.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        plate: Plate,
        steps: tuple[int, ...],
        reads: Mapping[str, int],
        head: AbstractHead,
        context: Context | None,
    ):
        self.sites, self.plate, self.steps = sites, plate, steps
        self.reads, self.depths = tuple(reads), tuple(reads.values())
        self.head, self.context = head, context

    def release(self) -> Block:
        """Return the block that takes the head's raw outputs in place of features.

        A block that reads other sites makes its raw outputs of these too, and keeps its features.
        """
        if self.context is not None:
            return self
        return Block(self.sites, self.plate, self.steps, {}, Released(self.head), None)

    @property
    def num_values(self) -> int:
        """How many unconstrained values of a datum the block serves."""
        return sum(site.datum_size(self.plate) for site in self.sites)

    def raw(self, features: Any, values: Mapping[str, Array]) -> Any:
        """Return the head's raw outputs.

        Args:
            features: ``(*batch, *steps, k)``, or what the encoder returned in a head's stead.
            values: of the sites in ``reads``, ``(*lead, *batch, size)`` each, unconstrained.

        Returns:
            Arrays ``(*lead, *batch, *steps, ...)``.
        """
        if self.context is None:
            return self.head(features)
        pairs = zip(self.reads, self.depths, strict=True)
        read = [self._read_by_step(values[name], depth) for name, depth in pairs]
        lead = jnp.broadcast_shapes(*(value.shape[:-1] for value in read))
        read = [jnp.broadcast_to(value, (*lead, value.shape[-1])) for value in read]
        context = jnp.concatenate(read, axis=-1)
        shape = jnp.broadcast_shapes(features.shape[:-1], context.shape[:-1])
        features = jnp.broadcast_to(features, (*shape, features.shape[-1]))
        context = jnp.broadcast_to(context, (*shape, context.shape[-1]))
        return self.head(self.context(features, context))

    def _read_by_step(self, value: Array, depth: int) -> Array:
        """Return the values of a site, ``(*batch, *steps, size)``, with 1 for steps it has not."""
        missing = [1] * (len(self.steps) - depth)
        return value.reshape(*value.shape[:-1], *self.steps[:depth], *missing, -1)

    def distribution(
        self, raw: Any, mask: Bool[Array, "*batch num_values"] | None = None
    ) -> dist.Distribution:
        """Return the distribution with the steps in its event, ``(*steps, values of a step)``.

        Args:
            raw: the head's raw outputs.
            mask: the packed values whose density counts, by default all.

        Raises:
            ValueError: if the density of some values is not known.
        """
        if mask is None:
            return self.head.distribution(raw).to_event(len(self.steps))
        kept = self.by_step(mask)
        lead = jnp.broadcast_shapes(kept.shape[:-1], jax.tree.leaves(raw)[0].shape[:-1])
        kept = jnp.broadcast_to(kept, (*lead, kept.shape[-1]))  # a head reads values of each draw
        fn = self.head.part(raw, kept)
        if fn is None and self.num_values == math.prod(self.steps):  # one value in each step
            fn = self.head.distribution(raw).mask(kept[..., 0])
        if fn is None:
            names = [site.name for site in self.sites]
            raise ValueError(
                f"The model masks some of the local sites {names} in plate {self.plate.name!r}; "
                "this family draws all latents of a datum jointly, and does not know the density "
                "of some of them. Use AutoAmortizedMultivariateNormal or AutoAmortizedNormal."
            )
        return fn.to_event(len(self.steps))

    def sample(
        self, raw: Any, rng_key: Array, sample_shape: tuple[int, ...]
    ) -> Float[Array, "*lead num_values"]:
        """Draw packed values."""
        fn = self.distribution(raw)
        return self.flatten(jnp.asarray(fn.sample(rng_key, sample_shape)))

    def transport(
        self, raw: Any, uniform: Float[Array, "num_samples num_values"]
    ) -> Float[Array, "num_samples num_values"]:
        """Return packed values as functions of uniform numbers; see `transported`."""
        return self.flatten(transported(self.distribution(raw), self.by_step(uniform)))

    def log_prob(
        self,
        raw: Any,
        packed: Float[Array, "*lead num_values"],
        mask: Bool[Array, "num_values"] | None,
        is_factorized: bool,
    ) -> Float[Array, "*lead"]:
        """Return the log-density of packed values, of those alone where a mask is True."""
        by_step = self.by_step(packed)
        if mask is None or not is_factorized:
            return jnp.asarray(self.distribution(raw, mask).log_prob(by_step))
        by_value: Any = self.head.marginals(raw)
        return jnp.where(mask, self.flatten(by_value.log_prob(by_step)), 0.0).sum(-1)

    def flatten(self, values: Shaped[Array, "..."]) -> Shaped[Array, "*lead num_values"]:
        """Lay the values of all steps side by side."""
        lead = values.shape[: values.ndim - len(self.steps) - 1]
        return values.reshape(*lead, self.num_values)

    def by_step(self, packed: Shaped[Array, "*lead num_values"]) -> Shaped[Array, "..."]:
        """Return packed values with the axes of the features' steps: undoes `flatten`."""
        return packed.reshape(*packed.shape[:-1], *self.steps, -1)

    def split(
        self, by_step: Shaped[Array, "..."]
    ) -> Iterator[tuple[Site, Shaped[Array, "*lead datum_size"]]]:
        """Yield each site with its part of ``(*lead, *steps, values of a step)``."""
        start, lead = 0, by_step.shape[: by_step.ndim - len(self.steps) - 1]
        for site in self.sites:
            size = site.datum_size(self.plate)
            stop = start + size // math.prod(self.steps)
            yield site, by_step[..., start:stop].reshape(*lead, size)
            start = stop

    def unpack(
        self, packed: Shaped[Array, "*lead num_values"]
    ) -> Iterator[tuple[Site, Shaped[Array, "*lead datum_size"]]]:
        """Yield each site with its part of packed values."""
        yield from self.split(self.by_step(packed))

    def pack(self, parts: Mapping[str, Shaped[Array, "*lead datum_size"]]) -> Shaped[Array, "..."]:
        """Pack the sites' values, ``(*lead, num_values)``: the inverse of `unpack`."""
        by_step = [
            parts[site.name].reshape(*parts[site.name].shape[:-1], *self.steps, -1)
            for site in self.sites
        ]
        return self.flatten(jnp.concatenate(by_step, axis=-1))

    def raw_by_site(self, raw: Any) -> Iterator[tuple[Site, Any]]:
        """Yield each site with its part of the raw outputs of a family that is factorized."""
        leaves, treedef = jax.tree.flatten(raw)
        parts = [dict((site.name, part) for site, part in self.split(leaf)) for leaf in leaves]
        for site in self.sites:
            yield site, jax.tree.unflatten(treedef, [part[site.name] for part in parts])


def features_of(output: Any, block: Block) -> Any:
    """Return a block's part of an encoder's output; a pair packed to one row a datum."""
    names = [site.name for site in block.sites]
    if isinstance(output, tuple):
        return tuple(_pack(part, names) for part in output)
    if isinstance(output, Mapping):
        return output[key_of(output, block.sites[0], block.plate)]
    return output


def key_of(output: Mapping[str, Any], site: Site, plate: Plate) -> str:
    """Return under what name the features of a site stand: its own, or its innermost plate's."""
    names = (site.name, *reversed(site.inner_plates), plate.name)
    return next((name for name in names if name in output), site.name)


def _pack(part: Array | Mapping[str, Array], names: list[str]) -> Float[Array, "batch size"]:
    if not isinstance(part, Mapping):
        return part
    rows = [part[name].reshape(part[name].shape[0], -1) for name in names]
    return jnp.concatenate(rows, axis=-1)
