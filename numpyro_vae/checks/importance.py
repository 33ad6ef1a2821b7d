"""Importance: what the importance weights of a row's draws say about its posterior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from numpyro_vae.checks.base import (
    COLOURS,
    Finding,
    Findings,
    RowwiseCheck,
    Subject,
    require_variable,
    slices_of,
)
from numpyro_vae.inference.draws import faults_of, told
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.faults import Faults, in_words
from numpyro_vae.inference.psis import (
    UNTRUSTWORTHY,
    khat_of_tail,
    khat_threshold,
    require_draws,
    require_finite,
    tail_length,
)
from numpyro_vae.inference.quantities import weigh
from numpyro_vae.inference.rounding import rounding_errors
from numpyro_vae.model.supports import explain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Importance"]

CHUNK = 1000  # draws at once, so that any number of them fits in memory
LOOKED = 256  # rows that an error is about, where no row has finite weights
COPIES = 256  # of a row, among which it is to have the same ELBO as among the others
RTOL = 1e-3  # of an ELBO, or of a nat, that may be rounding
LOWEST = -1e30  # stands for minus infinity, which has no weight, but times which it is NaN
VERDICTS = ("fine", "reweight", "borderline", "not to be trusted")
VERDICT_COLOURS = (COLOURS[0], "#56B4E9", *COLOURS[1:])
MAX_DIVERGENCE = 0.1  # nats up to which draws are as good as those of the posterior itself
MAX_ROUNDING = 0.1  # nats of rounding error, above which the bounds are not what they seem
OUTSIDE = "outside_"  # before the name of a site, of which rows have values outside its support
POSSIBLE = "are their data possible under the model?"
ALONE = (
    "verdicts, evidence and repair are of rows that are independent given the globals: write what "
    "rows share as global latents, or take sets of rows as the data, see data_sets"
)
ADVICE = "call numpyro.enable_x64() at the start of the program"


@dataclass(frozen=True)
class Importance(RowwiseCheck):
    r"""The ELBO, log evidence, divergence, k-hat and effective sample size of each row.

    They come from the importance weights :math:`w_s = p(x, z_s) / q(z_s \mid x)` of a row's draws.
    The ELBO is the mean of :math:`\log w_s`, the log evidence
    :math:`\log \frac1S \sum_s w_s`, and the effective sample size
    :math:`(\sum_s w_s)^2 / \sum_s w_s^2`. The divergence, the log evidence less the ELBO, estimates
    :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x))`. Draws are added up as they come, and of
    their weights only the tail is kept, so that memory grows by the square root of their number.

    A row is *fine*, and its draws are usable as they are, if its k-hat is below the threshold and
    its divergence, plus two Monte Carlo errors, is at most 0.1 nats. If only its k-hat is, the
    verdict is *reweight*: its draws are usable with their weights. A k-hat from the threshold to 1
    is *borderline*, as is a row whose log weights have rounding errors above 0.1 nats in float32;
    one above 1 is *not to be trusted*.

    Args:
        num_samples: draws of each row, at least 100.

    Reference:
        Yao, Vehtari, Simpson and Gelman, *Yes, but Did It Work?*, ICML 2018; Burda, Grosse and
        Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016.

    Raises:
        ValueError: if there are too few draws for a k-hat.
    """

    name: ClassVar[str] = "importance"
    num_samples: int = 1000

    def __post_init__(self) -> None:
        require_draws(self.num_samples)

    def of_rows(self, subject: Subject) -> xr.Dataset:
        """Return the summaries of each row's weights.

        A row with weights that are not finite has an infinite k-hat, and its other summaries are
        NaN.
        """
        found = summarize(_sums_of_all(subject, self.num_samples))
        threshold = khat_threshold(self.num_samples)
        attrs = {"num_samples": self.num_samples, "khat_threshold": threshold}
        attrs |= {"max_divergence": MAX_DIVERGENCE}
        return xr.Dataset({name: ([subject.plate], x) for name, x in found.items()}, attrs=attrs)

    def of_all(self, subject: Subject, dataset: xr.Dataset) -> xr.Dataset:
        """Return the rounding error of each row's weights, if it was measured, and faulty rows.

        These are rows with values outside the support of a site, by site that has some. Attributes
        name a row whose ELBO depends on the other rows, if one was found.

        Raises:
            ValueError: if no row has finite weights.
        """
        runner, rows, key = subject.runner, subject.rows, subject.rng_key
        bad = np.concatenate([np.isnan(values) for values in slices_of(dataset["elbo"])])
        if bad.all():
            number = min(LOOKED, rows.num_chosen)
            sums = _sums_of_all(subject.part(0, number, number), self.num_samples)
            with told(runner, rows):
                found = np.asarray(sums.num_bad), np.asarray(sums.reference)
                require_finite(*found, np.arange(number))
        faults = faults_of(runner, rows, np.flatnonzero(bad))
        errors = rounding_errors(runner, rows, key, dataset["log_evidence"])
        known = {} if errors is None else {"rounding_error": ([subject.plate], errors)}
        attrs = {"not_finite": rows.data.not_finite} if bad.any() else {}
        elbo, rounding = dataset["elbo"].values, 0.0 if errors is None else errors
        attrs |= _among_copies(subject, elbo, RTOL + rounding, self.num_samples)
        return xr.Dataset(known | _outside(subject, faults), attrs=attrs)

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield how many rows are not fine, and whether rounding errors are large."""
        verdict = verdicts(dataset)
        bad = int((verdict > 0).sum())
        text = f"{bad:,} of {verdict.size:,} rows have draws that are not usable as they are"
        advice = "repair them: posterior.repair(rng_key, data, report)" if bad else ""
        yield Finding(self.name, not bad, text, advice)
        if (row := dataset.attrs.get("depends_on_others")) is not None:
            text = (
                f"rows depend on each other beyond the global latents: the ELBO of row {row} is "
                f"{dataset.attrs['elbo_among_copies']:.4g} among copies of itself, and "
                f"{float(dataset['elbo'][row]):.4g} among the other rows"
            )
            yield Finding(self.name, False, text, ALONE)
        if (coarse := int(_is_coarse(dataset).sum())) > 0:
            text = (
                f"float32 is too coarse: log weights of {coarse:,} of {verdict.size:,} rows have "
                f"rounding errors of up to {float(dataset['rounding_error'].max()):.2g} nats"
            )
            yield Finding(self.name, False, text, ADVICE)
        nowhere = np.isnan(dataset["elbo"].values)
        for name, column in dataset.data_vars.items():
            if str(name).startswith(OUTSIDE) and "support" in column.attrs:
                yield _found_outside(self.name, column)
                nowhere &= ~column.values
        if nowhere.any():
            text = (
                f"{nowhere.sum():,} rows have log weights that are not finite, the first is row "
                f"{nowhere.argmax()}: the model gives some of their draws no density, or an "
                "infinite one"
            )
            inputs = dataset.attrs.get("not_finite")
            advice = f"look at their data: {inputs}" if inputs else POSSIBLE
            yield Finding(self.name, False, text, advice)

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw the k-hat of every row, sorted, coloured and counted by its verdict.

        A k-hat of minus infinity (weights without a tail) is drawn at the bottom.
        """
        verdict, khat = verdicts(dataset), dataset["khat"].values
        order = np.argsort(khat)
        bottom = np.min(khat[np.isfinite(khat)], initial=0.0)
        heights, verdict = np.maximum(khat, bottom)[order], verdict[order]
        for value, (label, colour) in enumerate(zip(VERDICTS, VERDICT_COLOURS, strict=True)):
            places = np.flatnonzero(verdict == value)
            label = f"{label}: {len(places)} ({len(places) / len(khat):.0%})"
            ax.scatter(places + 1, heights[places], s=8, linewidths=0, color=colour, label=label)
        for threshold in (dataset.attrs["khat_threshold"], UNTRUSTWORTHY):
            ax.axhline(threshold, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        ax.set(xlabel="row, sorted", ylabel="Pareto k-hat", title="Can each posterior be trusted?")
        ax.legend(frameon=False, markerscale=2)


def _among_copies(
    subject: Subject, elbo: np.ndarray, room: np.ndarray | float, num_samples: int
) -> dict[str, Any]:
    """Return a row whose ELBO is another one among copies of itself, and that ELBO.

    ``room`` is what may be rounding, in nats, beside `RTOL` of the ELBO. Nothing is returned if it
    is the same, if the guide is of its rows alone, if the model's plate is told its rows, which are
    to be different ones, if a parameter may be by row, or if a network takes statistics of the
    rows, of which a posterior warns.
    """
    runner, rows, finite = subject.runner, subject.rows, np.flatnonzero(np.isfinite(elbo))
    alone = rows.data.is_whole or rows.num_chosen < 2 or runner.guide.not_amortized
    by_row = any(rows.num_rows in getattr(x, "shape", ()) for x in runner.params.values())
    is_told = rows.subsamples or bool(rows.held)
    if alone or by_row or is_told or any(runner.guide.sites.reads.states.values()):
        return {}
    place = finite[len(finite) // 2]
    atol = np.broadcast_to(room, elbo.shape)[place]
    copies = rows.choose(np.full(min(rows.num_chosen, COPIES), rows.chosen[place]))
    again = summarize(_sums_of_all(replace(subject, rows=copies), num_samples))["elbo"]
    found = again[np.argmax(np.abs(again - elbo[place]))]
    if np.isnan(found) or np.isclose(found, elbo[place], RTOL, atol):
        return {}
    return {"depends_on_others": int(place), "elbo_among_copies": float(found)}


def _outside(subject: Subject, faults: Faults) -> dict[str, Any]:
    """Return by site which rows have values outside its support, with what is to be said."""
    found: dict[str, Any] = {}
    for name in faults.outside:
        numbers, outside, one = faults.outside_of(name)
        column = np.isin(np.arange(subject.rows.num_rows), numbers)
        known = {"distribution": outside.distribution, "support": outside.support}
        known |= {} if one is None else {"found": one}
        found[OUTSIDE + name] = ([subject.plate], column, known)
    return found


def _found_outside(check: str, column: xr.DataArray) -> Finding:
    """Return what is to be said of a site, given which rows have values outside its support."""
    numbers, attrs = np.flatnonzero(column.values), column.attrs
    (plate,) = map(str, column.dims)
    found, name = attrs.get("found"), str(column.name).removeprefix(OUTSIDE)
    where = f" in {in_words(numbers, column.size, plate, found)}"
    text, advice = explain(name, attrs["distribution"], attrs["support"], where, found)
    return Finding(check, False, f"the {text}", advice[0].lower() + advice[1:])


def verdicts(dataset: xr.Dataset) -> np.ndarray:
    """Return for each row the index of its posterior's verdict in ``VERDICTS``.

    Raises:
        ValueError: if the importance check was not run.
    """
    for name in ("khat", "divergence"):
        require_variable(dataset, name, Importance.name)
    khat, divergence = dataset["khat"].values, dataset["divergence"].values
    close = divergence + 2 * dataset["divergence_mcse"].values <= dataset.attrs["max_divergence"]
    reliable = khat < dataset.attrs["khat_threshold"]  # NaN, of a tail of ties, is not
    reliable &= ~_is_coarse(dataset)
    return np.select([khat > UNTRUSTWORTHY, ~reliable, ~close], [3, 2, 1], 0)


def _is_coarse(dataset: xr.Dataset) -> np.ndarray:
    """Return for each row whether rounding errors are too large for k-hat and divergence."""
    if "rounding_error" not in dataset:
        return np.zeros(dataset["khat"].shape, bool)
    return dataset["rounding_error"].values > MAX_ROUNDING


def meanings(dataset: xr.Dataset) -> tuple[str, ...]:
    """Return for each of ``VERDICTS`` what it means, and what to do with its rows."""
    reliable = f"k-hat < {dataset.attrs['khat_threshold']:.2f}"
    close = f"divergence <= {dataset.attrs['max_divergence']} nats"
    coarse = f", or rounding errors above {MAX_ROUNDING} nats" if _is_coarse(dataset).any() else ""
    return (
        f"{reliable}, {close}: use the draws as they are",
        f"{reliable}: use the draws with their weights, or repair the rows",
        f"k-hat <= {UNTRUSTWORTHY:.0f}{coarse}: repair the rows",
        f"k-hat > {UNTRUSTWORTHY:.0f}: do not use the draws, repair the rows",
    )


ByRow = Float[Array | np.ndarray, "batch"]


class Sums(NamedTuple):
    """Running sums of the log weights of each row, enough for all that is reported.

    Log weights are stored less a ``reference``, the highest of the first draws, as the log density
    of an image is in the thousands and what matters of it in the hundredths.
    """

    reference: ByRow
    count: ByRow
    mean: ByRow
    squares: ByRow  # of deviations from the mean
    weighted_mean: ByRow
    log_sum: ByRow  # of the weights
    log_sum_squares: ByRow
    lowest: ByRow
    num_bad: ByRow
    largest: Float[Array | np.ndarray, "batch tail"]

    @classmethod
    def start(cls, num_rows: int, tail: int) -> Sums:
        """Return the sums of no draws, with room for ``tail`` of the largest log weights."""
        zeros = np.zeros(num_rows, jnp.result_type(float))  # NumPy's need not be compiled
        low, largest = (np.full_like(zeros, -np.inf, shape=x) for x in (num_rows, (num_rows, tail)))
        return cls(zeros, zeros, zeros, zeros, zeros, low, low, -low, zeros, largest)

    def add(self, log_weights: Float[Array, "num_samples batch"]) -> Sums:
        """Return the sums with further draws."""
        log_weights = jnp.asarray(log_weights)
        # XLA's maximum does not always pass NaN on.
        highest = jnp.where(jnp.isnan(log_weights).any(0), jnp.nan, log_weights.max(0))
        reference = jnp.where(self.count == 0, highest, self.reference)
        added = (log_weights - reference).T
        count, number = self.count + added.shape[1], added.shape[1]
        shift = added.mean(1) - self.mean
        squares = ((added - added.mean(1, keepdims=True)) ** 2).sum(1)
        both = jnp.concatenate([self.largest, added], axis=1)
        log_sum = jnp.logaddexp(self.log_sum, jax.nn.logsumexp(added, axis=1))
        weighted = (jnp.exp(added - log_sum[:, None]) * jnp.maximum(added, LOWEST)).sum(1)
        return Sums(
            reference,
            count,
            self.mean + shift * number / count,
            self.squares + squares + shift**2 * self.count * number / count,
            self.weighted_mean * jnp.exp(self.log_sum - log_sum) + weighted,
            log_sum,
            jnp.logaddexp(self.log_sum_squares, jax.nn.logsumexp(2 * added, axis=1)),
            jnp.minimum(self.lowest, added.min(1)),
            self.num_bad + (~jnp.isfinite(log_weights)).sum(0),
            jax.lax.top_k(both, self.largest.shape[1])[0],
        )


def _accumulate(
    batch: EncodedBatch, sums: Sums, rng_key: Array, globals_: dict, *, num_samples: int
) -> Sums:
    return sums.add(weigh(batch, rng_key, globals_, num_samples=num_samples)["log_weights"])


def _sums_of_all(subject: Subject, num_samples: int) -> Sums:
    """Return the sums of all draws of every row, which are added up chunk by chunk."""
    runner, rows = subject.runner, subject.rows
    sums = Sums.start(rows.num_chosen, tail_length(num_samples) + 1)
    at_once = min(CHUNK, runner.draws_at_once(rows))
    for number, done in enumerate(range(0, num_samples, at_once)):
        size, key = min(at_once, num_samples - done), jax.random.fold_in(subject.rng_key, number)
        globals_ = runner.draw_globals(key, rows, size)
        sizes = {"num_draws": size, "num_samples": size}
        sums = runner.per_batch(_accumulate, rows, key, globals_, by_row=sums, **sizes)
    return sums


def summarize(sums: Sums) -> dict[str, np.ndarray]:
    """Return what is reported of each row, from the sums over all its draws."""
    bad = np.asarray(sums.num_bad)
    with np.errstate(invalid="ignore"):  # of the other rows
        found = _summaries(sums)
    blank = dict.fromkeys(found, np.nan) | {"khat": np.inf}
    return {name: np.where(bad > 0, blank[name], values) for name, values in found.items()}


def _summaries(sums: Sums) -> dict[str, np.ndarray]:
    at = {name: np.asarray(x, float) for name, x in sums._asdict().items()}
    number = float(at["count"].max())
    elbo, log_evidence = at["mean"], at["log_sum"] - np.log(number)
    ess = np.exp(2 * at["log_sum"] - at["log_sum_squares"])
    # Variances. The weights and their logs vary together, and so that of a difference is smaller.
    of_elbo = at["squares"] / (number - 1) / number
    of_evidence = np.maximum(number / ess - 1, 0) / (number - 1)
    shared = (at["weighted_mean"] - at["mean"]) / (number - 1)
    largest, lowest = np.asarray(sums.largest), np.asarray(sums.lowest)
    return {
        "elbo": at["reference"] + elbo,
        "elbo_mcse": np.sqrt(of_elbo),
        "log_evidence": at["reference"] + log_evidence,
        "log_evidence_mcse": np.sqrt(of_evidence),
        "divergence": log_evidence - elbo,
        "divergence_mcse": np.sqrt(np.maximum(of_elbo + of_evidence - 2 * shared, 0)),
        "khat": khat_of_tail(largest.T, lowest, at["largest"][:, 0], at["reference"]),
        "ess": ess,
    }
