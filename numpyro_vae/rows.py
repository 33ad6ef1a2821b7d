"""What is computed for a batch of rows in compiled code, and how batches are put together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Key
from numpyro.primitives import Messenger

from numpyro_vae.batches import ArrayData, Layout, padded_batches, prefetch
from numpyro_vae.densities import predict_rows, row_densities, row_divergences
from numpyro_vae.encoding import Encoding
from numpyro_vae.guide import AutoAmortizedNormal
from numpyro_vae.plates import all_rows, minibatch

PAIRS = 8192  # pairs of a row and a draw that pass through the model at once


@dataclass(frozen=True)
class View:
    """A batch of rows in compiled code, encoded.

    Attributes:
        guide: the guide.
        params: its parameters and the model's.
        rows: the handler that lets the plate hold these rows.
        indices: their numbers.
        args: the model's arguments.
        kwargs: its keyword arguments.
        encoding: what the guide says of them.
    """

    guide: AutoAmortizedNormal
    params: dict[str, Any]
    rows: Messenger
    indices: Array
    args: tuple
    kwargs: dict[str, Any]
    encoding: Encoding

    @classmethod
    def build(
        cls,
        guide: AutoAmortizedNormal,
        params: dict[str, Any],
        arrays: tuple[Array, ...],
        indices: Array,
        *,
        layout: Layout,
        subsamples: bool,
        static_kwargs: dict[str, Any],
    ) -> View:
        """Cut the rows out of the data, or let the model's plate select them, and encode them."""
        if subsamples:
            name, num_data = guide.plate.name, layout.num_data(arrays)
            rows = minibatch(plate=name, num_data=num_data, indices=indices)
            args, kwargs = layout.whole(arrays)
        else:
            rows = all_rows()
            args, kwargs = layout.rows(arrays, indices)
        kwargs = {**kwargs, **static_kwargs}
        encoding = guide.encode_rows(rows, params, args, kwargs)
        return cls(guide, params, rows, indices, args, kwargs, encoding)

    def draw(self, rng_key: Array, num_samples: int) -> Array:
        """Draw packed unconstrained latents, ``(num_samples, batch, size)``."""
        return self.encoding.sample(self._row_keys(rng_key), num_samples)

    def _row_keys(self, rng_key: Array) -> Key[Array, "batch"]:
        return jax.vmap(partial(jax.random.fold_in, rng_key))(self.indices)

    def over_draws(self, fn: Callable[..., Any], *draws: Any, per_draw: int = 1) -> Any:
        """Map a function over the leading axis of draws, as many at once as memory likes."""
        at_once = max(1, PAIRS // (len(self.indices) * per_draw))
        return jax.lax.map(lambda args: fn(*args), draws, batch_size=at_once)

    def model_arguments(self, values: dict[str, Array], rng_key: Array) -> dict[str, Any]:
        """Return what the functions of `numpyro_vae.densities` take."""
        return {
            "model": self.guide.model,
            "values": {**self.params, **values},
            "rows": self.rows,
            "rng_key": rng_key,
            "args": self.args,
            "kwargs": self.kwargs,
        }


def encode(view: View) -> dict[str, tuple[Array, ...]]:
    """Return ``loc`` and ``scale`` by site, the plate's axis in front."""
    normal, plate = view.encoding.normal, view.encoding.run.plate
    parts = zip(*map(view.encoding.unpack, (normal.loc, normal.scale)), strict=True)
    return {
        site.name: tuple(jnp.moveaxis(x, site.axis(plate), 0) for x in (loc, scale))
        for (site, loc), (_, scale) in parts
    }


def observed(view: View) -> dict[str, Array]:
    """Return the observed sites of the plate, the plate's axis in front."""
    run = view.encoding.run
    sites = run.sites.observed(run.plate.name)
    return {site.name: site.rows(run.trace[site.name]["value"], run.plate) for site in sites}


def sample(view: View, rng_key: Array, *, num_samples: int, names: tuple[str, ...]) -> dict:
    """Return draws by site, ``(num_samples, batch, ...)``."""
    values, _ = view.encoding.constrain(view.draw(rng_key, num_samples))
    axes = {site.name: site.axis(view.encoding.run.plate) for site in view.encoding.sites}
    return {name: jnp.moveaxis(values[name], 1 + axes[name], 1) for name in names}


def predict(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return draws of the observed and deterministic sites, ``(num_samples, batch, ...)``."""
    noise_key = jax.random.fold_in(jax.random.fold_in(rng_key, num_samples), view.indices[0])

    def one(packed: Array, globals_: dict, rng_key: Array) -> dict:
        values, _ = view.encoding.constrain(packed)
        arguments = view.model_arguments(values | globals_, rng_key)
        return predict_rows(plate=view.guide.plate.name, **arguments)

    keys = jax.random.split(noise_key, num_samples)
    return view.over_draws(one, view.draw(rng_key, num_samples), globals_, keys)


def weigh(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return the log importance weights of `View.draw`, ``(num_samples, batch)``."""
    packed = view.draw(rng_key, num_samples)
    log_q = view.encoding.distribution.log_prob(packed)
    log_p = view.over_draws(partial(_log_joint, view, rng_key), packed, globals_)
    return {"log_weights": log_p - log_q}


def draws(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict[str, dict]:
    """Return by ArviZ group what is drawn, all ``(num_samples, batch, ...)``.

    The latents are drawn once; deterministic sites belong to the posterior.
    """
    names = tuple(site.name for site in view.encoding.sites)
    posterior = sample(view, rng_key, num_samples=num_samples, names=names)
    predicted = predict(view, rng_key, globals_, num_samples=num_samples)
    for name in view.encoding.run.sites.deterministic:
        if name in predicted:
            posterior[name] = predicted.pop(name)
    return {
        "posterior": posterior,
        "posterior_predictive": predicted,
        "sample_stats": weigh(view, rng_key, globals_, num_samples=num_samples),
    }


def evidence(
    view: View, rng_key: Array, globals_: dict, *, num_samples: int, particles: int
) -> dict:
    """Return the log mean weight of ``particles`` draws for each draw of the globals."""

    def one(key: Array, globals_: dict) -> Array:
        packed = view.draw(key, particles)
        log_q = view.encoding.distribution.log_prob(packed)
        log_p = jax.vmap(lambda packed: _log_joint(view, rng_key, packed, globals_))(packed)
        return logsumexp(log_p - log_q, axis=0) - jnp.log(particles)

    keys = jax.random.split(rng_key, num_samples)
    return {"log_evidence": view.over_draws(one, keys, globals_, per_draw=particles)}


def _log_joint(view: View, rng_key: Array, packed: Array, globals_: dict) -> Array:
    """Return each row's log joint density of the data and the unconstrained latents."""
    values, log_det = view.encoding.constrain(packed)
    arguments = view.model_arguments(values | globals_, rng_key)
    return row_densities(plate=view.guide.plate.name, **arguments) + log_det


def diverge(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return the KL divergence from the prior by site and dimension, averaged over draws."""

    def one(packed: Array, globals_: dict) -> dict:
        values, _ = view.encoding.constrain(packed)
        arguments = view.model_arguments(values | globals_, rng_key)
        return row_divergences(encoding=view.encoding, packed=packed, **arguments)

    found = view.over_draws(one, view.draw(rng_key, num_samples), globals_)
    return jax.tree.map(lambda x: x.mean(0), found)


@dataclass(frozen=True)
class Rows:
    """Data, and whether the model selects rows of them in its own plate."""

    data: ArrayData
    subsamples: bool

    def collect(self, fn: Callable[..., Any], batch_size: int, row_axis: int = 0) -> Any:
        """Apply a compiled function to batches of rows, and join its results on the host.

        While one batch is copied the next is computed; padding is dropped.

        Args:
            fn: from ``(arrays, indices, layout=, subsamples=)`` to a pytree of arrays.
            batch_size: rows at once.
            row_axis: the axis of the rows in every result.
        """
        batch_size = min(batch_size, self.data.num_data)
        options = {"layout": self.data.layout, "subsamples": self.subsamples}
        batches = (indices for indices, _ in padded_batches(self.data.num_data, batch_size))
        results = prefetch(fn(self.data.arrays, indices, **options) for indices in batches)
        first = next(results)
        out = jax.tree.map(partial(_room, self.data.num_data, row_axis), first)
        starts = range(0, self.data.num_data, batch_size)
        for start, found in zip(starts, itertools.chain([first], results), strict=True):
            jax.tree.map(partial(_write, start, row_axis), out, found)
        return out


def _room(num_data: int, row_axis: int, like: Array) -> np.ndarray:
    """Return room for all rows; the rows are the slowest axis, so that writing is fast."""
    shape = [size for axis, size in enumerate(like.shape) if axis != row_axis]
    return np.moveaxis(np.empty((num_data, *shape), like.dtype), 0, row_axis)


def _write(start: int, row_axis: int, room: np.ndarray, found: Array) -> None:
    """Copy a batch of rows to its place, without what fills it up."""
    room, rows = np.moveaxis(room, row_axis, 0), np.moveaxis(np.asarray(found), row_axis, 0)
    stop = min(start + len(rows), len(room))
    room[start:stop] = rows[: stop - start]
