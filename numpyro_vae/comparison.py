"""Several posteriors of the same rows side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from jaxtyping import Array

from numpyro_vae.checks.base import NotApplicableError, Subject
from numpyro_vae.checks.choose import Checks, choose_checks
from numpyro_vae.checks.importance import Importance
from numpyro_vae.checks.report import Report
from numpyro_vae.checks.stored import report_of
from numpyro_vae.guides.global_sites import NoDensityError
from numpyro_vae.inference.global_weights import weigh_whole
from numpyro_vae.inference.psis import NoWeightsError, pareto_khat
from numpyro_vae.posterior import Posterior

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Comparison", "compare"]

NUM_DRAWS = 1000  # of all latents together
OF_WHOLE = ("joint_elbo", "joint_diff", "joint_mcse", "joint_khat")
OF_ROWS = ("elbo", "elbo_diff", "dse", "log_evidence", "fine", "reliable", "bad")
GAPS = ("gap_amortization", "gap_approximation")
SAYS_WHY_NOT = (str, NotApplicableError, NoDensityError)


class Whole(NamedTuple):
    """What importance weights of all latents of all rows together say.

    Attributes:
        elbo: the mean of their logarithms, which estimates the ELBO, in nats a datum.
        mcse: its Monte Carlo standard error.
        khat: their Pareto k-hat, as `numpyro.infer.importance.psis_diagnostic` has it.
    """

    elbo: float
    mcse: float
    khat: float

    @classmethod
    def of(cls, log_weights: np.ndarray, num_rows: int) -> Whole:
        """Summarize log weights; a draw without density makes the bound minus infinity."""
        if not np.isfinite(log_weights).all():
            return cls(-np.inf, np.nan, np.inf)
        (khat,) = pareto_khat(log_weights[:, None])
        mcse = log_weights.std(ddof=1) / np.sqrt(len(log_weights))
        return cls(float(log_weights.mean()) / num_rows, float(mcse) / num_rows, float(khat))


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        reports: by name the report of each posterior; where rows have no posteriors of their own,
            that of the globals check, if it applies.
        wholes: by name what the weights of all latents together say.
        seconds: by name how long it took, compiling included.
        skipped: by name of a posterior that has not all of the checks, or no finite weights, why.
    """

    reports: dict[str, Report]
    wholes: dict[str, Whole]
    seconds: dict[str, float]
    skipped: dict[str, str]

    @property
    def table(self) -> DataFrame:
        """A row for each posterior, the best bound first; in nats a datum where not said otherwise.

        Of all rows and the global latents together are ``joint_elbo``, the bound that training
        maximizes; ``joint_diff``, how much the best posterior's is above it; ``joint_mcse``, its
        Monte Carlo standard error; and ``joint_khat``. That k-hat grows with the number of rows,
        even if each of them is fine, so compare it among guides only.

        The others are of rows, given draws of the global latents, and NaN where rows have no
        posteriors of their own. ``elbo`` and ``log_evidence`` are means over rows; ``elbo_diff`` is
        how much the best posterior's bound is above, and ``dse`` the standard error of that
        difference over rows, as in `arviz.compare`; ``fine`` is the share of rows whose draws are
        usable as they are, ``reliable`` that of rows with a k-hat below the threshold, and ``bad``
        that of rows not to be trusted. Gaps are there if that check was run. A guide none of whose
        rows has finite weights has no bounds by row, and no row to be trusted.
        """
        import pandas as pd

        elbo = {name: self.reports[name].dataset["elbo"].values for name in self.by_row}
        best = max(elbo.values(), key=_height, default=np.zeros(0))
        highest = max((whole.elbo for whole in self.wholes.values()), default=np.nan)
        rows = {}
        for name, seconds in self.seconds.items():
            found = _of_whole(self.wholes[name], highest) if name in self.wholes else {}
            found |= _of_rows(self.reports[name], best - elbo[name]) if name in elbo else {}
            rows[name] = found | {"seconds": seconds}
        table = pd.DataFrame.from_dict(rows, orient="index")
        gaps = [gap for gap in GAPS if gap in table]
        table = table.reindex(columns=[*OF_WHOLE, *OF_ROWS, *gaps, "seconds"])
        return table.sort_values(["joint_elbo", "elbo"], ascending=False)

    @property
    def by_row(self) -> tuple[str, ...]:
        """The names of the posteriors whose rows were checked."""
        return tuple(name for name, report in self.reports.items() if "khat" in report.dataset)

    def __str__(self) -> str:
        """Return the table as text, and what is not in it, with the reason."""
        lines = [self.table.to_string(float_format="{:.3f}".format, na_rep="-")]
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.skipped.items()])


def _of_whole(whole: Whole, highest: float) -> dict[str, float]:
    elbo, mcse, khat = whole
    columns = (elbo, highest - elbo, mcse, khat)
    return dict(zip(OF_WHOLE, columns, strict=True))


def _of_rows(report: Report, behind: np.ndarray) -> dict[str, float]:
    dataset, verdict = report.dataset, report.verdict
    number, mean = np.isfinite(behind).sum(), _mean(behind)
    found = {
        "elbo": _mean(dataset["elbo"].values),
        "elbo_diff": mean,
        "dse": _mean((behind - mean) ** 2) ** 0.5 / max(number, 1) ** 0.5,
        "log_evidence": _mean(dataset["log_evidence"].values),
        "fine": np.mean(verdict == 0),
        "reliable": np.mean(verdict <= 1),
        "bad": np.mean(verdict == 3),
    }
    gaps = {gap: _mean(dataset[gap].values) for gap in GAPS if gap in dataset}
    return {name: float(value) for name, value in (found | gaps).items()}


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are finite, NaN if none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else np.nan


def _height(values: np.ndarray) -> float:
    """Return the mean of the values that are finite, by which the highest are found."""
    mean = _mean(values)
    return -np.inf if np.isnan(mean) else mean


def compare(
    posteriors: Mapping[str, Any],
    rng_key: Array,
    data: Any,
    checks: Checks = "importance",
    *,
    progress_bar: bool = False,
) -> Comparison:
    """Check several posteriors on the same rows, with the same random key.

    The guides may be of any kind, and of different models of the same data; bounds are of the same
    quantity only if the models observe the same. Where rows have no posteriors of their own, as of
    ``AutoMultivariateNormal``, what is said is said of the whole. A guide that cannot be checked
    does not end the comparison: `Comparison.skipped` says why, and the others stay.

    Args:
        posteriors: each `Posterior` by the name that it is to have.
        rng_key: the random key.
        data: as for `Posterior.check`, the same rows for all.
        checks: as for `Posterior.check`, the importance check among them. If one of them does not
            apply to a guide, only the importance check is run of it; if that does not, the globals
            check.
        progress_bar: whether to show one for each.

    Raises:
        ValueError: if there is no posterior, or the importance check is not among the checks; or
            why the first posterior cannot be checked, if none can.
        TypeError: if it is no dict, or an entry is no posterior.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_vae import Posterior, compare
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x, shift=0.0):
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Normal(x / 2 + shift, 0.5**0.5))
        >>> def shifted(x):
        ...     guide(x, 1.0)
        >>> both = {"exact": guide, "shifted": shifted}
        >>> both = {name: Posterior(fn, {}, model=model) for name, fn in both.items()}
        >>> found = compare(both, jax.random.key(0), np.linspace(-1.0, 1.0, 20)).table
        >>> found.index.tolist(), found["elbo_diff"].round(1).tolist()
        (['exact', 'shifted'], [0.0, 1.0])
        >>> found["joint_diff"].round(1).tolist()
        [0.0, 1.0]
    """
    if not isinstance(posteriors, Mapping):
        found = type(posteriors).__name__
        raise TypeError(f"posteriors is of type {found}, expected a dict of a Posterior by name.")
    if not posteriors:
        raise ValueError("posteriors is empty, expected a Posterior by each name.")
    importance = _importance(checks)
    reports, wholes, seconds, skipped = {}, {}, {}, {}
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Posterior):
            found = type(posterior).__name__
            raise TypeError(f"posteriors[{name!r}] is of type {found}, expected a Posterior.")
        start = time.perf_counter()
        check = partial(posterior.check, rng_key, data, progress_bar=progress_bar)
        reports[name], of_rows = _checked(check, checks, importance)
        if reports[name] is None and isinstance(of_rows, NoWeightsError):
            reports[name] = _without_weights(posterior, rng_key, data, importance)
            of_rows = f"No row is to be trusted, as none has finite weights. {of_rows}"
        wholes[name], of_whole = _weighed(posterior, rng_key, data)
        seconds[name] = time.perf_counter() - start
        skipped[name] = of_rows or posterior.guide.no_density or of_whole
    reports, wholes = _without_none(reports), _without_none(wholes)
    known = {name: seconds[name] for name in seconds if name in {*reports, *wholes}}
    skipped = _without_none(skipped)
    wrong = [reason for reason in skipped.values() if not isinstance(reason, SAYS_WHY_NOT)]
    if wrong and not known:
        raise wrong[0]
    return Comparison(reports, wholes, known, {name: str(x) for name, x in skipped.items()})


def _importance(checks: Checks) -> Importance:
    """Return the importance check among some.

    Raises:
        ValueError: if it is not there.
    """
    chosen = {check.name: check for check in choose_checks(checks).values()}
    if Importance.name not in chosen:
        raise ValueError(
            f"The checks are {list(chosen)}, without 'importance', by which guides are compared. "
            "Add it to them."
        )
    return cast("Importance", chosen[Importance.name])


def _checked(
    check: Callable[[Checks], Report], checks: Checks, importance: Importance
) -> tuple[Report | None, ValueError | None]:
    """Return the report of the first checks that can be run, and why others cannot."""
    reasons: list[ValueError] = []
    for attempt in (checks, importance, "globals"):
        try:
            return check(attempt), reasons[0] if reasons else None
        except ValueError as reason:
            reasons.append(reason)
            if attempt is importance and isinstance(reason, NoWeightsError):
                break
    return None, reasons[1]  # of the importance check


def _without_weights(
    posterior: Posterior, rng_key: Array, data: Any, importance: Importance
) -> Report:
    """Return the report of rows none of which has finite weights: none is to be trusted."""
    runner = posterior._runner
    subject = Subject(runner, runner.read(data), rng_key)
    found = importance.of_rows(subject)
    dataset = subject.empty().assign(found.variables).assign_attrs(found.attrs)
    return report_of(dataset, (importance,), {})


def _weighed(
    posterior: Posterior, rng_key: Array, data: Any
) -> tuple[Whole | None, ValueError | None]:
    """Return what the weights of all latents together say; if there are none, why."""
    try:
        rows = posterior._runner.read(data)
        weights = weigh_whole(posterior._runner, rows, rng_key, NUM_DRAWS)
    except ValueError as reason:
        return None, reason
    return Whole.of(weights, rows.num_rows), None


def _without_none(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}
