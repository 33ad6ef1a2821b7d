"""Several posteriors of the same rows side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array

from numpyro_vae.checks.base import NotApplicableError, require_variable
from numpyro_vae.checks.choose import Checks
from numpyro_vae.checks.report import Report
from numpyro_vae.posterior import Posterior

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Comparison", "compare"]

GAPS = ("gap_amortization", "gap_approximation")


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        reports: by name the report of each posterior.
        seconds: by name how long its checks took, compiling included.
        skipped: by name of a posterior that has none of its rows, why.
    """

    reports: dict[str, Report]
    seconds: dict[str, float]
    skipped: dict[str, str]

    @property
    def table(self) -> DataFrame:
        """A row for each posterior, the best bound first; in nats a datum where not said otherwise.

        ``elbo`` and ``log_evidence`` are means over rows; ``elbo_diff`` is how much the best
        posterior's bound is above, and ``dse`` the standard error of that difference over rows,
        as in `arviz.compare`; ``fine`` is the share of rows whose draws are usable as they are,
        ``reliable`` that of rows with a k-hat below the threshold, and ``bad`` that of rows not to
        be trusted. Gaps are there if that check was run.
        """
        import pandas as pd

        elbo = {name: report.dataset["elbo"].values for name, report in self.reports.items()}
        best = max(elbo.values(), key=np.nanmean, default=np.zeros(0))
        rows = {
            name: {**_row(report, best - elbo[name]), "seconds": self.seconds[name]}
            for name, report in self.reports.items()
        }
        table = pd.DataFrame.from_dict(rows, orient="index")
        return table.sort_values("elbo", ascending=False) if rows else table

    def __str__(self) -> str:
        """Return the table as text, and why a posterior is not in it."""
        lines = [self.table.to_string(float_format="{:.3f}".format)]
        return "\n".join(lines + [f"{name}: not compared: {x}" for name, x in self.skipped.items()])


def _row(report: Report, behind: np.ndarray) -> dict[str, float]:
    dataset, verdict = report.dataset, report.verdict
    behind = behind[np.isfinite(behind)]
    found = {
        "elbo": np.nanmean(dataset["elbo"].values),
        "elbo_diff": behind.mean(),
        "dse": behind.std() / np.sqrt(max(len(behind), 1)),
        "log_evidence": np.nanmean(dataset["log_evidence"].values),
        "fine": np.mean(verdict == 0),
        "reliable": np.mean(verdict <= 1),
        "bad": np.mean(verdict == 3),
    }
    gaps = {gap: np.nanmean(dataset[gap].values) for gap in GAPS if gap in dataset}
    return {name: float(value) for name, value in (found | gaps).items()}


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
    quantity only if the models observe the same.

    Args:
        posteriors: each `Posterior` by the name that it is to have.
        rng_key: the random key.
        data: as for `Posterior.check`, the same rows for all.
        checks: as for `Posterior.check`, the importance check among them.
        progress_bar: whether to show one for each.

    Raises:
        ValueError: if there is no posterior, or the importance check is not among the checks.
        TypeError: if an entry is no posterior.

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
    """
    if not posteriors:
        raise ValueError("posteriors is empty, expected a Posterior by each name.")
    reports, seconds, skipped = {}, {}, {}
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Posterior):
            found = type(posterior).__name__
            raise TypeError(f"posteriors[{name!r}] is of type {found}, expected a Posterior.")
        start = time.perf_counter()
        try:
            reports[name] = posterior.check(rng_key, data, checks, progress_bar=progress_bar)
            require_variable(reports[name].dataset, "khat", "importance")
        except NotApplicableError as reason:
            skipped[name] = str(reason)
            continue
        seconds[name] = time.perf_counter() - start
    return Comparison(reports, seconds, skipped)
