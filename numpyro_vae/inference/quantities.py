"""What is computed for a batch of rows, in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_vae.data.arrays import Layout
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.inference.divergences import row_divergences
from numpyro_vae.model.densities import (
    observed_densities,
    predicted_rows,
    row_densities,
    trace_rows,
)
from numpyro_vae.model.enumeration import Enumeration
from numpyro_vae.model.plates import all_rows, minibatch

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

    guide: AmortizedGuide
    params: dict[str, Any]
    rows: Messenger
    indices: Array
    args: tuple
    kwargs: dict[str, Any]
    encoding: Encoding

    @classmethod
    def build(
        cls,
        guide: AmortizedGuide,
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

    def draw(self, rng_key: Array, num_samples: int, globals_: dict[str, Array]) -> Array:
        """Draw packed latents, ``(num_samples, batch, size)``, each given a draw of the globals."""
        row_keys = jax.vmap(partial(jax.random.fold_in, rng_key))(self.indices)
        return self.encoding.condition(globals_).sample(row_keys, num_samples)

    @cached_property
    def enumeration(self) -> Enumeration:
        """The discrete latents that are summed over."""
        return Enumeration.read(self.encoding.run)

    def over_draws(self, fn: Callable[..., Any], *draws: Any, per_draw: int = 1) -> Any:
        """Map a function over the leading axis of draws, as many at once as memory likes."""
        pairs = len(self.indices) * per_draw * self.enumeration.num_combinations
        at_once = max(1, PAIRS // pairs)
        return jax.lax.map(lambda args: fn(*args), draws, batch_size=at_once)

    def trace(self, values: dict[str, Array], rng_key: Array, *, observed: bool = True) -> dict:
        """Run the model on the rows, with their observations or without."""
        model = self.guide.model if observed else handlers.uncondition(self.guide.model)
        values = {**self.params, **values}
        return trace_rows(model, values, self.rows, rng_key, self.args, self.kwargs)

    def log_joint(self, packed: Array, globals_: dict[str, Array], rng_key: Array) -> Array:
        """Return each row's log joint density with a draw, ``(num_combinations, batch)``.

        The density is that of the data, the unconstrained latents and each combination of values
        of the discrete ones.
        """
        return self.log_densities(packed, globals_, rng_key)[0]

    def log_densities(
        self, packed: Array, globals_: dict[str, Array], rng_key: Array
    ) -> tuple[Array, Array]:
        """Return what `log_joint` does, and the part of it that is the prior's."""
        values, log_det = self.encoding.constrain(packed)

        def one(combination: Array) -> tuple[Array, Array]:
            discrete = self.enumeration.assign(jnp.full(len(self.indices), combination))
            trace = self.trace(values | globals_ | discrete, rng_key)
            log_joint = row_densities(trace, self.encoding.run) + log_det
            return log_joint, log_joint - observed_densities(trace, self.encoding.run)

        return jax.vmap(one)(jnp.arange(self.enumeration.num_combinations))

    def log_weight(self, packed: Array, globals_: dict[str, Array], rng_key: Array) -> Array:
        """Return the log importance weight of a draw of each row."""
        log_q = self.encoding.condition(globals_).log_prob(packed)
        return logsumexp(self.log_joint(packed, globals_, rng_key), axis=0) - log_q

    def complete(self, packed: Array, globals_: dict[str, Array], rng_key: Array) -> dict:
        """Return the values of all latents of a draw, with the discrete ones drawn given it."""
        values, _ = self.encoding.constrain(packed)
        if self.enumeration.sites:
            key, rng_key = jax.random.split(rng_key)
            log_joint = self.log_joint(packed, globals_, rng_key)
            values |= self.enumeration.assign(jax.random.categorical(key, log_joint, axis=0))
        return values | globals_


def encode(view: View) -> dict[str, tuple[Array, ...]]:
    """Return ``loc`` and ``scale`` by site, the plate's axis in front."""
    encoding = view.guide.given_median(view.encoding, view.params, view.args, view.kwargs)
    plate = encoding.run.plate
    loc = encoding.unpack(encoding.marginal(lambda fn: fn.mean))
    scale = encoding.unpack(encoding.marginal(_scale))
    return {
        site.name: tuple(jnp.moveaxis(x, site.axis(plate), 0) for x in (loc, scale))
        for (site, loc), (_, scale) in zip(loc, scale, strict=True)
    }


def _scale(fn: Any) -> Array:
    return fn.scale if hasattr(fn, "scale") else jnp.sqrt(fn.variance)


def observed(view: View) -> dict[str, Array]:
    """Return the observed sites of the data, rows in front."""
    run = view.encoding.run
    plates = [run.sites.plates[name] for name in (run.plate.name, *run.groups)]
    return {
        site.name: site.rows(run.reading.values[site.name], plate)
        for plate in reversed(plates)  # what lies in several is of the local one
        for site in run.sites.observed(plate.name)
    }


def sample(
    view: View, rng_key: Array, globals_: dict, *, num_samples: int, names: tuple[str, ...]
) -> dict:
    """Return draws by site, ``(num_samples, batch, ...)``."""
    keys = _noise_keys(view, rng_key, num_samples)
    return _values(view, view.draw(rng_key, num_samples, globals_), globals_, keys, names)


def _values(view: View, packed: Array, globals_: dict, keys: Array, names: tuple[str, ...]) -> dict:
    run = view.encoding.run
    if any(site.name in names for site in view.enumeration.sites):
        values = view.over_draws(view.complete, packed, globals_, keys)
    else:
        values, _ = view.encoding.constrain(packed)
    axes = {name: 1 + run.sites.sites[name].axis(run.plate) for name in names}
    return {name: jnp.moveaxis(values[name], axes[name], 1) for name in names}


def predict(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return draws of the observed and deterministic sites, ``(num_samples, batch, ...)``."""
    keys = _noise_keys(view, rng_key, num_samples)
    return _predictions(view, view.draw(rng_key, num_samples, globals_), globals_, keys)


def _predictions(view: View, packed: Array, globals_: dict, keys: Array) -> dict:
    def one(packed: Array, globals_: dict, rng_key: Array) -> dict:
        values = view.complete(packed, globals_, rng_key)
        trace = view.trace(values, jax.random.fold_in(rng_key, 1), observed=False)
        return predicted_rows(trace, view.encoding.run)

    return view.over_draws(one, packed, globals_, keys)


def derive(view: View, rng_key: Array, globals_: dict, *, names: tuple[str, ...]) -> dict:
    """Return deterministic sites that lie outside the local plate, for each draw of the globals."""

    def one(globals_: dict) -> dict:
        trace = view.trace(globals_, rng_key)
        return {name: trace[name]["value"] for name in names}

    return view.over_draws(one, globals_)


def _noise_keys(view: View, rng_key: Array, num_samples: int) -> Array:
    """Return a key for what each draw of this batch needs beside the latents."""
    of_batch = jax.random.fold_in(jax.random.fold_in(rng_key, num_samples), view.indices[0])
    return jax.random.split(of_batch, num_samples)


def weigh(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return the log importance weights of `View.draw`, ``(num_samples, batch)``."""
    packed = view.draw(rng_key, num_samples, globals_)
    weights = view.over_draws(partial(view.log_weight, rng_key=rng_key), packed, globals_)
    return {"log_weights": weights}


def classify(
    view: View, rng_key: Array, globals_: dict, *, num_samples: int, particles: int
) -> dict:
    """Return the probability of each combination of the discrete latents of a row.

    Given a draw of the globals, local draws count by their importance, so that the guide's error
    vanishes with more of them.
    """

    def one(key: Array, globals_: dict) -> Array:
        packed = view.draw(key, particles, globals_)
        log_q = view.encoding.condition(globals_).log_prob(packed)
        log_p = jax.vmap(lambda packed: view.log_joint(packed, globals_, rng_key))(packed)
        return jax.nn.softmax(logsumexp(log_p - log_q[:, None], axis=0), axis=0)

    keys = jax.random.split(rng_key, num_samples)
    return {"probabilities": view.over_draws(one, keys, globals_, per_draw=particles).mean(0).T}


def draws(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict[str, dict]:
    """Return by ArviZ group what is drawn, all ``(num_samples, batch, ...)``."""
    packed = jnp.moveaxis(view.draw(rng_key, num_samples, globals_), 0, 1)
    groups = finish(view, packed, rng_key, globals_)
    if view.encoding.family.has_density:
        groups["sample_stats"] = weigh(view, rng_key, globals_, num_samples=num_samples)
    return groups


def replicate(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return draws of the observed sites with local latents of their prior, as `predict` does."""

    def one(globals_: dict, rng_key: Array) -> dict:
        return predicted_rows(view.trace(globals_, rng_key, observed=False), view.encoding.run)

    return view.over_draws(one, globals_, _noise_keys(view, rng_key, num_samples))


def finish(view: View, packed: Array, rng_key: Array, globals_: dict) -> dict[str, dict]:
    """Return by ArviZ group the latents of draws ``(batch, num_samples, size)``, and predictions.

    All are ``(num_samples, batch, ...)``; deterministic sites belong to the posterior.
    """
    packed = jnp.moveaxis(packed, 1, 0)
    keys = _noise_keys(view, rng_key, len(packed))
    names = tuple(site.name for site in (*view.encoding.sites, *view.enumeration.sites))
    posterior = _values(view, packed, globals_, keys, names)
    predicted = _predictions(view, packed, globals_, keys)
    for name in view.encoding.run.sites.deterministic:
        if name in predicted:
            posterior[name] = predicted.pop(name)
    return {"posterior": posterior, "posterior_predictive": predicted}


def evidence(
    view: View, rng_key: Array, globals_: dict, *, num_samples: int, particles: int
) -> dict:
    """Return the log mean weight of ``particles`` draws for each draw of the globals."""

    def one(key: Array, globals_: dict) -> Array:
        packed = view.draw(key, particles, globals_)
        weigh = partial(view.log_weight, globals_=globals_, rng_key=rng_key)
        return logsumexp(jax.vmap(weigh)(packed), axis=0) - jnp.log(particles)

    keys = jax.random.split(rng_key, num_samples)
    return {"log_evidence": view.over_draws(one, keys, globals_, per_draw=particles)}


def diverge(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return the KL divergence from the prior by site and dimension, averaged over draws."""

    def one(packed: Array, globals_: dict, rng_key: Array) -> dict:
        trace = view.trace(view.complete(packed, globals_, rng_key), rng_key)
        return row_divergences(view.encoding.condition(globals_), packed, trace)

    packed = view.draw(rng_key, num_samples, globals_)
    keys = _noise_keys(view, rng_key, num_samples)
    found = view.over_draws(one, packed, globals_, keys)
    return jax.tree.map(lambda x: x.mean(0), found)
