"""Calibration: whether credible intervals have their coverage, on data simulated from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array
from scipy.stats import kstest

from numpyro_vae.checks.base import (
    COLOURS,
    AbstractCheck,
    Finding,
    Findings,
    NotApplicableError,
    Subject,
    require_at_least,
    require_drawn,
)
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.quantities import observed, sample
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.densities import predicted_rows
from numpyro_vae.model.plan import why_tempered
from numpyro_vae.model.run import Run
from numpyro_vae.model.simulate import places, why_censored, why_not_simulable
from numpyro_vae.model.sites import ModelSites, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Calibration"]

NUM_SAMPLES = 250
REPLICATES = 20  # draws of the global sites, if there are any, that data are simulated with
PASSES = 100  # of the model over simulated rows, each of which it may compute the next ones from
INTERVALS = (0.5, 0.8, 0.95)
LEVEL = 0.001  # of a test of uniformity, divided by how many there are
DEVIATION = 0.1  # of an ECDF from the uniform, below which it is nothing to act on
ADVICE = "credible intervals are miscalibrated: see coverage_* and the gap check"

ToData = Callable[[dict], Any]
ByName = dict[str, np.ndarray]


@dataclass(frozen=True)
class Calibration(AbstractCheck):
    """The ranks of simulated latents among the guide's draws given their simulated data.

    If the guide is right, ranks are uniform; one fit serves all simulations, as the guide is
    amortized. Global sites are drawn from their posterior, and so are those of the guide's draws.

    ``pit_<site>``, along the dimension ``simulation``, is the share of draws below the latent that
    was simulated, a value of each dimension at random between its bounds; ``z_score_<site>`` and
    ``contraction_<site>`` compare the draws with it and with the prior (Betancourt, *Towards A
    Principled Bayesian Workflow*, 2020); ``coverage_<site>`` is the share of simulations inside
    central intervals; and ``tarp`` ranks the distance from a random point, for all latents together
    (Lemos et al., *Sampling-Based Accuracy Testing of Posterior Estimators*, ICML 2023). What the
    model masks is NaN.

    Args:
        num_simulations: how many rows are simulated, at least.
        to_data: from simulated values by observed site to data as `fit` takes them, for a model
            whose observed values are not one of its arguments as it stands.

    Reference:
        Talts, Betancourt, Simpson, Vehtari and Gelman, *Validating Bayesian Inference Algorithms
        with Simulation-Based Calibration*, 2018.

    Raises:
        ValueError: if there are too few simulations.
    """

    name: ClassVar[str] = "calibration"
    num_simulations: int = 500
    to_data: ToData | None = None

    def __post_init__(self) -> None:
        require_at_least(2, num_simulations=self.num_simulations)

    def compute(self, subject: Subject) -> xr.Dataset:
        """Return the ranks, and what else compares the guide's draws with the simulated latents.

        Raises:
            NotApplicableError: if the model cannot be simulated from, simulated data cannot
                replace the observed ones, or the model scales them and the latents differently.
        """
        subject.require_amortized()
        reason = why_censored(subject.runner.guide.sites)
        if reason and self.to_data is None:
            raise NotApplicableError(
                f"{reason}. Pass Calibration(to_data=...), a function from simulated values by "
                "site to data as fit takes them, censored, or leave the calibration check out."
            )
        rows, guide = subject.rows, subject.runner.guide
        plates, given = (guide.plate.name, *guide.segments), (rows.args, rows.kwargs, rows.held)
        if tempered := why_tempered(guide.reader, guide.sites, plates, *given):
            raise NotApplicableError(f"{tempered}. Leave the calibration check out.")
        truths, draws = _simulate_and_sample(subject, self.num_simulations, self.to_data)
        rng = np.random.default_rng(0)
        found: dict[str, Any] = {"tarp": (["simulation"], _tarp(truths, draws, rng))}
        for name, truth in truths.items():
            dims = subject.dims_of(name, truth.shape[1:])
            found |= _compared(name, dims, truth, draws[name], rng)
        return xr.Dataset(found, coords={"interval": list(INTERVALS)})

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield which ranks are not uniform: shifted, or too many or too few in the middle."""
        pits = dict(_pits(dataset))
        level = LEVEL / sum(2 * pit.shape[1] for pit in pits.values())
        for name, pit in pits.items():
            ranks = [u[~np.isnan(u)] for u in pit.T]
            tests = [[kstest(x, "uniform") for x in (u, abs(2 * u - 1))] for u in ranks if u.size]
            bad = sum(
                any(test.pvalue < level and test.statistic > DEVIATION for test in pair)
                for pair in tests
            )
            worst = max(test.statistic for pair in tests for test in pair)
            text = (
                f"{bad} of {len(tests)} dimensions of site {name[4:]!r} have non-uniform ranks "
                f"(largest deviation {worst:.2f}, {len(pit):,} simulations)"
            )
            if name == "tarp":
                text = f"joint ranks deviate from uniform by up to {worst:.2f} (TARP)"
            yield Finding(self.name, not bad, text, ADVICE if bad else "")

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw how far the ranks of each dimension are from uniform, and the limits of that."""
        grid = np.linspace(0, 1, 201)
        for pit in (pit for name, pits in _pits(dataset) if name != "tarp" for pit in pits.T):
            pit = np.sort(pit[~np.isnan(pit)])
            below = np.searchsorted(pit, grid, side="right") / max(len(pit), 1)
            ax.plot(grid, below - grid, color=COLOURS[0], linewidth=0.8, alpha=0.7)
        for bound in (-DEVIATION, DEVIATION):
            ax.axhline(bound, color="grey", linestyle="--", linewidth=0.8)
        ax.set(xlabel="rank", ylabel="ECDF minus uniform", title="Calibration, by dimension")
        ax.set_ylim(-max(2 * DEVIATION, -ax.get_ylim()[0]), max(2 * DEVIATION, ax.get_ylim()[1]))


def _pits(dataset: xr.Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the ranks of all latents together, then those of each site, ``(simulations, size)``."""
    for key, ranks in dataset.data_vars.items():
        if (name := str(key)) == "tarp" or name.startswith("pit_"):
            yield name, ranks.values.reshape(dataset.sizes["simulation"], -1)


def _compared(
    name: str, dims: list[str], truth: np.ndarray, drawn: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """Return the variables of one site, from simulated values and the guide's draws."""
    masked = np.isnan(truth)
    pit = _rank(drawn < truth[:, None], drawn == truth[:, None], rng)
    pit = np.where(masked, np.nan, pit)
    mean, sd = drawn.mean(1), drawn.std(1)
    inside = [_mean(np.abs(pit - 0.5) < level / 2, masked) for level in INTERVALS]
    prior = np.maximum(_mean((truth - _mean(truth, masked)) ** 2, masked), 1e-30)
    return {
        f"pit_{name}": (["simulation", *dims], pit),
        f"z_score_{name}": (["simulation", *dims], (mean - truth) / np.maximum(sd, 1e-12)),
        f"contraction_{name}": (dims, 1 - _mean(sd**2, masked) / prior),
        f"coverage_{name}": (["interval", *dims], np.stack(inside)),
    }


def _mean(x: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Return the mean over simulations of what is not masked; NaN of nothing."""
    return np.ma.filled(np.ma.masked_array(x, masked, dtype=float).mean(0), np.nan)


def _simulate_and_sample(
    subject: Subject, num_simulations: int, to_data: ToData | None
) -> tuple[ByName, ByName]:
    """Return simulated latents, and draws of the guide given their data, rows in front."""
    runner = subject.runner
    replicates = REPLICATES if runner.guide.global_names else 1
    rows = _templates(subject, -(-num_simulations // replicates))
    seen = {name: np.asarray(x) for name, x in runner.per_batch(observed, rows).items()}
    repeats = max(replicates, -(-num_simulations // rows.num_chosen))
    keys = [jax.random.fold_in(subject.rng_key, number) for number in range(repeats)]
    parts = [_replicate(subject, key, rows, seen, to_data) for key in keys]
    names = parts[0][0]
    truths, draws = (
        {name: np.concatenate([part[name] for part in found]) for name in names}
        for found in zip(*parts, strict=True)
    )
    return truths, draws


def _replicate(
    subject: Subject, rng_key: Array, rows: Rows, seen: ByName, to_data: ToData | None
) -> tuple[ByName, ByName]:
    """Simulate latents and data of each row once, and draw latents given these data."""
    runner, names = subject.runner, tuple(site.name for site in subject.runner.guide.local_sites)
    key, data_key, draw_key = jax.random.split(rng_key, 3)
    held = {name: x[0] for name, x in runner.draw_globals(key, rows, 1).items()}
    made, replaced = _simulated(subject, data_key, rows, held, seen, to_data)
    globals_ = runner.draw_globals(draw_key, rows, NUM_SAMPLES)
    sizes = {"num_samples": NUM_SAMPLES, "num_draws": NUM_SAMPLES, "row_axis": 1}
    drawn = runner.per_batch(sample, replaced, draw_key, globals_, names=names, **sizes)
    truths = {name: made["latent"][name] for name in names}
    return truths, {name: np.moveaxis(x, 0, 1) for name, x in drawn.items()}


def _simulated(
    subject: Subject,
    rng_key: Array,
    rows: Rows,
    held: dict[str, Any],
    seen: ByName,
    to_data: ToData | None,
) -> tuple[dict[str, ByName], Rows]:
    """Return what is simulated of each row, and the rows with it in place of the observed data.

    A model may compute an observation from another one, which it is given as an argument. So it is
    run again, with the same key on what was simulated, until nothing changes.
    """
    given, last = rows, None
    for _ in range(PASSES):
        made = subject.runner.per_batch(_simulate, given, rng_key, held)
        given = _replace(subject, rows, seen, made["observed"], to_data)
        if last is not None and jax.tree.all(jax.tree.map(_is_same, made, last)):
            return made, given
        last = made
    raise NotApplicableError(
        f"The model computes observations from earlier ones, in more than {PASSES} steps, so that "
        "they cannot be simulated. Leave the calibration check out."
    )


def _is_same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other, equal_nan=np.issubdtype(np.asarray(one).dtype, np.inexact))


def _templates(subject: Subject, at_most: int) -> Rows:
    """Return rows whose covariates data are simulated for: some, if the model can do with some."""
    rows = subject.rows
    if rows.data.is_whole or rows.subsamples:
        return rows
    return rows.cut(subject.choose(at_most))


def _simulate(batch: EncodedBatch, rng_key: Any, globals_: dict) -> dict[str, dict]:
    """Return latents from the prior and data from the likelihood, rows in front."""
    _require_simulable(batch.encoding.run.sites, globals_)
    key = jax.random.fold_in(rng_key, batch.indices[0])
    trace = require_drawn(batch.trace(globals_, key, observed=False))
    run = batch.encoding.run
    latent = {
        site.name: jnp.moveaxis(_unmasked(trace, run, site), site.axis(run.plate), 0)
        for site in batch.encoding.sites
    }
    return {"latent": latent, "observed": predicted_rows(trace, run)}


def _unmasked(trace: dict[str, Any], run: Run, site: Site) -> Array:
    """Return the values of a latent site, NaN where the model masks them."""
    value, mask = trace[site.name]["value"], run.mask(site)
    if mask is None:
        return value
    return jnp.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, jnp.nan)


def _require_simulable(sites: ModelSites, given: dict[str, Any]) -> None:
    """Raise if the model cannot draw one of its sites."""
    if reason := why_not_simulable(sites, given):
        raise NotApplicableError(f"{reason}, or leave the calibration check out.")


def _replace(
    subject: Subject,
    rows: Rows,
    seen: ByName,
    made: ByName,
    to_data: ToData | None,
) -> Rows:
    """Return the rows with data that were simulated in place of the observed ones."""
    if to_data is not None:
        data = to_data({name: made[name] for name in seen})
        return subject.runner.read(data)
    arrays = list(rows.data.arrays)
    for name, value in seen.items():
        found = list(places(rows.data.arrays, rows.data.layout.axes, value))
        if not found:
            raise NotApplicableError(
                f"The observed values of site {name!r} are not one of the model's arguments as it "
                "stands, so simulated ones cannot be put in its place. Pass "
                "Calibration(to_data=...), a function from simulated values by site to data as fit "
                "takes them."
            )
        for number, axis in found:
            arrays[number] = jnp.moveaxis(
                jnp.asarray(made[name], arrays[number].dtype), 0, axis or 0
            )
    return rows.with_arrays(tuple(arrays))


def _rank(below: np.ndarray, same: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the share of draws below, at random between the bounds that ties leave."""
    ties = 1 + same.sum(1)
    return (below.sum(1) + rng.uniform(size=ties.shape) * ties) / (below.shape[1] + 1)


def _tarp(truths: ByName, draws: ByName, rng: np.random.Generator) -> np.ndarray:
    """Return the share of draws nearer to a random point than the simulated latents are."""
    number = len(next(iter(truths.values())))
    point = rng.permutation(number)
    nearer, distance = np.zeros((number, NUM_SAMPLES)), np.zeros(number)
    for name, truth in truths.items():
        flat, drawn = truth.reshape(number, -1), draws[name].reshape(number, NUM_SAMPLES, -1)
        masked = np.isnan(flat)
        spread = np.sqrt(_mean((flat - _mean(flat, masked)) ** 2, masked))
        scale = np.maximum(np.nan_to_num(spread), 1e-12)
        flat, away = np.nan_to_num(flat), masked | masked[point]  # of which nothing is compared
        distance += np.where(away, 0, ((flat - flat[point]) / scale) ** 2).sum(-1)
        apart = ((drawn - flat[point][:, None]) / scale) ** 2
        nearer += np.where(away[:, None], 0, apart).sum(-1)
    return _rank(nearer < distance[:, None], nearer == distance[:, None], rng)
