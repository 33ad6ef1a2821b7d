"""Reference: how far the guide's draws are from those of an MCMC run of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from numpyro_vae.checks.base import (
    COLOURS,
    AbstractCheck,
    Finding,
    Findings,
    Subject,
    require_at_least,
)
from numpyro_vae.inference.draws import draw_sites

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Reference"]

MAX_ERROR = 0.25  # posterior standard deviations, by which a mean may be off
MAX_RATIO = 1.25  # of standard deviations, or its inverse
MAX_RHAT = 1.01
ADVICE = "call posterior.repair, or posterior.repair_globals, and compare again"


@dataclass(frozen=True)
class Reference(AbstractCheck):
    r"""The errors of the guide's means and standard deviations, where MCMC tells the truth.

    Of every latent value it measures ``mean_error_<site>``, the guide's mean less that of the
    reference, in standard deviations of the reference; ``sd_ratio_<site>``, the guide's standard
    deviation over that of the reference; and ``wasserstein_<site>``, the distance

    .. math:: W_1 = \int_0^1 |Q_q(u) - Q_p(u)| \, du

    of the marginals, :math:`Q` their quantiles, again in standard deviations of the reference.
    Global sites are compared like local ones, so that this works for guides of any kind.

    Args:
        reference: a `numpyro.infer.MCMC` that was run on the same model and the same rows, or its
            draws by site, with a leading axis of chains and one of draws.
        num_samples: draws of the guide.

    Raises:
        TypeError: if the reference is neither, or the MCMC has not been run.

    Example:
        >>> draws = {"z": np.random.default_rng(0).normal(size=(4, 250, 100))}
        >>> check = Reference(draws)  # for posterior.check(rng_key, data, check)
    """

    name: ClassVar[str] = "reference"
    is_by_row: ClassVar[bool] = False
    reference: Any
    num_samples: int = 1000

    def __post_init__(self) -> None:
        require_at_least(2, num_samples=self.num_samples)
        if not isinstance(self.reference, Mapping) and not hasattr(self.reference, "get_samples"):
            raise TypeError(
                f"The reference is of type {type(self.reference).__name__}, expected a "
                "numpyro.infer.MCMC that was run, or its draws by site, "
                "mcmc.get_samples(group_by_chain=True)."
            )

    def compute(self, subject: Subject) -> xr.Dataset:
        """Return the errors of all latent values, and the r-hats of the reference.

        Raises:
            ValueError: if the reference lacks a latent site, or has it in another shape.
        """
        sites = {site.name: site for site in subject.runner.guide.sites.latent()}
        known = self._draws(sites)
        names = list(sites)
        draws = draw_sites(subject.runner, subject.rows, subject.rng_key, self.num_samples, names)
        found: dict[str, Any] = {}
        for name, value in draws.items():
            truth = np.asarray(known[name], float)
            self._require_shape(name, truth, value.shape[1:])
            dims = _dims(subject, name, value.ndim - 1)
            found |= {key: (dims, x) for key, x in _compared(name, value, truth).items()}
        return xr.Dataset(found)

    def _draws(self, sites: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self.reference
        if not isinstance(found, Mapping):
            try:
                found = found.get_samples(group_by_chain=True)
            except AssertionError as error:
                raise ValueError(f"The reference has no draws: {error} Run it first.") from None
        missing = sorted(sites.keys() - found.keys())
        if missing:
            raise ValueError(
                f"The reference has no draws of the sites {missing}, only of {sorted(found)}. Was "
                "it run on the same model?"
            )
        return found

    def _require_shape(self, name: str, truth: np.ndarray, shape: tuple[int, ...]) -> None:
        if truth.shape[2:] != shape:
            raise ValueError(
                f"The reference has site {name!r} with shape {truth.shape}, expected (chains, "
                f"draws, {', '.join(map(str, shape))}), as the guide has it for these data. Was it "
                "run on the same rows?"
            )

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield by site which values are off, and whether the reference itself has converged."""
        for key in (str(name) for name in dataset.data_vars):
            if not key.startswith("mean_error_"):
                continue
            site = key.removeprefix("mean_error_")
            error, ratio = abs(dataset[key].values), dataset[f"sd_ratio_{site}"].values
            spread = np.maximum(ratio, 1 / np.maximum(ratio, 1e-30))
            bad = int(((error > MAX_ERROR) | (spread > MAX_RATIO)).sum())
            text = (
                f"{bad:,} of {error.size:,} values of site {site!r} are off: means by "
                f"{np.median(error):.2f} sds (worst {error.max():.2f}), sds "
                f"{np.median(ratio):.2f} times the reference's (from {ratio.min():.2f} to "
                f"{ratio.max():.2f})"
            )
            ok = bad <= 0.05 * error.size
            yield Finding(self.name, ok, text, "" if ok else ADVICE)
            rhat = float(dataset[f"reference_rhat_{site}"].max())
            if rhat > MAX_RHAT:
                text = f"the reference itself has r-hats of site {site!r} up to {rhat:.2f}"
                yield Finding(self.name, False, text, "run more draws before you trust it")

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw by site the error of each mean against the ratio of the standard deviations."""
        keys = (str(name) for name in dataset.data_vars)
        sites = [key.removeprefix("mean_error_") for key in keys if key.startswith("mean_error_")]
        for place, site in enumerate(sites):
            errors = dataset[f"mean_error_{site}"].values.ravel()
            ratios = dataset[f"sd_ratio_{site}"].values.ravel()
            colour = COLOURS[place % len(COLOURS)]
            ax.scatter(errors, ratios, s=8, linewidths=0, color=colour, label=site, alpha=0.6)
        for line in (-MAX_ERROR, MAX_ERROR):
            ax.axvline(line, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        for line in (1 / MAX_RATIO, MAX_RATIO):
            ax.axhline(line, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        ax.set(xlabel="error of the mean (sds)", ylabel="ratio of sds", yscale="log")
        ax.set_title("Against the reference")
        ax.legend(frameon=False, markerscale=2)


def _dims(subject: Subject, name: str, number: int) -> list[str]:
    """Return names of a site's dimensions: its plates', and those that ArviZ gives."""
    guide = subject.runner.guide
    site = guide.sites.sites[name]
    by_dim = {guide.sites.plates[plate].dim: plate for plate in site.plates}
    batch = len(site.batch_shape)
    names = [by_dim.get(axis - batch, f"{name}_batch_{batch - axis}") for axis in range(batch)]
    return [*names, *(f"{name}_dim_{axis}" for axis in range(number - batch))]


def _compared(name: str, draws: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return what compares draws ``(num_samples, ...)`` with ``(chains, draws, ...)``."""
    from arviz_stats.base import array_stats

    pooled = truth.reshape(-1, *truth.shape[2:])
    sd = np.maximum(pooled.std(0), np.finfo(float).tiny)
    points = (np.arange(500) + 0.5) / 500
    apart = abs(np.quantile(draws, points, axis=0) - np.quantile(pooled, points, axis=0)).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # of values that stand still
        rhat = array_stats.rhat(_halves(truth), chain_axis=0, draw_axis=1)
    found = {
        "mean_error": (draws.mean(0) - pooled.mean(0)) / sd,
        "sd_ratio": draws.std(0) / sd,
        "wasserstein": apart / sd,
        "reference_rhat": rhat,
    }
    return {f"{key}_{name}": np.asarray(value) for key, value in found.items()}


def _halves(truth: np.ndarray) -> np.ndarray:
    """Return each chain as two, so that one alone has an r-hat too."""
    half = truth.shape[1] // 2
    return np.concatenate([truth[:, :half], truth[:, half : 2 * half]])
