"""The marginal likelihood of draws of the global sites, the rows' latents integrated out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from numpyro_vae.guides.global_sites import NoDensityError
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.quantities import Axes, Names, finish
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.densities import density_outside
from numpyro_vae.numpyro_internals import HANDLERS

CHUNK = 4096  # rows whose estimates are held at once
REPLICATES = 32  # of the Monte Carlo error
PARTICLES = 16, 512  # local draws of each row and draw: at first, and at most
EVALUATIONS = 2**23  # of rows' densities for each draw, beyond which particles are not doubled
MAX_NOISE = 0.1  # nats of Monte Carlo error below which log densities are precise enough,
MAX_BIAS = 0.25  # nats of a row's log evidence that are taken for its bias
SHARE = 0.2  # or of the standard deviation of the log weights

Globals = dict[str, Any]  # values by site


@dataclass(frozen=True)
class LogDensity:
    r"""The log joint density of draws of the global sites and all data, with its error.

    .. math:: \log p(g) + \sum_i \log p(x_i \mid g)

    The Monte Carlo error of its values, of which all have a part in common, is described by
    replicates: each adds up the errors of the rows with random signs (the *wild bootstrap*: Wu,
    Annals of Statistics 14, 1986). What is computed of the values, computed again of the values
    plus a replicate, has the same error.

    Attributes:
        values: ``(num_samples,)``, in float64.
        errors: replicates of their error, ``(REPLICATES, num_samples)``.
        particles: local draws of each row and draw.
    """

    values: np.ndarray
    errors: np.ndarray
    particles: int

    @classmethod
    def joined(cls, parts: Sequence[LogDensity]) -> LogDensity:
        """Return the densities of several sets of draws, made with the same random numbers."""
        values, errors = zip(*((part.values, part.errors) for part in parts), strict=True)
        return cls(np.concatenate(values), np.concatenate(errors, axis=1), parts[0].particles)

    @property
    def noise(self) -> float:
        """The standard deviation of the error, without the part that all values share."""
        return float(np.sqrt(self.errors.var(1).mean()))


def log_density(
    runner: Runner,
    rows: Rows,
    rng_key: Array,
    globals_: Globals,
    particles: int,
    *,
    of_prior: bool = False,
) -> LogDensity:
    r"""Estimate the log joint density of draws of the global sites and all data.

    Each :math:`p(x_i \mid g)` is the mean importance weight of ``particles`` draws of the guide
    (see `Posterior.log_evidence`). All draws of the globals share the random numbers of a row, so
    that their differences are more precise than each of them; pairs of draws are antithetic where
    the family allows it; and the logarithm's bias of order ``1 / particles`` is removed by two
    halves of the draws (*jackknife*: Quenouille, Biometrika 43, 1956). Rows go batch by batch.

    A factor by which the model scales the latents of a row counts for the row, and all is divided
    by the factor of the global sites: of so scaled a model the ELBO is largest where the guide of
    the globals has this density.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key, of which all random numbers are.
        globals_: the draws, a leading axis of them.
        particles: local draws, a multiple of four.
        of_prior: whether half of them are of the prior given the globals; see `row_evidence`.

    Raises:
        NoDensityError: if local sites have no density, or a global one is summed over.
        ValueError: if the model scales its global sites by unlike factors.
    """
    require_density(runner)
    of_globals = runner.once(outside, rows, rng_key, globals_).astype(float)
    errors = np.zeros((REPLICATES, len(of_globals)))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
    values = of_globals
    for chunk in chunks(rows):
        sizes: dict[str, Any] = {"num_draws": particles, "row_axis": 1, "particles": particles}
        sizes |= {"of_prior": of_prior}
        by_row, error = runner.per_batch(row_densities, chunk, rng_key, globals_, **sizes)
        values = values + by_row.astype(float).sum(1)
        errors += rng.choice([-1.0, 1.0], (REPLICATES, error.shape[1])) @ error.T
    scale = global_scale(runner, rows)
    known = np.where(np.isfinite(values), values / scale, -np.inf)
    return LogDensity(known, errors / scale, particles)


def precise_log_density(
    runner: Runner, rows: Rows, rng_key: Array, globals_: Globals, log_q: np.ndarray
) -> LogDensity:
    """Estimate the log density with as many particles as it takes to weigh the draws by it.

    They are doubled until its error is small beside the spread of the log weights, or in nats, or
    they are too many.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        globals_: the draws.
        log_q: the log-density by which they were drawn.
    """
    particles = PARTICLES[0]
    while True:
        found = log_density(runner, rows, rng_key, globals_, particles)
        there = np.isfinite(found.values)
        spread = np.std((found.values - log_q)[there]) if there.any() else np.inf
        is_precise = found.noise <= max(MAX_NOISE, SHARE * spread)
        if is_precise or not can_double(rows, particles):
            return found
        particles *= 2


def can_double(rows: Rows, particles: int) -> bool:
    """Return whether twice as many particles are not too many."""
    return particles < PARTICLES[1] and 2 * particles * rows.num_rows <= EVALUATIONS


def chunks(rows: Rows) -> Iterator[Rows]:
    """Yield all rows in parts, of data that the model takes whole in one."""
    number = 1 if rows.data.is_whole else -(-rows.num_rows // CHUNK)
    for part in np.array_split(np.arange(rows.num_rows), number):
        yield rows.choose(part)


def require_density(runner: Runner) -> None:
    """Raise NoDensityError if local sites have no density, or no guide draws a global one."""
    if runner.guide.local_sites and runner.guide.no_density:
        raise NoDensityError(runner.guide.no_density)
    plate, sites = runner.guide.plate.name, runner.guide.sites.sites.values()
    names = [site.name for site in sites if site.is_enumerated and plate not in site.plates]
    if names:
        raise NoDensityError(
            f"The discrete sites {names} outside plate {plate!r} are summed over with those in it, "
            "so that a row has no marginal likelihood of its own. Marginalize them in the model."
        )


def global_scale(runner: Runner, rows: Rows) -> float:
    """Return the factor by which the model scales its global sites; one if there are none.

    Raises:
        ValueError: if they have several.
    """
    guide = runner.guide
    with HANDLERS:
        reading = guide.reader.read(rows.args, rows.kwargs, rows.held)
    scales = [np.asarray(reading.scales.get(name, 1.0)) for name in guide.global_names]
    found = np.unique([value for scale in scales for value in scale.flat])
    if len(found) > 1:
        raise ValueError(
            f"The model scales its global sites {list(guide.global_names)} by unlike factors, "
            f"{found.tolist()}, so that there is no posterior which the ELBO leads to. Put all of "
            "them into one handlers.scale."
        )
    return float(found[0]) if scales else 1.0


# -- in compiled code ------------------------------------------------------------------------------


def outside(batch: EncodedBatch, rng_key: Array, globals_: Globals) -> Float[Array, "draws"]:
    """Return the log-density of all that belongs to no row; the batch is of all rows."""
    return batch.over_draws(partial(outside_of, batch, rng_key), globals_)


def outside_of(batch: EncodedBatch, rng_key: Array, globals_: Globals) -> Float[Array, ""]:
    """Return what `outside` does, of one draw."""
    row_keys = jax.vmap(partial(jax.random.fold_in, rng_key))(batch.indices)
    packed = batch.encoding.condition(globals_).sample(row_keys, 1)[0]
    local, _ = batch.encoding.constrain(packed)
    return density_outside(batch.trace(local | globals_, rng_key), batch.encoding.run)


def row_densities(
    batch: EncodedBatch, rng_key: Array, globals_: Globals, *, particles: int, of_prior: bool
) -> tuple[Array, Array]:
    """Return each row's log evidence, and its error, ``(draws, batch)``; see `log_density`."""

    def one(globals_: Globals) -> tuple[Array, Array]:
        first, second = (evidence(globals_) for evidence in halves)
        error = (first - second) / 2
        return without_bias(first, second), jnp.where(jnp.isfinite(error), error, 0.0)

    keys = jax.random.split(rng_key)
    halves = [row_evidence(batch, key, particles // 2, of_prior=of_prior) for key in keys]
    return batch.over_draws(one, globals_, per_draw=particles)


def without_bias(first: Array, second: Array) -> Array:
    """Return the log of the mean of two estimates, less its bias where both are finite.

    Halves that are nats apart say nothing of a bias of order ``1 / particles``, and what they say
    is bounded: else the density would be largest where the particles miss it.
    """
    together = jnp.logaddexp(first, second) - jnp.log(2)
    there = jnp.isfinite(first) & jnp.isfinite(second)
    bias = jnp.where(there, together - (first + second) / 2, 0.0)
    return together + jnp.minimum(bias, MAX_BIAS)


def row_evidence(
    batch: EncodedBatch, rng_key: Array, particles: int, *, of_prior: bool = False
) -> Callable[[Globals], Float[Array, "batch"]]:
    """Return a function from a draw of the globals to the log mean weight of each row.

    It multiplies that by the factor by which the model scales the latents of the row. Its random
    numbers are the same for all draws. Where no head reads global sites, so are the particles.

    Where the globals make the prior narrow, none of the guide's particles may be near it. Half of
    them may be of the prior itself, all weighed by the mixture of both.

    Args:
        batch: the rows.
        rng_key: of all random numbers.
        particles: how many of each row.
        of_prior: whether half of them are of the prior, which has to be one that can be drawn from.
    """
    row_keys = jax.vmap(partial(jax.random.fold_in, rng_key))(batch.indices)
    encoding, scale = batch.encoding, batch.row_scale
    of_guide = particles // 2 if of_prior else particles
    fixed = None if encoding.reads_globals else encoding.sample_evenly(row_keys, of_guide)

    def evidence(globals_: Globals) -> Array:
        given = encoding.condition(globals_)
        packed = given.sample_evenly(row_keys, of_guide) if fixed is None else fixed
        weigh = partial(batch.log_weight, globals_=globals_, rng_key=rng_key)
        if of_prior:
            drawn = draw_prior(batch, rng_key, globals_, particles - of_guide)
            packed = jnp.concatenate([packed, drawn])
            weigh = partial(_mixture_weight, batch, globals_, rng_key)
        found = logsumexp(jax.vmap(weigh)(packed), axis=0) - jnp.log(particles)
        return found if scale is None else scale * found

    return evidence


def _mixture_weight(
    batch: EncodedBatch, globals_: Globals, rng_key: Array, packed: Array
) -> Float[Array, "batch"]:
    """Return log weights by the mixture of guide and prior, in equal parts."""
    joint, prior = (logsumexp(x, axis=0) for x in batch.log_densities(packed, globals_, rng_key))
    log_q = batch.encoding.condition(globals_).log_prob(packed)
    return joint - (jnp.logaddexp(log_q, prior) - jnp.log(2))


def draw_prior(
    batch: EncodedBatch, rng_key: Array, globals_: Globals, number: int
) -> Float[Array, "draws batch size"]:
    """Draw packed latents of rows from their prior given one draw of the globals."""

    def one(key: Array) -> Array:
        trace = batch.trace(globals_, key)
        values = {site.name: trace[site.name]["value"] for site in batch.encoding.sites}
        return batch.encoding.pack(values)

    return batch.over_draws(one, jax.random.split(rng_key, number))


def redraw(
    batch: EncodedBatch,
    rng_key: Array,
    globals_: Globals,
    *,
    num_samples: int,
    particles: int,
    groups: Names,
    derived: Axes,
) -> dict[str, dict]:
    """Return by ArviZ group what is drawn given draws of the globals that are not the guide's.

    For each of them one of ``particles`` local draws is taken by its importance weight (*sampling
    importance resampling*: Rubin, 1987). All are ``(num_samples, batch, ...)``; how many particles
    count is ``effective_particles`` among the ``sample_stats``.
    """

    def one(key: Array, globals_: Globals) -> tuple[Array, Array]:
        row_keys = jax.vmap(partial(jax.random.fold_in, key))(batch.indices)
        draw_keys, pick_keys = jnp.moveaxis(jax.vmap(jax.random.split)(row_keys), 1, 0)
        packed = batch.encoding.condition(globals_).sample(draw_keys, particles)
        weigh = partial(batch.log_weight, globals_=globals_, rng_key=rng_key)
        log_weights = jax.vmap(weigh)(packed)
        picked = jax.vmap(jax.random.categorical)(pick_keys, log_weights.T)
        ess = 1 / (jax.nn.softmax(log_weights, axis=0) ** 2).sum(0)
        return jnp.take_along_axis(packed, picked[None, :, None], axis=0)[0], ess

    keys = jax.random.split(rng_key, num_samples)
    packed, ess = batch.over_draws(one, keys, globals_, per_draw=particles)
    packed = jnp.moveaxis(packed, 0, 1)
    found = finish(batch, packed, rng_key, globals_, groups=groups, derived=derived)
    if "sample_stats" in groups:
        found["sample_stats"] = {"effective_particles": ess}
    return found
