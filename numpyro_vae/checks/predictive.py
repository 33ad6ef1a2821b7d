"""Predictive: whether the model, with its latents learned, could have produced such data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array
from scipy.stats import binom

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
from numpyro_vae.inference.encoded import DrawKeys, EncodedBatch
from numpyro_vae.model.densities import observed_densities
from numpyro_vae.model.simulate import why_censored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Predictive"]

NUM_SAMPLES = 500
LEVEL = 0.01  # the share of p-values, at both ends together, that is flagged


@dataclass(frozen=True)
class Predictive(AbstractCheck):
    r"""The posterior predictive p-value of each row's log-likelihood.

    .. math:: \Pr\bigl(\log p(x^\text{rep} \mid z) \le \log p(x \mid z)\bigr),
        \quad z \sim q(z \mid x),\; x^\text{rep} \sim p(x^\text{rep} \mid z)

    It is near 0 for rows that are less likely than replicates from the model, near 1 for rows that
    are more likely. Over data from the model, at most twice a share :math:`\alpha` of them lie
    below :math:`\alpha` (Meng, *Posterior Predictive p-Values*, Annals of Statistics, 1994).

    Args:
        max_rows: how many rows are looked at, evenly spread over the data.

    Reference:
        Gelman, Meng and Stern, *Posterior Predictive Assessment of Model Fitness via Realized
        Discrepancies*, Statistica Sinica, 1996.

    Raises:
        ValueError: if ``max_rows`` is below 1.
    """

    name: ClassVar[str] = "predictive"
    max_rows: int = 256

    def __post_init__(self) -> None:
        require_at_least(1, max_rows=self.max_rows)

    def compute(self, subject: Subject) -> xr.Dataset:
        """Return each row's p-value.

        Raises:
            NotApplicableError: if an observed site cannot be drawn, or its values are censored.
        """
        if reason := why_censored(subject.runner.guide.sites):
            raise NotApplicableError(f"{reason}. Leave the predictive check out.")
        runner, chosen = subject.runner, subject.choose(self.max_rows)
        rows = subject.rows.choose(chosen)
        globals_ = runner.draw_globals(subject.rng_key, rows, NUM_SAMPLES)
        sizes = {"num_samples": NUM_SAMPLES, "num_draws": NUM_SAMPLES}
        found = runner.per_batch(_compare, rows, subject.rng_key, globals_, **sizes)
        return xr.Dataset({"predictive_p": ([subject.plate], subject.spread(chosen, found))})

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield how many p-values are extreme, too many if chance would hardly give as many."""
        found = _p_values(dataset)
        bad = int((np.minimum(found, 1 - found) < LEVEL / 2).sum())
        ok = bool(binom.sf(bad - 1, found.size, 2 * LEVEL) > 0.001)
        text = f"{bad:,} of {found.size:,} rows have extreme posterior predictive p-values"
        yield Finding(self.name, ok, text, "" if ok else "try another likelihood")

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw a histogram of the p-values."""
        ax.hist(_p_values(dataset), bins=20, range=(0, 1), color=COLOURS[0])
        ax.set(xlabel="p-value of the log-likelihood", ylabel="rows", title="Posterior predictive")


def _p_values(dataset: xr.Dataset) -> np.ndarray:
    """Return the p-values of the rows that were looked at."""
    found = dataset["predictive_p"].values
    return found[np.isfinite(found)]


def _compare(batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int) -> Array:
    """Return how often a replicate is no more likely than the row is; a tie counts a half."""
    densities = partial(observed_densities, run=batch.encoding.run)

    def one(packed: Array, globals_: dict, keys: DrawKeys) -> Array:
        latent, key = batch.complete(packed, globals_, keys), keys.of_batch
        seen = densities(batch.trace(latent, key))
        replicate = batch.trace(latent, jax.random.fold_in(key, 1), observed=False)
        again = densities(require_drawn(replicate))
        return (again < seen) + (again == seen) / 2

    packed = batch.draw(rng_key, num_samples, globals_)
    keys = jax.random.split(jax.random.fold_in(rng_key, batch.indices[0]), num_samples)
    keys = DrawKeys.make(rng_key, keys)
    return jnp.mean(batch.over_draws(one, packed, globals_, keys), axis=0)
