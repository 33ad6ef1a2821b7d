"""Novelty: which rows are unlike those that the encoder was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array
from scipy.spatial import KDTree
from scipy.stats import binom

from numpyro_vae.checks.base import (
    COLOURS,
    AbstractCheck,
    Finding,
    Findings,
    NotApplicableError,
    Subject,
)
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.quantities import evidence
from numpyro_vae.inference.refine import features_of
from numpyro_vae.inference.rows import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Novelty"]

LEVEL = 0.01  # the share of ordinary rows that is called novel
NEIGHBOURS = 5
PARTICLES = 64
MIN_REFERENCE = 2 * int(2 / LEVEL)  # rows: half of them calibrate the distances, of two scores


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Novelty(AbstractCheck):
    """How probable it is that an ordinary row is as unusual as each row.

    There are two scores: the distance of the encoder's features from those of the nearest rows of
    reference (Sun et al., *Out-of-Distribution Detection with Deep Nearest Neighbors*, ICML 2022),
    and the negative log evidence. Each is compared with the scores of reference rows which it
    was not fitted to, so that ``novelty``, twice the smaller share of these that score higher, is a
    valid p-value for data like the reference (Bates et al., *Testing for outliers with conformal
    p-values*, Annals of Statistics, 2023).

    Args:
        reference: data like the training data, as `fit` takes them, preferably held out from it;
            at least 400 rows.
    """

    name: ClassVar[str] = "novelty"
    reference: Any = field(default=None, repr=False)

    def compute(self, subject: Subject) -> xr.Dataset:
        """Return the p-value of each row, and the scores that it comes from.

        Raises:
            NotApplicableError: if there is no reference.
            ValueError: if the reference has too few rows.
        """
        subject.require_amortized()
        subject.require_features()
        reference = self._read_reference(subject)
        scores = {
            "features": _distances(subject, reference),
            "evidence": _negative_log_evidence(subject, reference),
        }
        shares = [_share_above(new, known) for new, known in scores.values()]
        plate = [subject.plate]
        found: dict[str, Any] = {"novelty": (plate, np.minimum(1, 2 * np.minimum(*shares)))}
        for name, (new, _) in scores.items():
            found[f"novelty_{name}"] = (plate, new)
        return xr.Dataset(found)

    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield how many rows are novel, too many if chance would hardly give as many."""
        found = dataset["novelty"].values
        novel, total = int((found <= LEVEL).sum()), found.size
        ok = bool(binom.sf(novel - 1, total, LEVEL) > 0.001)
        text = (
            f"{novel:,} of {total:,} rows are unlike the reference data "
            f"({LEVEL * total:.0f} expected by chance)"
        )
        advice = "do not trust their posteriors before a refit on such rows"
        yield Finding(self.name, ok, text, "" if ok else advice)

    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw the distribution of the p-values, and the uniform one."""
        p = np.sort(dataset["novelty"].values)
        ax.plot(p, np.arange(1, len(p) + 1) / len(p), color=COLOURS[0])
        ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        ax.axvline(LEVEL, color="grey", linestyle="--", linewidth=0.8)
        ax.set(xlabel="p-value", ylabel="share of the rows below", title="Novelty")

    def _read_reference(self, subject: Subject) -> Rows:
        """Return the rows of reference."""
        if self.reference is None:
            raise NotApplicableError(
                "it needs reference data; pass Novelty(reference), rows like the training data, "
                "preferably held out from it"
            )
        rows = subject.runner.read(self.reference)
        if rows.num_rows < MIN_REFERENCE:
            raise ValueError(
                f"The novelty check needs at least {MIN_REFERENCE} rows of reference to tell one "
                f"row in {1 / LEVEL:.0f}, found {rows.num_rows}. Pass more, or leave it out."
            )
        return rows


def _distances(subject: Subject, reference: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of new rows, and of every second of reference, from the others."""
    known = subject.runner.per_batch(_features, reference)
    new = subject.runner.per_batch(_features, subject.rows)
    spread = known.std(0)
    kept = spread > 1e-6 * (1 + np.abs(known).max(0))
    fitted, calibrating = known[::2], known[1::2]
    tree = KDTree(fitted[:, kept] / spread[kept])
    near = [tree.query(x[:, kept] / spread[kept], NEIGHBOURS)[0] for x in (new, calibrating)]
    return near[0].mean(1), near[1].mean(1)


def _features(batch: EncodedBatch) -> Array:
    """Return the encoder's features of each row, as one vector."""
    leaves = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(features_of(batch))]
    return jnp.concatenate(leaves, axis=1)


def _negative_log_evidence(subject: Subject, reference: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the negative log evidence of new rows and of the reference."""
    runner, key = subject.runner, subject.rng_key
    globals_ = runner.draw_globals(key, subject.rows, 1)
    sizes = {"num_samples": 1, "particles": PARTICLES, "row_axis": 1, "num_draws": PARTICLES}
    found = [
        -runner.per_batch(evidence, rows, key, globals_, **sizes)["log_evidence"][0]
        for rows in (subject.rows, reference)
    ]
    return found[0], found[1]


def _share_above(new: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return each new score's conformal p-value: the share of the known as high, itself too."""
    below = np.searchsorted(np.sort(known), new, side="left")
    return (len(known) - below + 1) / (len(known) + 1)
