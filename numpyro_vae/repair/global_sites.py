"""Repairs the global sites: draws of their posterior, the rows' latents integrated out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arguments import require_whole
from numpyro_vae.guides.global_sites import NoDensityError
from numpyro_vae.inference.draws import told
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.global_space import flatten, unflatten_all
from numpyro_vae.inference.global_weights import weigh_globals
from numpyro_vae.inference.make_datatree import make_datatree
from numpyro_vae.inference.marginal import PARTICLES, LogDensity, can_double, log_density
from numpyro_vae.inference.psis import khat_threshold
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.repair.global_chains import MAX_RHAT, run_chains
from numpyro_vae.repair.global_proposals import MIN_ESS, NUM_PROPOSALS, StudentT, Weighted, adapt
from numpyro_vae.repair.methods import resample, spread

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["GlobalRepair"]

METHODS = ("importance", "nuts")
AROUND = 0.3  # the standard deviation to begin with around a point
NUM_POINTS = 2000  # of chains that are weighed
TINY = np.finfo(float).tiny
MAX_ERROR = 0.1  # sds by which the particles' error may move a mean


@dataclass(frozen=True)
class GlobalRepair:
    """Draws of the global latents from their posterior given all data.

    Attributes:
        draws: by site, ``(num_samples, *batch_shape, *event_shape)``; all count alike.
        method: ``"importance"`` or ``"nuts"``, which made them.
        passed: whether they can be trusted.
        particles: local draws of each row, by which its latents were integrated out.
        error: how far the Monte Carlo error of these moves a mean, in posterior standard
            deviations, at most.
        khat: the Pareto k-hat of the importance weights, of NUTS those of the chains' draws.
        ess: effective draws, of NUTS the fewest of any value.
        rhat: the largest r-hat of any value; NaN of importance sampling.
        runner: the trained guide, which draws the rows' latents.
    """

    draws: dict[str, np.ndarray]
    method: str
    passed: bool
    particles: int
    error: float
    khat: float
    ess: float
    rhat: float
    runner: Runner = field(repr=False)

    def __str__(self) -> str:
        """Return what was done and found, as plain text."""
        sites = ", ".join(map(repr, self.draws))
        weighed = self.method == "importance"
        judged = f"k-hat {self.khat:.2f}" + ("" if weighed else f", r-hat {self.rhat:.3f}")
        lines = [
            f"global latents {sites}: {'repaired' if self.passed else 'not repaired'}",
            f"  method                  {self.method}",
            f"  {judged}, {self.ess:.0f} effective draws",
            f"  {self.particles} particles a row, whose error moves means by {self.error:.2f} sds",
        ]
        return "\n".join(lines)

    def to_datatree(
        self,
        rng_key: Array,
        data: Any,
        *,
        num_particles: int = 64,
        groups: Iterable[str] | None = None,
        var_names: Iterable[str] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> DataTree:
        """Return what `Posterior.to_datatree` does, given the repaired draws of the globals.

        Draw ``s`` of a row's latents goes with draw ``s`` of the global ones: it is one of
        ``num_particles`` draws of the guide given these, taken by its importance weight. How many
        of them count is ``effective_particles`` in the group ``sample_stats``; a row in which they
        are few has a local posterior that is to be repaired itself.

        Args:
            rng_key: the random key.
            data: the data that were given to `Posterior.repair_globals`, or others.
            num_particles: local draws of each row for each draw of the globals.
            groups: as for `Posterior.to_datatree`, as the other arguments.
            var_names: the latent sites.
            coords: coordinates by dimension.
        """
        number = len(next(iter(self.draws.values())))
        given = (self.runner, rng_key, data, number, num_particles)
        return make_datatree(*given, False, groups, var_names, coords, globals_=self.draws)


def repair_globals(
    runner: Runner, rng_key: Array, data: Any, method: str, num_samples: int
) -> GlobalRepair:
    """Repair the global sites; see `Posterior.repair_globals`."""
    require_whole("num_samples", num_samples)
    if method not in ("auto", *METHODS):
        raise ValueError(f"method is {method!r}, expected 'auto' or one of {list(METHODS)}.")
    rows = runner.read(data)
    runner.require_like_scales()
    if not runner.guide.global_names:
        raise ValueError(
            f"The model has no latent sites outside plate {runner.guide.plate.name!r}, so that "
            "there are no globals to repair."
        )
    density_key, adapt_key, chain_key = jax.random.split(rng_key, 3)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(adapt_key)))
    with told(runner, rows):
        target, first = _start(runner, rows, density_key, rng)
    target, found = _adapt(target, first, rng)
    if method != "nuts" and found.error > MAX_ERROR and target.can_draw_prior:
        with_prior, better = _adapt(target.with_prior(), found, rng)
        if better.passes and better.error <= MAX_ERROR:
            return _by_weights(with_prior, better, rng, num_samples)
    if method == "importance" or (method == "auto" and found.passes):
        return _by_weights(target, found, rng, num_samples)
    return _by_chains(target, found, chain_key, num_samples)


@dataclass(frozen=True)
class _Target:
    """The log density of points in the unconstrained space of the global sites."""

    runner: Runner
    rows: Rows
    rng_key: Array
    particles: int
    of_prior: bool = False

    def __call__(self, points: np.ndarray) -> LogDensity:
        """Return the density of points."""
        globals_, log_det = self.runner.once(unflatten_all, self.rows, jnp.asarray(points, float))
        given = (self.runner, self.rows, self.rng_key, globals_, self.particles)
        found = log_density(*given, of_prior=self.of_prior)
        return replace(found, values=found.values + log_det)

    def finer(self, times: float) -> _Target:
        """Return the density with more particles, for an error so many times smaller.

        The error falls with their square root. They are at most four times as many, as the error
        of what has not converged says little.
        """
        particles = 2 * self.particles
        if times > 2**0.5 and can_double(self.rows, particles):
            particles *= 2
        return replace(self, particles=particles)

    @property
    def can_draw_prior(self) -> bool:
        """Whether the rows' latents have a prior that can be drawn from, and all count alike."""
        found: list[bool] = []

        def look(batch: EncodedBatch) -> None:
            proper = not any(site.is_improper for site in batch.encoding.sites)
            found.append(proper and bool(batch.encoding.sites) and batch.row_scale is None)

        self.runner.trace(look, self.rows)
        return found[0]

    def with_prior(self) -> _Target:
        """Return the density where half of the particles are of the rows' prior, few at first."""
        return replace(self, particles=PARTICLES[0], of_prior=True)

    def values(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Return the values of the global sites at points."""
        return self.runner.once(unflatten_all, self.rows, jnp.asarray(points, float))[0]


def _start(
    runner: Runner, rows: Rows, rng_key: Array, rng: np.random.Generator
) -> tuple[_Target, Weighted]:
    """Return the target, and weighted draws of the guide, or points around it if it is one."""
    try:
        found = weigh_globals(runner, rows, rng_key, NUM_PROPOSALS)
    except NoDensityError:
        target = _Target(runner, rows, rng_key, PARTICLES[0])
        drawn = runner.draw_globals(rng_key, rows, 1)
        (point,), _ = runner.once(flatten, rows, drawn)
        near = StudentT(point, AROUND * np.eye(len(point)))
        points = near.sample(rng, NUM_PROPOSALS)
        return target, Weighted.of(points, target(points), near.log_prob(points))
    points, _ = runner.once(flatten, rows, found.draws)
    target = _Target(runner, rows, found.density_key, found.density.particles)
    log_weights = np.log(np.maximum(found.smoothed[:, 0], TINY))
    return target, Weighted(points, found.density, log_weights, found.khat)


def _adapt(target: _Target, first: Weighted, rng: np.random.Generator) -> tuple[_Target, Weighted]:
    """Adapt importance sampling, with as many particles as its means need."""
    while True:
        more = can_double(target.rows, target.particles)
        max_error = MAX_ERROR / 2 if more else np.inf
        found = adapt(first, target, rng, max_error)
        if found.error <= max_error:
            return target, found
        target, first = target.finer(found.error / max_error), found


def _by_weights(
    target: _Target, found: Weighted, rng: np.random.Generator, num_samples: int
) -> GlobalRepair:
    """Return draws resampled by their weights."""
    (chosen,) = resample(np.exp(found.log_weights)[None], num_samples, rng)
    said = {"khat": found.khat, "ess": found.ess, "rhat": np.nan, "error": found.error}
    passed = found.passes and found.error <= MAX_ERROR
    return _repair(target, found.points[chosen], "importance", passed=passed, **said)


def _by_chains(target: _Target, found: Weighted, rng_key: Array, num_samples: int) -> GlobalRepair:
    """Return draws of chains that run with few particles, resampled by what more of them say.

    The two densities are near each other, so that their ratios are good importance weights; and
    every step of a chain, of which there are many, costs a fraction of what it would.
    """
    near = StudentT.fitted(found.points, found.log_weights)
    coarse = replace(target, particles=PARTICLES[0])
    given = (target.runner, target.rows, rng_key, target.rng_key, coarse.particles, near)
    chains = run_chains(*given, 1.5 * MIN_ESS)  # as their weights will cost some
    (points,) = spread(chains.points[None], min(len(chains.points), max(NUM_POINTS, num_samples)))
    weighted = Weighted.of(points, target(points), coarse(points).values)
    ess = chains.ess * weighted.ess / len(points)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
    (chosen,) = resample(np.exp(weighted.log_weights)[None], num_samples, rng)
    said = {"khat": weighted.khat, "ess": ess, "rhat": chains.rhat, "error": weighted.error}
    good = weighted.khat < khat_threshold(len(points)) and ess >= MIN_ESS
    passed = good and chains.rhat <= MAX_RHAT and weighted.error <= MAX_ERROR
    return _repair(target, points[chosen], "nuts", passed=passed, **said)


def _repair(target: _Target, points: np.ndarray, method: str, **said: Any) -> GlobalRepair:
    draws = target.values(points)
    return GlobalRepair(draws, method, particles=target.particles, runner=target.runner, **said)
