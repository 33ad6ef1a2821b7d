"""Gap: how many nats of a row's ELBO the network loses, and how many the family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import jax
import numpy as np
import xarray as xr
from jaxtyping import Array
from scipy.special import logsumexp

from numpyro_vae.checks.base import (
    COLOURS,
    AbstractCheck,
    Finding,
    Findings,
    Subject,
    require_at_least,
)
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.psis import require_finite
from numpyro_vae.inference.refine import log_weights, refine, release

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Gap"]

NUM_GLOBALS = 64  # draws of the global sites among which particles choose
TOLERANCE = 0.1  # nats on average, below which a gap is nothing to act on
ADVICE = {
    "amortization": "pass natural_steps=8 to Posterior, or train on Simulations",
    "approximation": "use a richer family than the guide has, up to AutoAmortizedFlow",
}


@dataclass(frozen=True)
class Gap(AbstractCheck):
    r"""The inference gap of a row, split into what the network loses and what the family loses.

    .. math::
        \underbrace{\log p(x) - L[q]}_\text{inference}
        = \underbrace{\log p(x) - L[q^*]}_\text{approximation}
        + \underbrace{L[q^*] - L[q]}_\text{amortization}

    where :math:`L` is the ELBO, :math:`q` the network's output, and :math:`q^*` the best of the
    guide's family for this very row, found by optimizing its own variational parameters. The log
    evidence is estimated from the draws of :math:`q^*`.

    Args:
        num_samples: draws of each row, before the optimization and after.
        max_rows: how many rows are looked at, evenly spread over the data.

    Reference:
        Cremer, Li and Duvenaud, *Inference Suboptimality in Variational Autoencoders*, ICML 2018.

    Raises:
        ValueError: if an option is too small.
    """

    name: ClassVar[str] = "gap"
    num_samples: int = 1000
    max_rows: int = 256

    def __post_init__(self) -> None:
        require_at_least(2, num_samples=self.num_samples)
        require_at_least(1, max_rows=self.max_rows)

    def compute(self, subject: Subject) -> xr.Dataset:
        """Return both gaps of each row, their sum, and whether the optimization converged.

        Raises:
            NotApplicableError: if the guide's variational parameters of a row are not known.
            ValueError: if no row has finite log weights.
        """
        subject.require_features()
        runner, chosen = subject.runner, subject.choose(self.max_rows)
        rows = subject.rows.choose(chosen)
        globals_ = runner.draw_globals(subject.rng_key, rows, NUM_GLOBALS)
        sizes = {"num_samples": self.num_samples, "num_draws": self.num_samples}
        found = runner.per_batch(_before_and_after, rows, subject.rng_key, globals_, **sizes)
        gaps = _gaps(found["first"].astype(float), found["last"].astype(float))
        there = np.isfinite(gaps["gap_inference"])
        if not there.any():
            require_finite(~there, found["last"].max(1), chosen)
        gaps["refined_converged"] = np.where(there, found["converged"], np.nan)
        columns = {name: subject.spread(chosen, values) for name, values in gaps.items()}
        return xr.Dataset({name: ([subject.plate], x) for name, x in columns.items()})

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield both gaps, averaged over the rows that were looked at."""
        for kind, advice in ADVICE.items():
            gaps = dataset[f"gap_{kind}"].values
            looked = np.isfinite(gaps)
            errors = dataset[f"gap_{kind}_mcse"].values[looked]
            mean, error = gaps[looked].mean(), np.sqrt((errors**2).sum()) / looked.sum()
            ok = bool(mean < TOLERANCE + 3 * error)
            text = f"the {kind} gap is {mean:.3f} nats a datum (mean of {looked.sum():,} rows)"
            yield Finding(self.name, ok, text, "" if ok else advice)
        if still := np.sum(dataset["refined_converged"].values == 0):
            text = f"the optimization of {still:,} rows stopped before it converged"
            yield Finding(self.name, False, text, "read their amortization gap as a lower bound")

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw both gaps of each row that was looked at, the widest first."""
        gaps = [dataset[f"gap_{kind}"].values for kind in ("approximation", "amortization")]
        below, above = (gap[np.isfinite(gap)].clip(0) for gap in gaps)
        order = np.argsort(-(below + above))
        places = np.arange(1, len(order) + 1)
        lower, upper = below[order], (below + above)[order]
        fill = partial(ax.fill_between, places, step="mid")
        fill(lower, color=COLOURS[1], label="approximation: the family")
        fill(lower, upper, color=COLOURS[0], label="amortization: the network")
        ax.set(xlabel="row, sorted", ylabel="nats", title="Inference gap")
        ax.legend(frameon=False)


def _before_and_after(
    batch: EncodedBatch, rng_key: Array, globals_: dict, *, num_samples: int
) -> dict:
    """Return the log weights of draws from the network's output, and from what is best."""
    refine_key, key = jax.random.split(rng_key)
    refined, converged = refine(batch, refine_key, globals_)
    first, last = (
        log_weights(seen, key, globals_, num_samples).T for seen in (release(batch), refined)
    )
    return {"first": first, "last": last, "converged": converged}


def _gaps(first: np.ndarray, last: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gaps of each row, from log weights before and after the optimization.

    They are NaN for a row with log weights that are not finite.
    """
    bad = ~np.isfinite([first, last]).all((0, 2), keepdims=True)[0]
    first, last = (np.where(bad, np.nan, weights) for weights in (first, last))
    root = np.sqrt(last.shape[1])
    evidence = logsumexp(last, axis=1) - np.log(last.shape[1])
    weights = np.exp(last - evidence[:, None])  # of mean one
    return {
        "gap_amortization": last.mean(1) - first.mean(1),
        "gap_approximation": evidence - last.mean(1),
        "gap_inference": evidence - first.mean(1),
        "gap_amortization_mcse": (last - first).std(1, ddof=1) / root,
        "gap_approximation_mcse": (weights - last).std(1, ddof=1) / root,
    }
