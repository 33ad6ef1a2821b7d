"""Checks, datum by datum, of whether a posterior can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array
from scipy.special import logsumexp

from numpyro_vae.posterior import Posterior

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["Check", "check", "khat_threshold", "pareto_khat"]

MIN_SAMPLES = 100  # of fewer draws the tail is too short to judge, and the threshold below 0.5
COLLAPSED = 0.01  # nats of mean divergence from the prior below which a dimension says nothing
VERDICTS = ("fine", "borderline", "not to be trusted")
DIVERGENCE_SAMPLES = 32  # enough for a mean; most divergences are known in closed form
UNTRUSTWORTHY = 1.0  # a k-hat from which on the weights have no finite mean


def khat_threshold(num_samples: int) -> float:
    r"""Return the k-hat below which an importance estimate from so many draws is reliable.

    .. math:: \min(1 - 1 / \log_{10} S,\; 0.7)

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto Smoothed Importance Sampling*,
        Journal of Machine Learning Research 25(72), 2024.

    Example:
        >>> round(khat_threshold(100), 2), khat_threshold(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_samples), 0.7)


def pareto_khat(log_weights: np.ndarray) -> np.ndarray:
    """Return the Pareto k-hat of each datum's importance weights, by ``arviz_stats``.

    Weights that are all alike, up to rounding, have no tail: their k-hat is minus infinity.

    Args:
        log_weights: ``(num_samples, num_data)``.

    Raises:
        ValueError: if there are too few draws for a tail, or weights are not finite.

    Example:
        >>> log_weights = np.random.default_rng(0).normal(size=(1000, 2))
        >>> bool((pareto_khat(log_weights) < 0.5).all())
        True
    """
    from arviz_stats.base import array_stats

    num_samples = len(log_weights)
    if num_samples < MIN_SAMPLES:
        raise ValueError(
            f"A k-hat needs at least {MIN_SAMPLES} draws of each datum, found {num_samples}."
        )
    _require_finite(log_weights)
    khat = np.full(log_weights.shape[1], -np.inf)
    spread = np.ptp(log_weights, axis=0) > 1e-5 * (1 + np.abs(log_weights).max(0))
    if spread.any():
        ratios = log_weights[:, spread].T.astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):  # of a tail with ties
            khat[spread] = array_stats.psislw(-ratios, axis=-1)[1]  # it takes minus the log ratios
    return khat


def _require_finite(log_weights: np.ndarray) -> None:
    bad = ~np.isfinite(log_weights).all(0)
    if bad.any():
        rows = np.flatnonzero(bad)
        raise ValueError(
            f"{len(rows)} rows have log weights that are not finite, the first is row {rows[0]}: "
            "the model or the guide gives a draw there no density. Look at that row's data."
        )


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        dataset: on the plate's dimension, in nats where not said otherwise: ``elbo`` and
            ``log_evidence``, with their Monte Carlo standard errors ``..._mcse``;
            ``khat``; ``ess``, the effective number of the importance-weighted draws; and for
            each local site ``kl_<site>``, its divergence from the prior by dimension.
    """

    dataset: Dataset

    @property
    def verdict(self) -> np.ndarray:
        """For each datum 0 if its posterior is fine, 1 if borderline, 2 if not to be trusted."""
        khat = self.dataset["khat"].values
        return (khat >= self.dataset.attrs["khat_threshold"]).astype(int) + (khat > UNTRUSTWORTHY)

    def collapsed(self) -> dict[str, tuple[int, int]]:
        """Return by site how many latent dimensions say nothing of the data, and of how many."""
        found = {}
        for name, kl in self.dataset.data_vars.items():
            if str(name).startswith("kl_"):
                means = np.nanmean(kl.values, 0)  # without values that the model masks
                found[str(name)[3:]] = (int((means < COLLAPSED).sum()), means.size)
        return found

    def add_to(self, tree: DataTree) -> DataTree:
        """Return the DataTree with these checks as its group ``checks``."""
        return tree.assign({"checks": type(tree)(self.dataset)})

    def summary(self) -> str:
        """Return what was found, for a person to read.

        Of the means over the data, ``se`` is the standard error as an estimate for such data in
        general, and ``Monte Carlo`` the part of it that more draws would reduce.
        """
        counts = np.bincount(self.verdict, minlength=3)
        threshold, total = self.dataset.attrs["khat_threshold"], counts.sum()
        lines = [f"{total} data, {self.dataset.attrs['num_samples']} draws of each"]
        for name in ("elbo", "log_evidence"):
            values = self.dataset[name].values
            error = values.std(ddof=1) / np.sqrt(total) if total > 1 else np.nan
            monte_carlo = np.sqrt((self.dataset[f"{name}_mcse"].values ** 2).sum()) / total
            found = f"{values.mean():10.3f} nats a datum"
            lines.append(f"  {name:<13}{found} (se {error:.3f}, Monte Carlo {monte_carlo:.3f})")
        ranges = (f"k-hat < {threshold:.2f}", f"up to {UNTRUSTWORTHY}", f"above {UNTRUSTWORTHY}")
        for label, count, khats in zip(VERDICTS, counts, ranges, strict=True):
            lines.append(f"  {label:<19}{count:6d}  ({count / total:6.1%})  {khats}")
        for site, (collapsed, size) in self.collapsed().items():
            lines.append(f"  site {site!r}: {collapsed} of {size} dimensions collapsed")
        return "\n".join(lines)


def check(
    posterior: Posterior,
    rng_key: Array,
    data: Any,
    *,
    num_samples: int = 1000,
    batch_axes: Any = 0,
    coords: dict[str, Any] | None = None,
) -> Check:
    r"""Check the posterior of every datum.

    With :math:`w_s = p(x, z_s) / q(z_s \mid x)` for draws from the guide, the ELBO is the mean of
    :math:`\log w_s`, the log evidence :math:`\log \frac1S \sum_s w_s`, and the shape k-hat of the
    weights' tail says whether the guide covers the posterior of *this* datum.

    Global latents are those of each draw: what is judged is the local posterior given them.

    Args:
        posterior: the trained posterior.
        rng_key: the random key.
        data: as for `fit`, any number of rows.
        num_samples: draws of each datum.
        batch_axes: as for `fit`.
        coords: coordinates by dimension, as ArviZ takes them.

    Raises:
        ValueError: if there are too few draws for a k-hat, or a datum's weights are not finite.

    Reference:
        Yao, Vehtari, Simpson and Gelman, *Yes, but Did It Work? Evaluating Variational
        Inference*, ICML 2018; Burda, Grosse and Salakhutdinov, *Importance Weighted
        Autoencoders*, ICLR 2016.
    """
    import xarray as xr

    log_weights = posterior.log_weights(rng_key, data, num_samples, batch_axes=batch_axes)
    divergences = posterior.divergences(rng_key, data, DIVERGENCE_SAMPLES, batch_axes=batch_axes)
    plate = posterior.guide.plate.name
    found: dict[str, Any] = {
        name: (plate, values) for name, values in _importance(log_weights).items()
    }
    for name, values in divergences.items():
        dims = [f"{name}_dim_{axis}" for axis in range(values.ndim - 1)]
        found[f"kl_{name}"] = ([plate, *dims], values)
    attrs = {"num_samples": num_samples, "khat_threshold": khat_threshold(num_samples)}
    dataset = xr.Dataset(found, attrs=attrs)
    given = coords or {}
    indexed = {dim: given.get(str(dim), np.arange(n)) for dim, n in dataset.sizes.items()}
    return Check(dataset.assign_coords(indexed))


def _importance(log_weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the weights say of each datum, a column of them each."""
    khat = pareto_khat(log_weights)
    log_weights = log_weights.astype(float)
    log_evidence = logsumexp(log_weights, axis=0) - np.log(len(log_weights))
    weights = np.exp(log_weights - log_evidence)  # of mean one
    return {
        "elbo": log_weights.mean(0),
        "elbo_mcse": log_weights.std(0, ddof=1) / np.sqrt(len(log_weights)),
        "log_evidence": log_evidence,
        "log_evidence_mcse": weights.std(0, ddof=1) / np.sqrt(len(weights)),
        "khat": khat,
        "ess": weights.sum(0) ** 2 / (weights**2).sum(0),
    }
