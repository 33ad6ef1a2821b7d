"""Calibration: whether intervals hold what they say, on data simulated from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import kstest

from numpyro_vae.checks.base import Finding, Findings, NotApplicableError, Subject
from numpyro_vae.inference.quantities import View, observed, sample
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.densities import predicted_rows
from numpyro_vae.model.sites import is_improper

NUM_SAMPLES = 250
REPLICATES = 20  # draws of the global sites, if there are any, that data are simulated with
INTERVALS = (0.5, 0.8, 0.95)
LEVEL = 0.001  # of a test of uniformity, divided by how many there are
DEVIATION = 0.1  # of an ECDF from the uniform, below which it is nothing to act on


def calibration(
    subject: Subject, *, num_simulations: int, to_data: Callable[[dict], Any] | None
) -> dict[str, Any]:
    """Simulate latents and data, encode the data, and rank the latents among the guide's draws.

    If the guide is right, ranks are uniform; one fit serves all simulations, as the guide is
    amortized. Global sites are drawn from their posterior, and so are those of the guide's draws.

    ``pit_<site>``, along the dimension ``simulation``, is the share of draws below the latent that
    was simulated, a value of each dimension at random between its bounds; ``z_score_<site>`` and
    ``contraction_<site>`` compare the draws with it and with the prior (Betancourt, *Towards A
    Principled Bayesian Workflow*, 2020); ``coverage_<site>`` is the share of simulations inside
    central intervals; and ``tarp`` ranks the distance from a random point, for all latents together
    (Lemos et al., *Sampling-Based Accuracy Testing of Posterior Estimators*, ICML 2023).

    Reference:
        Talts, Betancourt, Simpson, Vehtari and Gelman, *Validating Bayesian Inference Algorithms
        with Simulation-Based Calibration*, 2018.

    Raises:
        ValueError: if the model cannot be simulated from, or simulated data not be put in place of
            the observed ones.
    """
    truths, draws = _simulate_and_sample(subject, num_simulations, to_data)
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"tarp": (["simulation"], _tarp(truths, draws, rng))}
    for name, truth in truths.items():
        dims = [f"{name}_dim_{axis}" for axis in range(truth.ndim - 1)]
        drawn = draws[name]
        pit = _rank(drawn < truth[:, None], drawn == truth[:, None], rng)
        mean, sd = drawn.mean(1), drawn.std(1)
        inside = [(np.abs(pit - 0.5) < level / 2).mean(0) for level in INTERVALS]
        found |= {
            f"pit_{name}": (["simulation", *dims], pit),
            f"z_score_{name}": (["simulation", *dims], (mean - truth) / np.maximum(sd, 1e-12)),
            f"contraction_{name}": (dims, 1 - (sd**2).mean(0) / truth.var(0)),
            f"coverage_{name}": (["interval", *dims], np.stack(inside)),
        }
    return found


def _require_simulable(trace: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise if the model cannot draw one of its sites."""
    for name, site in trace.items():
        if site["type"] != "sample" or name in given:
            continue
        if not site["is_observed"] and is_improper(site["fn"]):
            raise NotApplicableError(
                f"Site {name!r} has an improper prior, so data cannot be simulated from the model. "
                "Give it a proper prior, or leave the calibration check out."
            )
        if site["is_observed"] and not jnp.size(site["value"]):
            raise NotApplicableError(
                f"Site {name!r} is a numpyro.factor, of which nothing can be simulated. Write the "
                "likelihood as a distribution, or leave the calibration check out."
            )


def _simulate_and_sample(
    subject: Subject, num_simulations: int, to_data: Callable[[dict], Any] | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return simulated latents, and draws of the guide given their data, rows in front."""
    rowwise, names = subject.rowwise, [site.name for site in subject.rowwise.guide.local_sites]
    replicates = REPLICATES if rowwise.guide.global_names else 1
    rows = _templates(subject, -(-num_simulations // replicates))
    seen = {name: np.asarray(x) for name, x in rowwise.apply(observed, rows).items()}
    repeats = max(replicates, -(-num_simulations // len(rows.chosen)))
    truths: list[dict] = []
    draws: list[dict] = []
    for number in range(repeats):
        key, data_key, draw_key = jax.random.split(jax.random.fold_in(subject.rng_key, number), 3)
        held = {k: x[0] for k, x in rowwise.draw_globals(key, rows, 1).items()}
        made = rowwise.apply(_simulate, rows, data_key, held)
        replaced = _replace(subject, rows, seen, made["observed"], to_data)
        globals_ = rowwise.draw_globals(draw_key, rows, NUM_SAMPLES)
        sizes = {"num_samples": NUM_SAMPLES, "num_draws": NUM_SAMPLES, "row_axis": 1}
        drawn = rowwise.apply(sample, replaced, draw_key, globals_, names=tuple(names), **sizes)
        truths.append({name: made["latent"][name] for name in names})
        draws.append({name: np.moveaxis(x, 0, 1) for name, x in drawn.items()})
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in names}
        for parts in (truths, draws)
    ]
    return joined[0], joined[1]


def _templates(subject: Subject, at_most: int) -> Rows:
    """Return rows whose covariates data are simulated for: some, if the model can do with some."""
    rows = subject.rows
    if rows.data.is_whole or rows.subsamples:
        return rows
    return rows.cut(subject.choose(at_most))


def _simulate(view: View, rng_key: Any, globals_: dict) -> dict[str, dict]:
    """Return latents from the prior and data from the likelihood, rows in front."""
    _require_simulable(view.encoding.run.trace, globals_)
    trace = view.trace(globals_, jax.random.fold_in(rng_key, view.indices[0]), observed=False)
    run = view.encoding.run
    latent = {
        site.name: jnp.moveaxis(trace[site.name]["value"], site.axis(run.plate), 0)
        for site in view.encoding.sites
    }
    return {"latent": latent, "observed": predicted_rows(trace, run)}


def _replace(
    subject: Subject,
    rows: Rows,
    seen: dict[str, np.ndarray],
    made: dict[str, np.ndarray],
    to_data: Callable[[dict], Any] | None,
) -> Rows:
    """Return the rows with data that were simulated in place of the observed ones."""
    if to_data is not None:
        data = to_data({name: made[name] for name in seen})
        return subject.rowwise.read(data, subject.batch_axes)
    arrays = list(rows.data.arrays)
    for name, value in seen.items():
        places = list(_places(rows, value))
        if not places:
            raise NotApplicableError(
                f"The observed values of site {name!r} are not one of the model's arguments as it "
                "stands, so simulated ones cannot be put in its place. Pass to_data=, a function "
                "from simulated values by site to data as fit takes them."
            )
        for number, axis in places:
            arrays[number] = jnp.moveaxis(
                jnp.asarray(made[name], arrays[number].dtype), 0, axis or 0
            )
    return rows.with_arrays(tuple(arrays))


def _places(rows: Rows, value: np.ndarray) -> Iterator[tuple[int, int | None]]:
    """Yield which of the model's arguments are what it observes, and their datum axes."""
    for number, (array, axis) in enumerate(
        zip(rows.data.arrays, rows.data.layout.axes, strict=True)
    ):
        by_row = np.moveaxis(np.asarray(array), axis or 0, 0) if array.ndim else np.asarray(array)
        if by_row.shape == value.shape and np.array_equal(by_row, value):
            yield number, axis


def _rank(below: np.ndarray, same: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the share of draws below, at random between the bounds that ties leave."""
    ties = 1 + same.sum(1)
    return (below.sum(1) + rng.uniform(size=ties.shape) * ties) / (below.shape[1] + 1)


def _tarp(
    truths: dict[str, np.ndarray], draws: dict[str, np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Return the share of draws nearer to a random point than the simulated latents are."""
    number = len(next(iter(truths.values())))
    point = rng.permutation(number)
    nearer, distance = np.zeros((number, NUM_SAMPLES)), np.zeros(number)
    for name, truth in truths.items():
        flat, drawn = truth.reshape(number, -1), draws[name].reshape(number, NUM_SAMPLES, -1)
        scale = np.maximum(flat.std(0), 1e-12)
        distance += (((flat - flat[point]) / scale) ** 2).sum(-1)
        nearer += (((drawn - flat[point][:, None]) / scale) ** 2).sum(-1)
    return _rank(nearer < distance[:, None], nearer == distance[:, None], rng)


def find(dataset: Any, attrs: dict[str, Any]) -> Findings:
    """Return which ranks are not uniform: shifted, or too many or too few of them in the middle."""
    names = [str(x) for x in dataset.data_vars if str(x) == "tarp" or str(x).startswith("pit_")]
    pits = {name: dataset[name].values.reshape(len(dataset["simulation"]), -1) for name in names}
    level = LEVEL / sum(2 * pit.shape[1] for pit in pits.values())
    for name, pit in pits.items():
        tests = [[kstest(x, "uniform") for x in (u, abs(2 * u - 1))] for u in pit.T]
        bad = sum(
            any(test.pvalue < level and test.statistic > DEVIATION for test in pair)
            for pair in tests
        )
        worst = max(test.statistic for pair in tests for test in pair)
        which = f"{bad} of {pit.shape[1]} dimensions of site {name[4:]!r} have ranks that are not"
        if name == "tarp":
            which = f"ranks of all latents together are{' not' if bad else ''}"
        text = f"{which} uniform (at most {worst:.2f} from it, {len(pit):,} simulations)"
        advice = "intervals do not hold what they say: see coverage_*, and the gap check"
        yield Finding("calibration", not bad, text, advice if bad else "")
