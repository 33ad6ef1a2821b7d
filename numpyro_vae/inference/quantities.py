"""What is computed of a batch of rows, in compiled code: a function each.

A **quantity** is a function of an `EncodedBatch` and of further arguments, which are traced; its
keyword arguments are not. It returns a pytree of arrays with the rows along one axis of each.
`numpyro_vae.inference.runner` compiles it, runs it on any number of rows, and joins the results.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array

from numpyro_vae.inference.divergences import Divergences, row_divergences
from numpyro_vae.inference.encoded import DrawKeys, EncodedBatch
from numpyro_vae.model.densities import predicted_rows
from numpyro_vae.model.redraw import drawn_value

Names = tuple[str, ...]
Axes = tuple[tuple[str, int], ...]  # of the rows in the values of deterministic sites


def encode(batch: EncodedBatch) -> dict[str, tuple[Array, ...]]:
    """Return ``loc`` and ``scale`` by site, the plate's axis in front."""
    encoding = batch.guide.given_median(batch.encoding, batch.params, batch.args, batch.kwargs)
    plate = encoding.run.plate
    loc = encoding.unpack(encoding.marginal(lambda fn: fn.mean))
    scale = encoding.unpack(encoding.marginal(_scale))
    return {
        site.name: tuple(jnp.moveaxis(x, site.axis(plate), 0) for x in (loc, scale))
        for (site, loc), (_, scale) in zip(loc, scale, strict=True)
    }


def _scale(fn: Any) -> Array:
    return fn.scale if hasattr(fn, "scale") else jnp.sqrt(fn.variance)


def nothing(batch: EncodedBatch) -> dict[str, Array]:
    """Return nothing, where only what is told of rows is wanted."""
    return {}


def observed(batch: EncodedBatch) -> dict[str, Array]:
    """Return the observed sites of the data, rows in front."""
    run = batch.encoding.run
    plates = [run.sites.plates[name] for name in (run.plate.name, *run.groups)]
    return {
        site.name: site.rows(run.reading.values[site.name], plate)
        for plate in reversed(plates)  # what lies in several is of the local one
        for site in run.sites.observed(plate.name)
    }


def sample(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int, names: Names
) -> dict:
    """Return draws by site, ``(num_samples, batch, ...)``."""
    keys = _draw_keys(batch, rng_key, num_samples)
    return _values(batch, batch.draw(rng_key, num_samples, globals_), globals_, keys, names)


def _values(
    batch: EncodedBatch, packed: Array, globals_: dict, keys: DrawKeys, names: Names
) -> dict:
    run = batch.encoding.run
    if any(site.name in names for site in batch.enumeration.sites):
        values = batch.over_draws(batch.complete, packed, globals_, keys)
    else:
        values, _ = batch.encoding.constrain(packed)
    axes = {name: 1 + run.sites.sites[name].axis(run.plate) for name in names}
    return {name: jnp.moveaxis(values[name], axes[name], 1) for name in names}


def predict(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int, derived: Axes
) -> dict[str, Any]:
    """Return by ArviZ group draws of observed and deterministic sites, as `finish` does.

    Beside them is ``unknown``, which draws of the latents are not numbers.
    """
    keys = _draw_keys(batch, rng_key, num_samples)
    packed = batch.draw(rng_key, num_samples, globals_)
    found = _predictions(batch, packed, globals_, keys, derived)
    return {**found, "unknown": jnp.isnan(packed).any(-1)}


def _predictions(
    batch: EncodedBatch, packed: Array, globals_: dict, keys: DrawKeys, derived: Axes
) -> dict[str, dict]:
    """Return draws of the observed sites, and the deterministic ones of draws and data."""

    def one(packed: Array, globals_: dict, keys: DrawKeys) -> dict[str, dict]:
        values, key = batch.complete(packed, globals_, keys), jax.random.fold_in(keys.of_batch, 1)
        drawn = predicted_rows(batch.trace(values, key, observed=False), batch.encoding.run)
        trace = batch.trace(values, key) if derived else {}
        found = {name: jnp.moveaxis(trace[name]["value"], axis, 0) for name, axis in derived}
        return {"posterior": found, "posterior_predictive": drawn}

    return batch.over_draws(one, packed, globals_, keys)


def derive(
    batch: EncodedBatch, rng_key: Array, drawn: dict, *, num_samples: int, names: Names
) -> dict:
    """Return deterministic sites of all rows at once, ``(num_samples, ...)``.

    Args:
        batch: all rows.
        rng_key: for what has no value, in models that observe nothing.
        drawn: draws of the latent sites that they are computed from.
        num_samples: how many there are.
        names: the sites.
    """

    def one(drawn: dict, rng_key: Array) -> dict:
        trace = batch.trace(drawn, rng_key)
        return {name: trace[name]["value"] for name in names}

    return batch.over_draws(one, drawn, jax.random.split(rng_key, num_samples))


def _noise_keys(batch: EncodedBatch, rng_key: Array, num_samples: int) -> Array:
    """Return a key for what each draw of this batch needs beside the latents."""
    of_batch = jax.random.fold_in(jax.random.fold_in(rng_key, num_samples), batch.indices[0])
    return jax.random.split(of_batch, num_samples)


def _draw_keys(batch: EncodedBatch, rng_key: Array, num_samples: int) -> DrawKeys:
    return DrawKeys.make(rng_key, _noise_keys(batch, rng_key, num_samples))


def weigh(batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return the log importance weights of `EncodedBatch.draw`, ``(num_samples, batch)``."""
    packed = batch.draw(rng_key, num_samples, globals_)
    weights = batch.over_draws(partial(batch.log_weight, rng_key=rng_key), packed, globals_)
    return {"log_weights": weights}


def classify(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int, particles: int
) -> dict:
    """Return by site the probability of each value of the discrete latents of a row.

    Given a draw of the globals, local draws count by their importance, so that the guide's error
    vanishes with more of them.
    """
    enumeration = batch.enumeration

    def weigh(packed: Array, globals_: dict) -> list[Array]:
        return enumeration.log_marginals(batch.tables(packed, globals_, rng_key))

    def one(key: Array, globals_: dict) -> list[Array]:
        packed = batch.draw(key, particles, globals_)
        log_q = batch.encoding.condition(globals_).log_prob(packed)
        by_level = jax.vmap(weigh, (0, None))(packed, globals_)
        return [_share(x, log_q) for x in by_level]

    keys = jax.random.split(rng_key, num_samples)
    found = batch.over_draws(one, keys, globals_, per_draw=particles)
    return enumeration.probabilities([x.mean(0) for x in found])


def _share(log_p: Array, log_q: Array) -> Array:
    """Return probabilities of combinations from densities ``(draws, combinations, batch, ...)``."""
    log_q = log_q.reshape(len(log_q), 1, -1, *[1] * (log_p.ndim - 3))
    return jax.nn.softmax(logsumexp(log_p - log_q, axis=0), axis=0)


def draws(
    batch: EncodedBatch,
    rng_key: Array,
    globals_: dict,
    *,
    num_samples: int,
    groups: Names,
    derived: Axes,
) -> dict[str, Any]:
    """Return by ArviZ group what is drawn, all ``(num_samples, batch, ...)``, and as `predict`."""
    packed = jnp.moveaxis(batch.draw(rng_key, num_samples, globals_), 0, 1)
    found: dict[str, Any] = finish(batch, packed, rng_key, globals_, groups=groups, derived=derived)
    if batch.guide.has_density and "sample_stats" in groups:
        found["sample_stats"] = weigh(batch, rng_key, globals_, num_samples=num_samples)
    return {**found, "unknown": jnp.isnan(packed).any(-1).T}


def replicate(batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return draws of the observed sites with local latents of their prior, as `predict` does."""

    def one(globals_: dict, rng_key: Array) -> dict:
        return predicted_rows(batch.trace(globals_, rng_key, observed=False), batch.encoding.run)

    return batch.over_draws(one, globals_, _noise_keys(batch, rng_key, num_samples))


def imagine(
    batch: EncodedBatch,
    rng_key: Array,
    globals_: dict,
    *,
    num_samples: int,
    latent: Names,
    drawn: Names,
    derived: Axes,
) -> dict[str, dict]:
    """Return by ArviZ group what is drawn of rows without observations: from the prior.

    All are ``(num_samples, batch, ...)``.
    """
    run = batch.encoding.run

    def rows_of(trace: dict, names: Names) -> dict:
        axes = {name: run.sites.sites[name].axis(run.plate) for name in names}
        return {name: jnp.moveaxis(trace[name]["value"], axes[name], 0) for name in names}

    def one(globals_: dict, rng_key: Array) -> dict[str, dict]:
        trace = batch.trace(globals_, rng_key)
        found = {name: jnp.moveaxis(trace[name]["value"], axis, 0) for name, axis in derived}
        posterior = rows_of(trace, latent) | found
        return {"posterior": posterior, "posterior_predictive": rows_of(trace, drawn)}

    return batch.over_draws(one, globals_, _noise_keys(batch, rng_key, num_samples))


def finish(
    batch: EncodedBatch,
    packed: Array,
    rng_key: Array,
    globals_: dict,
    *,
    groups: Names,
    derived: Axes,
) -> dict[str, dict]:
    """Return by ArviZ group the latents of draws ``(batch, num_samples, size)``, and predictions.

    All are ``(num_samples, batch, ...)``; deterministic sites belong to the posterior.
    """
    packed = jnp.moveaxis(packed, 1, 0)
    keys = _draw_keys(batch, rng_key, len(packed))
    names = tuple(site.name for site in (*batch.encoding.sites, *batch.enumeration.sites))
    posterior = _values(batch, packed, globals_, keys, names)
    if not derived and "posterior_predictive" not in groups:
        return {"posterior": posterior}
    found = _predictions(batch, packed, globals_, keys, derived)
    found["posterior"] = posterior | found["posterior"]
    return {group: variables for group, variables in found.items() if group in groups}


def evidence(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int, particles: int
) -> dict:
    """Return the log mean weight of ``particles`` draws for each draw of the globals."""

    def one(key: Array, globals_: dict) -> Array:
        packed = batch.draw(key, particles, globals_)
        weigh = partial(batch.log_weight, globals_=globals_, rng_key=rng_key)
        return logsumexp(jax.vmap(weigh)(packed), axis=0) - jnp.log(particles)

    keys = jax.random.split(rng_key, num_samples)
    return {"log_evidence": batch.over_draws(one, keys, globals_, per_draw=particles)}


def likelihood(batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return the log-likelihood of rows whose latents are all among the globals."""
    nothing = jnp.zeros((len(batch.indices), 0))

    def one(globals_: dict) -> Array:
        log_joint, log_prior = batch.log_densities(nothing, globals_, rng_key)
        return logsumexp(log_joint, axis=0) - logsumexp(log_prior, axis=0)

    return {"log_evidence": batch.over_draws(one, globals_)}


def diverge(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int
) -> Divergences:
    """Return the KL divergence from the prior by site and dimension, averaged over draws."""

    def one(packed: Array, globals_: dict, keys: DrawKeys) -> Divergences:
        trace = batch.trace(batch.complete(packed, globals_, keys), keys.of_batch)
        return row_divergences(batch.encoding.condition(globals_), packed, trace)

    packed = batch.draw(rng_key, num_samples, globals_)
    keys = _draw_keys(batch, rng_key, num_samples)
    found = batch.over_draws(one, packed, globals_, keys)
    return jax.tree.map(lambda x: x.mean(0), found)


def expected(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int, name: str, known: bool
) -> Array:
    """Return the posterior predictive mean of an observed site, ``(batch, ...)``.

    That is, averaged over draws of the latents, the mean of the site's distribution if it is known,
    else a draw of the site.
    """

    def one(packed: Array, globals_: dict, keys: DrawKeys) -> Array:
        values = batch.complete(packed, globals_, keys)
        site = batch.trace(values, jax.random.fold_in(keys.of_batch, 1), observed=False)[name]
        return _rows_of(batch, name, site["fn"].mean if known else drawn_value(site))

    packed = batch.draw(rng_key, num_samples, globals_)
    return _average(one, packed, globals_, _draw_keys(batch, rng_key, num_samples))


def expected_a_priori(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int, name: str, known: bool
) -> Array:
    """Return the mean of an observed site given one draw of the latents from their prior.

    If the mean of its distribution is not known, draws of the site are averaged.
    """
    return _expected_given(batch, {}, rng_key, globals_, num_samples, name, known)


def expected_at(
    batch: EncodedBatch,
    packed: Array,
    rng_key: Array,
    globals_: dict,
    *,
    num_samples: int,
    name: str,
    known: bool,
) -> Array:
    """Return what `expected_a_priori` does, given packed latents ``(places, size)`` of any row."""

    def one(packed: Array) -> Array:
        rows = jnp.broadcast_to(packed, (len(batch.indices), len(packed)))
        values, _ = batch.encoding.constrain(rows)
        return _expected_given(batch, values, rng_key, globals_, num_samples, name, known)

    return batch.over_draws(one, packed)


def _expected_given(
    batch: EncodedBatch,
    values: dict,
    rng_key: Array,
    globals_: dict,
    num_samples: int,
    name: str,
    known: bool,
) -> Array:
    draw_key, *keys = _noise_keys(batch, rng_key, 1 + num_samples)
    given = values | jax.tree.map(itemgetter(0), globals_)
    site = batch.trace(given, draw_key, observed=False)[name]
    fn = site["fn"]
    if known:
        return _rows_of(batch, name, fn.mean)
    drawn_value(site)
    return _average(lambda key: _rows_of(batch, name, fn.sample(key)), jnp.stack(keys))


def _rows_of(batch: EncodedBatch, name: str, value: Array) -> Array:
    run = batch.encoding.run
    return run.sites.sites[name].rows(value, run.plate)


def _average(fn: Callable[..., Array], *draws: Any) -> Array:
    """Return the mean of a function over the leading axis of draws.

    The draws are added up one by one, as an observed value can be much larger than its latents.
    """
    nothing = jnp.zeros(jax.eval_shape(fn, *jax.tree.map(itemgetter(0), draws)).shape)
    total, _ = jax.lax.scan(lambda total, args: (total + fn(*args), None), nothing, draws)
    return total / len(jax.tree.leaves(draws)[0])
