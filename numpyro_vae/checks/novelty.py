"""Novelty: which data are unlike those that the encoder was trained on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.spatial import KDTree
from scipy.stats import binom

from numpyro_vae.checks.base import Finding, Findings, NotApplicableError, Subject
from numpyro_vae.inference.quantities import View, evidence
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Rowwise

LEVEL = 0.01  # the share of ordinary data that is called novel
NEIGHBOURS = 5
PARTICLES = 64
MIN_REFERENCE = 2 * int(2 / LEVEL)  # rows: half of them calibrate the distances, of two scores


def novelty(subject: Subject, reference: Rows | None) -> dict[str, Any]:
    """Return for each datum how probable it is that an ordinary datum is as strange as it.

    There are two scores: the distance of the encoder's features from those of the nearest data of
    reference (Sun et al., *Out-of-Distribution Detection with Deep Nearest Neighbors*, ICML 2022),
    and the negative log evidence. Each is compared with the scores of reference data which it
    was not fitted to, so that ``novelty``, twice the smaller share of these that are stranger, is a
    valid p-value for data like the reference (Bates et al., *Testing for outliers with conformal
    p-values*, Annals of Statistics, 2023).

    Args:
        subject: what is checked.
        reference: data like those of the training, preferably held out from it.

    Raises:
        NotApplicableError: if there are none.
    """
    if reference is None:
        raise NotApplicableError(
            "it compares data with others; pass reference=, rows like those of the training, "
            "preferably held out from it"
        )
    scores = {"features": _distances(subject, reference), "evidence": _surprise(subject, reference)}
    strange = {name: _share_above(new, known) for name, (new, known) in scores.items()}
    combined = np.minimum(1, 2 * np.minimum(*strange.values()))
    plate = [subject.plate]
    found: dict[str, Any] = {"novelty": (plate, combined)}
    for name, (new, _) in scores.items():
        found[f"novelty_{name}"] = (plate, new)
    return found


def read_reference(rowwise: Rowwise, reference: Any, batch_axes: Any) -> Rows | None:
    """Return the rows of reference; None if there are none.

    Raises:
        ValueError: if they are too few.
    """
    if reference is None:
        return None
    rows = rowwise.read(reference, batch_axes)
    if rows.num_rows < MIN_REFERENCE:
        raise ValueError(
            f"The novelty check needs at least {MIN_REFERENCE} rows of reference to tell one datum "
            f"in {1 / LEVEL:.0f}, found {rows.num_rows}. Give it more, or leave it out."
        )
    return rows


def _distances(subject: Subject, reference: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of new data, and of every second of reference, from the others."""
    known = subject.rowwise.apply(_features, reference)
    new = subject.rowwise.apply(_features, subject.rows)
    spread = known.std(0)
    kept = spread > 1e-6 * (1 + np.abs(known).max(0))
    fitted, calibrating = known[::2], known[1::2]
    tree = KDTree(fitted[:, kept] / spread[kept])
    near = [tree.query(x[:, kept] / spread[kept], NEIGHBOURS)[0] for x in (new, calibrating)]
    return near[0].mean(1), near[1].mean(1)


def _features(view: View) -> Array:
    """Return what the encoder says of each datum, as one vector."""
    leaves = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(dict(view.encoding.features))]
    return jnp.concatenate(leaves, axis=1)


def _surprise(subject: Subject, reference: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the negative log evidence of new data and of the reference."""
    rowwise, key = subject.rowwise, subject.rng_key
    globals_ = rowwise.draw_globals(key, subject.rows, 1)
    sizes = {"num_samples": 1, "particles": PARTICLES, "row_axis": 1, "num_draws": PARTICLES}
    found = [
        -rowwise.apply(evidence, rows, key, globals_, **sizes)["log_evidence"][0]
        for rows in (subject.rows, reference)
    ]
    return found[0], found[1]


def _share_above(new: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return each new score's conformal p-value: the share of the known as high, itself too."""
    below = np.searchsorted(np.sort(known), new, side="left")
    return (len(known) - below + 1) / (len(known) + 1)


def find(dataset: Any, attrs: dict[str, Any]) -> Findings:
    """Return how many data are novel, which is a matter of concern if more are than by chance."""
    found = dataset["novelty"].values
    novel, total = int((found <= LEVEL).sum()), found.size
    ok = binom.sf(novel - 1, total, LEVEL) > 0.001
    text = f"{novel:,} of {total:,} rows are unlike the reference, where {LEVEL * total:.0f} may be"
    yield Finding("novelty", bool(ok), text, "" if ok else "do not trust them before a refit")
