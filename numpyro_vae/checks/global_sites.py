"""Globals: whether the guide of the global latents has the moments of their posterior."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from scipy.stats import norm

from numpyro_vae.checks.base import AbstractCheck, Finding, Findings, NotApplicableError, Subject
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.guides.global_sites import NoDensityError
from numpyro_vae.inference.draws import told
from numpyro_vae.inference.gathering import site_dims
from numpyro_vae.inference.global_weights import Change, GlobalWeights, weigh_globals
from numpyro_vae.inference.marginal import MAX_NOISE
from numpyro_vae.inference.psis import NoWeightsError, khat_threshold, require_draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Globals"]

MAX_SHIFT = 0.1  # sds by which a mean may be off, and how far from one the ratio of sds may be
LEVEL = 0.05  # at which a site is found to be off, of all its values together
REPAIR = "call posterior.repair_globals(rng_key, data)"
ADVICE = (
    f"train with condition_on= these sites and global_guide=AutoMultivariateNormal, or {REPAIR}"
)
ADVICE_ON_OTHERS = f"train longer, take a richer guide, or {REPAIR}"  # whose guide is not ours


@dataclass(frozen=True)
class Globals(AbstractCheck):
    r"""How far the guide of the global latents is from their posterior given all data.

    Draws of the guide have the importance weights

    .. math:: w_s = p(g_s) \prod_i \hat p(x_i \mid g_s) / q(g_s),

    where each row's marginal likelihood is estimated by importance sampling of its local latents
    with the guide's own draws. Random numbers are common to all draws of the globals, and the
    particles of a row are doubled, up to 512, until the Monte Carlo error is small in nats, or
    beside the spread of the log weights. The k-hat says whether the weights can be trusted; if so,
    the weighted draws have the moments of the posterior. Reported are, by site and value, the shift
    of the mean in standard deviations of the guide, and the ratio of the weighted standard
    deviation to the guide's, with their Monte Carlo errors. Of a guide that is too narrow both are
    underestimated, as none of its draws is far out.

    It is about all data that the guide was trained on: fewer rows know less of the global latents.

    Args:
        num_samples: draws of the global latents, at least 100.

    Reference:
        Yao, Vehtari, Simpson and Gelman, *Yes, but Did It Work?*, ICML 2018; Tran, Scharth, Pitt
        and Kohn, *Importance Sampling Squared for Bayesian Inference in Latent Variable Models*,
        arXiv 1309.3339.

    Raises:
        ValueError: if there are too few draws for a k-hat.
    """

    name: ClassVar[str] = "globals"
    is_by_row: ClassVar[bool] = False
    num_samples: int = 1000

    def __post_init__(self) -> None:
        require_draws(self.num_samples)

    def compute(self, subject: Subject) -> xr.Dataset:
        """Return k-hat and effective draws of the weights, and the change of each site's moments.

        Raises:
            NotApplicableError: if there are no global latents, their guide has no density, the rows
                are not those of the fit, or the model gives some row no density at any draw.
        """
        _require_globals(subject)
        given = subject.runner, subject.rows
        try:
            with told(*given):
                found = weigh_globals(*given, subject.rng_key, self.num_samples)
        except (NoDensityError, NoWeightsError) as reason:
            raise NotApplicableError(str(reason)) from None
        threshold = khat_threshold(self.num_samples)
        attrs = {"globals_num_samples": self.num_samples, "globals_khat_threshold": threshold}
        attrs["globals_amortized"] = int(isinstance(subject.runner.guide, AmortizedGuide))
        return xr.Dataset(_weights(found) | _moments(subject, found), attrs=attrs)

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield whether the weights are reliable, and of each site how far its guide is off."""
        khat, number = float(dataset["globals_khat"]), dataset.attrs["globals_num_samples"]
        reliable = khat < dataset.attrs["globals_khat_threshold"]
        text = (
            f"weights of the global latents have a k-hat of {khat:.2f}, and "
            f"{float(dataset['globals_ess']):.0f} of {number:,} draws count"
        )
        text += "" if reliable else ", so that what they say of the sites is a lower bound"
        advice = ADVICE if dataset.attrs.get("globals_amortized", 1) else ADVICE_ON_OTHERS
        yield Finding(self.name, reliable, text, "" if reliable else advice)
        noise = float(dataset["globals_noise"])
        if noise > MAX_NOISE * max(1.0, 2 * float(dataset["globals_spread"])):
            text = f"their log weights have Monte Carlo errors of {noise:.2g} nats"
            yield Finding(self.name, False, text, "repair the local posteriors, or condition_on=")
        for name, change in _changes(dataset):
            yield self._of_site(name, change, advice)

    def _of_site(self, name: str, change: Change, advice: str) -> Finding:
        """Return what is found of a site, at its values that are furthest off."""
        z = norm.isf(LEVEL / 2 / max(change.shift.size, 1))
        far = np.abs(change.shift) - z * change.shift_mcse > MAX_SHIFT
        off = np.abs(change.ratio - 1) - z * change.ratio_mcse > MAX_SHIFT
        shift = np.unravel_index(np.abs(change.shift).argmax(), change.shift.shape)
        ratio = np.unravel_index(np.abs(np.log(change.ratio)).argmax(), change.ratio.shape)
        ok = not (far.any() or off.any())
        text = (
            f"the posterior of {name!r} is {change.ratio[ratio]:.2f} (se "
            f"{change.ratio_mcse[ratio]:.2f}) times as wide as its guide, and its mean "
            f"{np.abs(change.shift[shift]):.2f} (se {change.shift_mcse[shift]:.2f}) sds off"
        )
        text += f", at most, of {change.shift.size:,} values" if change.shift.size > 1 else ""
        return Finding(self.name, ok, text, "" if ok else advice)

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw the shift of each value's mean, and the ratio of its standard deviations."""
        for name, change in _changes(dataset):
            shift, shift_mcse, ratio, ratio_mcse = (np.ravel(part) for part in change)
            errors = ratio_mcse, shift_mcse
            ax.errorbar(shift, ratio, *errors, fmt="o", markersize=4, linewidth=0.8, label=name)
        ax.axhline(1.0, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        ax.axvline(0.0, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        ax.set(xlabel="shift of the mean, in sds of the guide", ylabel="sd beside the guide's")
        ax.set_title("Global latents: posterior beside guide")
        ax.legend(frameon=False)


def _require_globals(subject: Subject) -> None:
    """Raise NotApplicableError if there is nothing to weigh, or other rows than in training."""
    runner, rows = subject.runner, subject.rows
    guide, plate = runner.guide, subject.plate
    if not guide.global_names:
        raise NotApplicableError(f"the model has no latent sites outside plate {plate!r}")
    trained = runner.seen.num_data
    if trained not in (None, rows.num_rows):
        raise NotApplicableError(
            f"the guide of the global latents was trained on {trained:,} rows, and these are "
            f"{rows.num_rows:,}; pass the rows that it was trained on"
        )


def _weights(found: GlobalWeights) -> dict[str, Any]:
    """Return what is said of all sites together."""
    return {
        "globals_khat": found.khat,
        "globals_ess": found.ess,
        "globals_noise": found.density.noise,
        "globals_spread": found.spread,
        "globals_particles": found.density.particles,
    }


def _moments(subject: Subject, found: GlobalWeights) -> dict[str, Any]:
    """Return by site what the weights change of its moments, with the site's dimensions."""
    sites, variables = subject.runner.guide.sites, {}
    dims = site_dims(sites)
    for name, change in found.changes().items():
        of_event = [f"{name}_dim_{axis}" for axis in range(len(sites.sites[name].event_shape))]
        for part, values in change._asdict().items():
            variables[f"globals_{part}_{name}"] = ([*dims[name], *of_event], values)
    return variables


def _changes(dataset: xr.Dataset) -> Iterator[tuple[str, Change]]:
    """Yield each global site and what its weights change."""
    prefix = "globals_ratio_mcse_"
    for variable in map(str, dataset.data_vars):
        if variable.startswith(prefix):
            name = variable[len(prefix) :]
            parts = (dataset[f"globals_{part}_{name}"].values for part in Change._fields)
            yield name, Change(*parts)
