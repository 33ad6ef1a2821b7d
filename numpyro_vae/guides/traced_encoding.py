"""What a guide of any distributions says of a batch: read off its traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Shaped
from numpyro.distributions import biject_to

from numpyro_vae.data.batch import Batch
from numpyro_vae.guides.abstract import AbstractEncoding
from numpyro_vae.guides.normal_form import unconstrained_form
from numpyro_vae.model.enumeration import Enumeration
from numpyro_vae.model.provenance import Names
from numpyro_vae.model.run import Run
from numpyro_vae.model.sites import Plate, Site

DRAWS = 1024  # at once
Trace = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class TracedEncoding(AbstractEncoding):
    """What a guide says of a batch of data: it is run for each draw, and for each density.

    Attributes:
        trace: ``trace(batch, values=, rng_key=)`` runs the guide on a batch.
        batch: the rows.
        local: the local sites, in packing order.
        given: values of the global sites, by name, with axes of draws in front or without.
        discrete: the discrete sites that the guide draws; its density is summed over them.
        plates: by site of the guide, the plates around it.
        reads: by site of the guide, what its distribution is computed from.
    """

    trace: Trace
    batch: Batch
    local: tuple[Site, ...]
    given: Mapping[str, Array] = field(default_factory=dict)
    discrete: tuple[Site, ...] = ()
    plates: Mapping[str, Names] = field(default_factory=dict)
    reads: Mapping[str, Names] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The local sites."""
        return self.local

    def condition(self, values: Mapping[str, Array]) -> TracedEncoding:
        """Return the encoding given values of the global sites."""
        known = {name: self.run.sites.sites[name] for name in values}
        local = {site.name for site in self.local}
        return replace(self, given={name: values[name] for name in known if name not in local})

    def sample(
        self, row_keys: Shaped[Array, "batch *key"], num_samples: int
    ) -> Float[Array, "num_samples batch size"]:
        """Draw packed latents, each row from its own key, but where rows are not to be parted."""
        if not (self.batch.cuts or self.batch.fills_plate):
            return self._draw(self.batch, row_keys[0], num_samples)

        def one_row(index: Array, rng_key: Array) -> Array:
            return self._draw(self.batch.at(index[None]), rng_key, num_samples)[:, 0]

        return jax.vmap(one_row, out_axes=1)(self.batch.indices, row_keys)

    def sample_evenly(
        self, row_keys: Shaped[Array, "batch *key"], num_samples: int
    ) -> Float[Array, "num_samples batch size"]:
        """Draw as `sample` does, as it is not known what draws are functions of."""
        return self.sample(row_keys, num_samples)

    @property
    def is_factorized(self) -> bool:
        """Return False: how they are drawn is the guide's own."""
        return False

    @property
    def reads_globals(self) -> bool:
        """Return True, as the guide is run given them."""
        return True

    def _draw(self, batch: Batch, rng_key: Array, num_samples: int) -> Array:
        def one(args: tuple[Array, dict[str, Array]]) -> Array:
            trace = self.trace(batch, values=args[1], rng_key=args[0])
            rows = {site.name: self._unconstrained(site, trace[site.name]) for site in self.local}
            return self.pack_rows(rows)

        given = {
            name: self._by_draw(name, value, num_samples) for name, value in self.given.items()
        }
        keys = jax.random.split(rng_key, num_samples)
        return jax.lax.map(one, (keys, given), batch_size=min(DRAWS, num_samples))

    def _by_draw(self, name: str, value: Array, num_samples: int) -> Array:
        """Return the values of a global site with an axis of draws."""
        site = self.run.sites.sites[name]
        has_draws = value.ndim > len(site.batch_shape + site.event_shape)
        return value if has_draws else jnp.broadcast_to(value, (num_samples, *value.shape))

    def _unconstrained(self, site: Site, msg: Mapping[str, Any]) -> Array:
        value = biject_to(self.run.support(site)).inv(msg["value"])
        return site.flat_rows(value, self.run.plate)

    def log_prob(self, packed: Float[Array, "*lead batch size"]) -> Float[Array, "*lead batch"]:
        """Return the log-density of each datum's packed latents."""
        flat = packed.reshape(-1, *packed.shape[-2:])
        found = jax.lax.map(self._log_prob, flat, batch_size=min(DRAWS, len(flat)))
        return found.reshape(packed.shape[:-1])

    def _log_prob(self, packed: Array) -> Array:
        enumeration = Enumeration.of(self.run, self.discrete, self.plates, self.reads)

        def given(combination: Array) -> list[Array]:
            chosen = enumeration.everywhere(combination, packed.shape[0])
            return self._log_prob_given(packed, chosen, enumeration)

        tables = jax.vmap(given)(jnp.arange(enumeration.num_combinations))
        return logsumexp(enumeration.of_rows(enumeration.add_up(tables)), axis=0)

    def _log_prob_given(
        self, packed: Array, discrete: Mapping[str, Array], enumeration: Enumeration
    ) -> list[Array]:
        """Return by level the log-density of packed latents and of values of the discrete sites."""
        values, _ = self.constrain(packed)
        trace = self.trace(self.batch, values={**self.given, **values, **discrete})
        parts = [
            (site, trace[site.name]["fn"].log_prob(discrete[site.name])) for site in self.discrete
        ]
        for site, unconstrained in self.unpack(packed):
            parts += [(site, x) for x in self._log_probs(site, trace, values, unconstrained)]
        totals = [jnp.zeros((packed.shape[0], *level.lengths)) for level in enumeration.levels]
        for site, log_prob in parts:
            place = enumeration.places.get(site.name, 0)
            totals[place] += _by_entry(log_prob, site, self.run, enumeration.levels[place].plates)
        return totals

    def _log_probs(
        self, site: Site, trace: dict[str, Any], values: Mapping[str, Array], unconstrained: Array
    ) -> list[Array]:
        """Return what adds up to the log-density of a site's unconstrained value."""
        support = self.run.support(site)
        fn = unconstrained_form(trace[site.name]["fn"], support)
        if fn is not None:
            return [jnp.asarray(fn.log_prob(unconstrained))]
        log_prob = trace[site.name]["fn"].log_prob(values[site.name])
        log_det = biject_to(support).log_abs_det_jacobian(unconstrained, values[site.name])
        return [log_prob, log_det]

    def marginal(
        self, fn: Callable[[Any], Array], packed: Float[Array, "batch size"] | None = None
    ) -> Float[Array, "batch size"]:
        """Raise ValueError: what is not a Normal is known by its draws and their densities."""
        self._raise_unknown()

    def log_prob_of(
        self, name: str, packed: Float[Array, "*lead batch size"]
    ) -> Float[Array, "*lead batch"]:
        """Raise ValueError, as `marginal` does."""
        self._raise_unknown()

    def _raise_unknown(self) -> NoReturn:
        raise ValueError(
            f"The guide's distributions of the sites {[site.name for site in self.local]} in plate "
            f"{self.run.plate.name!r} are no Normals of their unconstrained values, whose location "
            "and scale could be said. Sample from the guide instead."
        )

    def has_marginals(self, packed: Float[Array, "batch size"] | None = None) -> bool:
        """Return False."""
        return False

    def unpack(self, packed: Float[Array, "*lead batch size"]) -> Iterator[tuple[Site, Array]]:
        """Yield each site with its unconstrained value, ``(*lead, *batch_shape, ...)``."""
        start = 0
        for site in self.local:
            stop = start + site.datum_size(self.run.plate)
            yield site, site.unpack(packed[..., start:stop], self.run.plate)
            start = stop

    def pack_rows(self, rows: Mapping[str, Shaped[Array, "batch k"]]) -> Shaped[Array, "batch n"]:
        """Pack what each datum has of the sites, ``(batch, datum_size)`` each."""
        return jnp.concatenate([rows[site.name] for site in self.local], axis=-1)


def _by_entry(
    log_prob: Array, site: Site, run: Run, plates: Sequence[Plate]
) -> Float[Array, "batch ..."]:
    """Return a log-density of a site's values summed over all but the plate and some others."""
    axes = [site.axis(plate) for plate in (run.plate, *plates)]
    rows = jnp.moveaxis(log_prob, axes, range(len(axes)))
    return rows.reshape(*rows.shape[: len(axes)], -1).sum(-1)
