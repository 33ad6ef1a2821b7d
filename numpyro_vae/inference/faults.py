"""What is wrong with rows of new data: it ends no call, and no such row is called fine."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.supports import Outside, explain

NAMED = 5  # rows that a message names


@dataclass(frozen=True)
class Faults:
    """What is wrong with rows, gathered batch by batch from what is computed of them, told once.

    Attributes:
        rows: the data.
        outside: by observed site, rows with values outside its support, and what is known of them.
        unknown: rows with draws, or densities of them, that are not numbers.
        impossible: rows to which the model gives no density at any draw.
    """

    rows: Rows
    outside: dict[str, list[tuple[np.ndarray, Outside]]] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)
    impossible: set[int] = field(default_factory=set)

    def take(self, rows: Rows, found: Any, by_site: dict[str, Outside]) -> Any:
        """Return what was found of rows, and take which have values outside supports."""
        for name, outside in by_site.items():
            places = np.flatnonzero(outside.values)
            if places.size:
                self.outside.setdefault(name, []).append((rows.chosen[places], outside))
        return found

    def look_at(self, rows: Rows, by_group: dict[str, Any]) -> None:
        """Look at what is drawn of rows; see `quantities.draws`."""
        self._add(self.unknown, rows, by_group.get("unknown", np.zeros((1, rows.num_chosen), bool)))
        for values in by_group.get("sample_stats", {}).values():
            self.look_at_densities(rows, values)

    def look_at_draws(self, rows: Rows, draws: Iterable[np.ndarray]) -> None:
        """Look for draws ``(num_samples, rows, ...)`` that are not numbers."""
        for values in map(np.asarray, draws):
            if not is_finite(values):
                by_row = np.moveaxis(np.isnan(values), 1, 0).reshape(values.shape[1], -1)
                self._add(self.unknown, rows, by_row.T)

    def look_at_densities(self, rows: Rows, densities: np.ndarray) -> None:
        """Look for log densities ``(num_samples, rows)`` that no draw of a row should have.

        A draw of no density is none of them, unless no draw of the row has any.
        """
        if not is_finite(densities):
            self._add(self.unknown, rows, np.isnan(densities) | (densities == np.inf))
            self._add(self.impossible, rows, (densities == -np.inf).all(0, keepdims=True))

    def _add(self, to: set[int], rows: Rows, found: np.ndarray) -> None:
        to.update(rows.chosen[found.any(0)].tolist())

    def outside_of(self, name: str) -> tuple[np.ndarray, Outside, Any]:
        """Return the rows with values outside the support of a site, what it is, and one value."""
        numbers, known = zip(*self.outside[name], strict=True)
        found = known[0].found
        one = None if found is None else found.flat[int(np.argmax(known[0].values))].item()
        return np.unique(np.concatenate(numbers)), known[0], one

    def sentences(self) -> list[str]:
        """Return what was found, in words."""
        plate, total, told, explained = self.rows.plate, self.rows.num_chosen, [], set()
        for name in self.outside:
            numbers, outside, one = self.outside_of(name)
            where = f" in {in_words(numbers, total, plate, one)}"
            found, remedy = explain(name, outside.distribution, outside.support, where, one)
            told.append(f"The {found}. {remedy}.{of_all(numbers, total)}")
            explained.update(numbers.tolist())
        if unknown := sorted(self.unknown - explained):
            inputs = self.rows.data.not_finite
            why = inputs or "look at their data and covariates"
            found = in_words(np.array(unknown), total, plate)
            told.append(f"Draws, or their densities, are not numbers in {found}: {why}.")
        if impossible := sorted(self.impossible - explained - self.unknown):
            found = in_words(np.array(impossible), total, plate)
            told.append(
                f"The model gives no draw any density in {found}: are their data possible under it?"
            )
        return told

    def warn(self) -> None:
        """Warn of what was found, if anything was."""
        if told := self.sentences():
            told.append("What is returned of these rows is no posterior.")
            warnings.warn(" ".join(told), UserWarning, stacklevel=4)


def in_words(numbers: np.ndarray, total: int, plate: str, found: Any = None) -> str:
    """Return how many rows of a plate these are, the first of them, and what one of them has.

    Example:
        >>> in_words(np.array([3, 5]), 200, "data", 0.5)
        "2 of 200 rows of plate 'data' (rows [3, 5]; found 0.5)"
    """
    few = f"rows {numbers[:NAMED].tolist()}" + " and others" * (len(numbers) > NAMED)
    such = "" if found is None else f"; found {found:.7g}"
    return f"{len(numbers):,} of {total:,} rows of plate {plate!r} ({few}{such})"


def of_all(numbers: np.ndarray, total: int) -> str:
    """Return what to ask where all rows have such values."""
    swapped = " As all rows have them: are the arguments in the order of the model's?"
    return swapped if len(numbers) == total > 1 else ""


def is_finite(values: np.ndarray) -> bool:
    """Return whether all values are surely finite, at the cost of adding them up."""
    if not np.issubdtype(values.dtype, np.floating):
        return True
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(values.sum()))
