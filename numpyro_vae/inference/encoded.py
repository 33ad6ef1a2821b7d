"""A batch of rows inside compiled code: drawn from, and scored by the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array
from numpyro.primitives import Messenger

from numpyro_vae.data.batch import Batch
from numpyro_vae.data.shapes import explained
from numpyro_vae.guides.abstract import AbstractEncoding, AbstractGuide
from numpyro_vae.inference.largest import measured
from numpyro_vae.model.densities import level_densities, trace_rows, without_drawn
from numpyro_vae.model.enumeration import Enumeration
from numpyro_vae.model.plates import all_rows
from numpyro_vae.model.redraw import redraw

PAIRS = 8192  # pairs of a row and a draw that pass through the model at once
AT_ONCE = 2**30  # bytes of the largest array that draws pass through at once
OF_ROWS = 2**32 - 3  # of no row: what the keys of discrete latents are folded with first


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trained:
    """What rows are encoded with.

    Attributes:
        params: the trained parameters of guide and model.
        natural_steps: that rows take after the network, see `take_steps`.
        globals_: draws of the global sites that they are given for it.
    """

    params: dict[str, Any]
    globals_: dict[str, Array] = field(default_factory=dict)
    natural_steps: int = field(default=0, metadata={"static": True})


class DrawKeys(NamedTuple):
    """What draws need beside the continuous latents; many have a leading axis.

    Attributes:
        of_rows: the keys that are folded with a row's number, for its discrete latents.
        of_batch: the keys of what is drawn of all rows of a batch at once.
    """

    of_rows: Array
    of_batch: Array

    @classmethod
    def make(cls, rng_key: Array, of_batch: Array) -> DrawKeys:
        """Return them for a user's key, and the keys of a batch."""
        of_rows = jax.random.split(jax.random.fold_in(rng_key, OF_ROWS), len(of_batch))
        return cls(of_rows, of_batch)


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of rows, and what a trained guide says of them, inside a compiled function.

    Attributes:
        guide: the guide.
        batch: the rows.
        hold_rows: the handler that lets the plates hold them.
        args: the model's arguments.
        kwargs: its keyword arguments.
        encoding: what is said of them: by the guide, or by steps of their own after it.
        network: what the guide says of them.
        trained: what it was encoded with, beside the rows.
        pairs: of a row and a draw, how many pass through the model at once.
    """

    guide: AbstractGuide
    trained: Trained
    batch: Batch
    hold_rows: Messenger
    args: tuple
    kwargs: dict[str, Any]
    encoding: AbstractEncoding
    network: AbstractEncoding
    pairs: int = field(default_factory=lambda: PAIRS)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of guide and model."""
        return self.trained.params

    @classmethod
    def encode(
        cls,
        guide: AbstractGuide,
        trained: Trained,
        batch: Batch,
        static_kwargs: dict[str, Any],
    ) -> EncodedBatch:
        """Return what the guide says of the rows of a batch."""
        hold = all_rows(rows=batch.rows)
        layout = batch.layout
        with explained(guide.argument_shapes, *layout.whole(batch.arrays), layout.every_axis):
            args, kwargs = batch.arguments()
            encoding = guide.encode_batch(trained.params, batch, static_kwargs)
        kwargs = {**kwargs, **static_kwargs}
        return cls(guide, trained, batch, hold, args, kwargs, encoding, encoding)

    @property
    def indices(self) -> Array:
        """The numbers of the rows."""
        return self.batch.row_numbers

    def draw(self, rng_key: Array, num_samples: int, globals_: dict[str, Array]) -> Array:
        """Draw packed latents, ``(num_samples, batch, size)``, each given a draw of the globals."""
        row_keys = jax.vmap(partial(jax.random.fold_in, rng_key))(self.indices)
        return self.encoding.condition(globals_).sample(row_keys, num_samples)

    @property
    def enumeration(self) -> Enumeration:
        """The discrete latents that are summed over."""
        return Enumeration.read(self.encoding.run)

    def over_draws(self, fn: Callable[..., Any], *draws: Any, per_draw: int = 1) -> Any:
        """Map a function over the leading axis of draws, in chunks of at most ``pairs`` pairs.

        They are smaller where an array within the function would take more than ``AT_ONCE`` bytes.
        Chunks are of one size, as the function would be compiled a second time for a smaller one:
        some draws are computed twice instead.
        """
        pairs = len(self.indices) * per_draw * self.enumeration.num_combinations
        number = len(jax.tree.leaves(draws)[0])
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), draws)
        fn, num_bytes = measured(fn, *first)
        num_chunks = -(-number // max(1, min(self.pairs // pairs, AT_ONCE // num_bytes)))
        size = -(-number // num_chunks)
        if size * num_chunks > number:
            places = jnp.arange(size * num_chunks).clip(max=number - 1)
            draws = jax.tree.map(lambda x: x[places], draws)
        found = jax.lax.map(lambda args: fn(*args), draws, batch_size=size)
        return jax.tree.map(lambda x: x[:number], found)

    def trace(self, values: dict[str, Array], rng_key: Array, *, observed: bool = True) -> dict:
        """Run the model on the rows, with their observations or with new ones."""
        run, model = self.encoding.run, self.guide.model
        model = model if observed else redraw(model, (run.plate.name, *run.groups))
        values = {**self.params, **values}
        return trace_rows(model, values, self.hold_rows, rng_key, self.args, self.kwargs)

    def log_joint(self, packed: Array, globals_: dict[str, Array], rng_key: Array) -> Array:
        """Return each row's log joint density with a draw, ``(num_combinations, batch)``.

        The density is that of the data, the unconstrained latents and each combination of values
        of the row's discrete ones; those in plates within the row are summed over. Where the model
        scales the latents of a row by a factor, all is divided by it: of so scaled a model the ELBO
        is largest at the posterior of this density.
        """
        return self.enumeration.of_rows(self.tables(packed, globals_, rng_key))

    def log_densities(
        self, packed: Array, globals_: dict[str, Array], rng_key: Array
    ) -> tuple[Array, Array]:
        """Return what `log_joint` does, and the part of it that is the prior's."""
        joint = self.log_joint(packed, globals_, rng_key)
        prior = self.tables(packed, globals_, rng_key, observed=False)
        return joint, self.enumeration.of_rows(prior)

    def tables(
        self,
        packed: Array,
        globals_: dict[str, Array],
        rng_key: Array,
        *,
        observed: bool = True,
    ) -> list[Array]:
        """Return the log joint densities of a draw by level, see `Enumeration.add_up`.

        Args:
            packed: the draw.
            globals_: the global sites.
            rng_key: for what has no value.
            observed: whether the data count, or the prior alone.
        """
        values, log_det = self.encoding.constrain(packed)
        run, enumeration = self.encoding.run, self.enumeration
        scale = jnp.ones(len(self.indices)) if self.row_scale is None else self.row_scale

        def one(combination: Array) -> tuple[Array, list[Array], Array]:
            discrete = enumeration.everywhere(combination, len(self.indices))
            given = values | globals_ | discrete
            trace = without_drawn(self.trace(given, rng_key), given)
            rest, tables, factor = level_densities(trace, run, enumeration, observed=observed)
            if factor is not None:
                return rest / scale, tables, factor / scale
            tables = [x / scale.reshape(-1, *[1] * (x.ndim - 1)) for x in tables]
            return rest / scale, tables, jnp.ones_like(scale)

        found = jax.vmap(one)(jnp.arange(enumeration.num_combinations))
        (rest, power), tables = (found[0][0], found[2][0]), enumeration.add_up(found[1])
        total = logsumexp(enumeration.of_rows(tables), axis=0)
        rest += log_det + jnp.where(jnp.isfinite(total), (power - 1) * total, 0.0)
        return [tables[0] + rest, *tables[1:]]

    @property
    def row_scale(self) -> Array | None:
        """The factor that the model gives the latents of a row, by row; None if it gives none."""
        sites = self.encoding.sites or self.enumeration.sites
        return self.encoding.run.row_scale(sites)

    def log_weight(self, packed: Array, globals_: dict[str, Array], rng_key: Array) -> Array:
        """Return the log importance weight of a draw of each row."""
        log_q = self.encoding.condition(globals_).log_prob(packed)
        return logsumexp(self.log_joint(packed, globals_, rng_key), axis=0) - log_q

    def complete(self, packed: Array, globals_: dict[str, Array], keys: DrawKeys) -> dict:
        """Return the values of all latents of a draw, with the discrete ones drawn given it."""
        values, _ = self.encoding.constrain(packed)
        if self.enumeration.sites:
            tables = self.tables(packed, globals_, keys.of_batch)
            row_keys = jax.vmap(partial(jax.random.fold_in, keys.of_rows))(self.indices)
            values |= self.enumeration.draw(row_keys, tables)
        return values | globals_
