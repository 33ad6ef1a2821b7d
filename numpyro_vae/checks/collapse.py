"""Collapse: which latent dimensions depend on the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.nn import logsumexp
from jaxtyping import Array

from numpyro_vae.checks.base import (
    COLOURS,
    SLICE,
    Finding,
    Findings,
    RowwiseCheck,
    Subject,
    require_variable,
    slices_of,
)
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.quantities import diverge

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Collapse"]

COLLAPSED = 0.01  # nats of mean divergence from the prior below which a dimension has collapsed
NUM_SAMPLES = 32  # enough for a mean; most divergences are known in closed form
CORRELATION = "total_correlation"
MAX_PAIRED = 1024  # rows whose guides are compared with one another


@dataclass(frozen=True)
class Collapse(RowwiseCheck):
    r"""Which latent dimensions have collapsed to the prior, whatever the data.

    ``kl_<site>`` is the divergence from the prior by row and dimension; ``activity_<site>`` the
    share of a dimension's variance that is between rows, ``Var_x E_q[z]`` of that and
    ``E_x Var_q[z]`` together, of unconstrained values, above 0.01 for an active unit (Burda et al.,
    2016, take the numerator, as their prior has variance one). Of a guide that draws latents
    jointly, ``total_correlation`` is what those of its divergence leave out, by row: how far its
    latents are from independent ones (Watanabe, 1960). The mean divergence is the mutual
    information of data and latents plus the divergence of the aggregate posterior from the prior
    (Hoffman and Johnson, *ELBO surgery*, 2016): ``mutual_information``, which with :math:`M` rows
    cannot exceed :math:`\log M`, and ``aggregate_divergence``.
    """

    name: ClassVar[str] = "collapse"

    def of_rows(self, subject: Subject) -> xr.Dataset:
        """Return how far each row's guide is from the prior."""
        by_site, correlation = _run(subject, diverge)
        found = {
            f"kl_{name}": ([subject.plate, *subject.dims_of(name, kl.shape[1:])], kl)
            for name, kl in by_site.items()
        }
        if correlation is not None:
            found[CORRELATION] = ([subject.plate], correlation)
        return xr.Dataset(found)

    def of_all(self, subject: Subject, dataset: xr.Dataset) -> xr.Dataset:
        """Return how far the rows' guides are from one another."""
        found: dict[str, Any] = {}
        for name, (between, within) in _variances(subject).items():
            dims = subject.dims_of(name, between.shape)
            found[f"activity_{name}"] = (dims, between / (between + within))
        information = _mutual_information(subject)
        total = sum(np.nansum(part, dtype=float) for part in _divergences(dataset))
        found["mutual_information"] = information
        found["aggregate_divergence"] = float(total / subject.rows.num_chosen - information)
        return xr.Dataset(found)

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield how many dimensions of each site have collapsed."""
        for site, (collapsed, size) in count_collapsed(dataset).items():
            text = f"{collapsed} of {size} dimensions of site {site!r} have collapsed to the prior"
            advice = (
                "use fewer dimensions, or train with AnnealedELBO or FreeBitsELBO"
                if collapsed
                else ""
            )
            yield Finding(self.name, not collapsed, text, advice)

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw the mean divergence of each dimension, sorted, collapsed ones in another colour."""
        require_variable(dataset, "kl_", self.name)
        means = {}
        for name, kl in mean_divergences(dataset):
            for index, value in np.ndenumerate(kl):
                means[f"{name}[{', '.join(map(str, index))}]".removesuffix("[]")] = value
        names = sorted(means, key=lambda name: -means[name])
        heights = np.array([means[name] for name in names])
        collapsed = heights < COLLAPSED
        colours = [COLOURS[2] if low else COLOURS[0] for low in collapsed]
        ax.bar(names, np.maximum(heights, COLLAPSED / 10), color=colours)
        label = f"collapsed below {COLLAPSED} nats: {collapsed.sum()} of {len(names)}"
        ax.axhline(COLLAPSED, color="grey", linestyle="--", linewidth=0.8, label=label)
        ax.set(yscale="log", ylabel="KL from the prior (nats)", title="Latent dimensions")
        ax.set_ylim(COLLAPSED / 10, 5 * max(heights.max(), COLLAPSED))
        ax.tick_params("x", rotation=90 if len(names) > 8 else 0)
        ax.legend(frameon=False, loc="upper right")


def mean_divergences(dataset: xr.Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every site's divergence from the prior by dimension, averaged over the rows.

    Values that the model masks do not count; a dimension that it masks in every row is NaN.
    """
    for key, kl in dataset.data_vars.items():
        if (name := str(key)).startswith("kl_"):
            number, total = np.zeros(kl.shape[1:], int), np.zeros(kl.shape[1:])
            for values in slices_of(kl):
                there = np.isfinite(values)
                number = number + there.sum(0)
                total = total + np.where(there, values, 0).sum(0, dtype=float)
            yield name[3:], np.where(number, total / np.maximum(number, 1), np.nan)


def count_collapsed(dataset: xr.Dataset) -> dict[str, tuple[int, int]]:
    """Return by site how many latent dimensions have collapsed to the prior, and of how many."""
    return {
        name: (int((means < COLLAPSED).sum()), int(np.isfinite(means).sum()))
        for name, means in mean_divergences(dataset)
    }


def _divergences(dataset: xr.Dataset) -> Iterator[np.ndarray]:
    """Yield all that adds up to the divergence of the latents together, in slices of rows."""
    for key, part in dataset.data_vars.items():
        if str(key).startswith("kl_") or key == CORRELATION:
            yield from slices_of(part)


def _run(subject: Subject, quantity: Any) -> Any:
    """Run a quantity of draws of each row."""
    runner, rows, key = subject.runner, subject.rows, subject.rng_key
    globals_ = runner.draw_globals(key, rows, NUM_SAMPLES)
    sizes = {"num_samples": NUM_SAMPLES, "num_draws": NUM_SAMPLES}
    return runner.per_batch(quantity, rows, key, globals_, **sizes)


def _variances(subject: Subject) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return by site the variance of the rows' means, and the mean of their variances."""
    first, sums = {}, {}
    for rows in subject.rows.parts(SLICE):
        for name, (means, variances) in _run(replace(subject, rows=rows), _moments).items():
            there = np.isfinite(means)
            number = there.sum(0)
            total = np.where(there, means, 0).sum(0, dtype=float)
            off = np.where(there, means - first.setdefault(name, total / np.maximum(number, 1)), 0)
            within = np.where(there, variances, 0).sum(0, dtype=float)
            added = number, off.sum(0), (off**2).sum(0), within
            sums[name] = [x + y for x, y in zip(sums.get(name, (0, 0, 0, 0)), added, strict=True)]
    with np.errstate(invalid="ignore"):  # of values that the model masks in every row
        return {
            name: (
                np.asarray(squares / number - (total / number) ** 2),
                np.asarray(within / number),
            )
            for name, (number, total, squares, within) in sums.items()
        }


def _moments(batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return by site the means and variances of its unconstrained values, rows in front.

    They are NaN where the model masks the value.
    """
    packed = batch.draw(rng_key, num_samples, globals_)
    plate, mask = batch.encoding.run.plate, batch.encoding.mask
    found = packed.mean(0), packed.var(0)
    found = found if mask is None else [jnp.where(mask, x, jnp.nan) for x in found]
    moments = [batch.encoding.unpack(x) for x in found]
    return {
        site.name: tuple(jnp.moveaxis(x, site.axis(plate), 0) for x in (mean, variance))
        for (site, mean), (_, variance) in zip(*moments, strict=True)
    }


def _mutual_information(subject: Subject) -> float:
    """Return the mutual information of rows and latents, from ``MAX_PAIRED`` rows at most."""
    chosen = subject.rows.choose(subject.choose(MAX_PAIRED))
    globals_ = subject.runner.draw_globals(subject.rng_key, subject.rows, 1)
    ratios = subject.runner.per_batch(
        _log_density_ratios, chosen, subject.rng_key, globals_, batch_size=MAX_PAIRED
    )
    return float(ratios.mean())


def _log_density_ratios(batch: EncodedBatch, rng_key: Array, globals_: dict) -> Array:
    """Return log q(z|x) minus the log density of the aggregate posterior, at a draw of each row.

    They are NaN if rows have different latents, as the model masks others in some of them.
    """
    encoding = batch.encoding.condition(globals_)
    draws = batch.draw(rng_key, 1, globals_)[0]

    def one(draw: Array) -> Array:
        return encoding.log_prob(jnp.broadcast_to(draw, (1, *draws.shape)))[0]

    by_guide = jax.lax.map(one, draws, batch_size=32)  # draws, guides
    ratios = jnp.diagonal(by_guide) - logsumexp(by_guide, axis=1) + jnp.log(len(draws))
    if encoding.mask is None:
        return ratios
    return jnp.where((encoding.mask == encoding.mask[0]).all(), ratios, jnp.nan)
