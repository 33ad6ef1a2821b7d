"""Novelty: which rows are unlike those that the encoder was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

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
        reference = NoveltyReference.read(subject, self._read_reference(subject))
        rows, neighbours = subject.rows, reference.neighbours
        new = neighbours.distances(subject.runner.per_batch(row_features, rows))
        scores = {
            "features": (new, neighbours.calibrating),
            "evidence": (_negative_log_evidence(subject, rows), reference.evidence),
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
        require_reference(rows)
        return rows


def require_reference(rows: Rows) -> None:
    """Raise ValueError if there are too few rows of reference."""
    if rows.num_rows < MIN_REFERENCE:
        raise ValueError(
            f"The novelty check needs at least {MIN_REFERENCE} rows of reference to tell one "
            f"row in {1 / LEVEL:.0f}, found {rows.num_rows}. Pass more, or leave it out."
        )


class Neighbours(NamedTuple):
    """Rows of reference by their features, which are brought to one scale.

    Attributes:
        kept: which features differ between the rows, ``(size,)``.
        mean: of these, ``(kept,)``.
        spread: their standard deviations.
        fitted: half of the rows, less the mean and over the spread, ``(rows, kept)``.
        calibrating: the distances of the other half from these.
    """

    kept: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    fitted: np.ndarray
    calibrating: np.ndarray

    @classmethod
    def fit(cls, known: np.ndarray) -> Neighbours:
        """Return the neighbours that rows with features ``(rows, size)`` may have."""
        spread = known.std(0)
        kept = spread > 1e-6 * (1 + np.abs(known).max(0))
        mean, spread = known[:, kept].mean(0), spread[kept]
        fitted = (known[::2, kept] - mean) / spread
        found = cls(kept, mean, spread, fitted, np.empty(0))
        return found._replace(calibrating=found.distances(known[1::2]))

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Return the mean distance of each row from its nearest neighbours."""
        rows = (features[:, self.kept] - self.mean) / self.spread
        return KDTree(self.fitted).query(rows, NEIGHBOURS)[0].mean(1)


class NoveltyReference(NamedTuple):
    """What new rows are compared with: neighbours, and the negative log evidence of each row."""

    neighbours: Neighbours
    evidence: np.ndarray

    @classmethod
    def read(cls, subject: Subject, rows: Rows) -> NoveltyReference:
        """Return what there is to know of rows of reference.

        Args:
            subject: whose posterior and key are used.
            rows: of reference.
        """
        neighbours = Neighbours.fit(subject.runner.per_batch(row_features, rows))
        return cls(neighbours, _negative_log_evidence(subject, rows))


def row_features(batch: EncodedBatch) -> Array:
    """Return the encoder's features of each row, as one vector.

    Of features by plate they are those of the whole, which are made of all elements, whatever their
    number and order.
    """
    said = replace(batch, encoding=batch.network)
    found, plate = features_of(said), batch.encoding.run.plate.name
    leaves = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(found.get(plate, found))]
    return jnp.concatenate(leaves, axis=1)


def _negative_log_evidence(subject: Subject, rows: Rows) -> np.ndarray:
    """Return the negative log evidence of rows, given one draw of the global sites."""
    runner, key = subject.runner, subject.rng_key
    globals_ = runner.draw_globals(key, subject.rows, 1)
    sizes = {"num_samples": 1, "particles": PARTICLES, "row_axis": 1, "num_draws": PARTICLES}
    return -runner.per_batch(evidence, rows, key, globals_, **sizes)["log_evidence"][0]


def _share_above(new: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return each new score's conformal p-value: the share of the known as high, itself too."""
    below = np.searchsorted(np.sort(known), new, side="left")
    return (len(known) - below + 1) / (len(known) + 1)
