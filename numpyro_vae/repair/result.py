"""Repair: better draws for the data whose posterior cannot be trusted, and only for those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from numpyro_vae.repair.methods import METHODS

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["Repair"]


@dataclass(frozen=True)
class Repair:
    """What `Posterior.repair` made of the rows that it was asked for.

    Attributes:
        dataset: on the plate's dimension, whose coordinates are the rows' numbers: ``method``,
            which made the draws; ``passed``, whether they can be trusted; and, NaN where the
            method has none, ``khat``, ``log_evidence``, ``converged``, ``rhat`` and ``ess``.
        groups: by ArviZ group and variable, draws ``(num_samples, rows, ...)``.
    """

    dataset: Dataset
    groups: dict[str, dict[str, np.ndarray]]

    @property
    def plate(self) -> str:
        """The name of the rows' dimension."""
        return str(self.dataset["method"].dims[0])

    @property
    def rows(self) -> np.ndarray:
        """The numbers of the rows."""
        return self.dataset[self.plate].values

    @property
    def remaining(self) -> np.ndarray:
        """The numbers of the rows that no method could mend."""
        return self.rows[~self.dataset["passed"].values]

    def __str__(self) -> str:
        """Return what was done, as plain text."""
        method, passed = self.dataset["method"].values, self.dataset["passed"].values
        lines = [f"{len(self.rows)} rows"]
        for name in METHODS:
            lines.append(f"  mended by {name:<12}{(passed & (method == name)).sum():6d}")
        lines.append(f"  not mended            {len(self.remaining):6d}")
        return "\n".join(lines)

    def add_to(self, tree: DataTree) -> DataTree:
        """Return the DataTree with the repaired rows in place of the guide's.

        Its groups ``posterior`` and ``posterior_predictive`` get other draws for these rows, whose
        ``log_weights`` in ``sample_stats`` become zero, as the new draws count alike. The group
        ``repair`` says of every row of the tree by which method its draws were made, ``amortized``
        if by the guide.

        Args:
            tree: from `Posterior.to_datatree` on the same data, with as many draws.

        Raises:
            ValueError: if the tree has fewer rows than were repaired, or another number of draws.
        """
        groups = {name: tree[name].to_dataset().copy(deep=True) for name in tree.children}
        if "posterior" not in groups:
            raise ValueError(
                f"The tree has no group 'posterior', only {list(groups)}. Pass the tree of "
                "Posterior.to_datatree on the same data."
            )
        posterior = groups["posterior"]
        drawn = [len(x) for group in self.groups.values() for x in group.values()]
        number = drawn[0] if drawn else posterior.sizes["draw"]
        sizes = posterior.sizes
        if sizes.get(self.plate, 0) <= self.rows.max(initial=-1) or sizes["draw"] != number:
            raise ValueError(
                f"The tree has {sizes.get(self.plate, 0)} rows in plate {self.plate!r} and "
                f"{sizes['draw']} draws, but {number} draws were repaired of rows up to "
                f"{self.rows.max(initial=-1)}. Pass the tree of the same data, with as many draws."
            )
        for group, variables in self.groups.items():
            for name, values in variables.items():
                if name in groups.get(group, {}):
                    self._write(groups[group][name], values)
        if "sample_stats" in groups:
            weights = groups["sample_stats"]["log_weights"]
            self._write(weights, np.zeros((number, len(self.rows)), weights.dtype))
        groups["repair"] = self._of_all(posterior[self.plate])
        return type(tree).from_dict(groups)

    def _write(self, variable: Any, values: np.ndarray) -> None:
        """Write draws of the repaired rows over those of a variable of the tree."""
        order = [dim for dim in variable.dims if dim not in ("chain", self.plate)]
        view = variable.isel(chain=0).transpose(self.plate, *order).values  # shares its memory
        view[self.rows] = np.moveaxis(values, 1, 0)

    def _of_all(self, coord: Any) -> Dataset:
        """Return the dataset with a row for each row of the tree."""
        blank: dict[str, Any] = {"method": "amortized", "passed": True}
        found = {}
        for name, column in self.dataset.items():
            values = np.full(coord.size, blank.get(str(name), np.nan), object)
            values[self.rows] = column.values
            kind = {"method": str, "passed": bool}.get(str(name), float)
            found[name] = (self.plate, values.astype(kind))
        return xr.Dataset(found, coords={self.plate: coord})


def columns(
    plate: str, rows: np.ndarray, found: dict[str, np.ndarray], rung: np.ndarray
) -> Dataset:
    """Return what was measured of rows, and by which method their draws were made."""
    variables = {"method": (plate, np.array(METHODS)[rung])}
    variables |= {name: (plate, values) for name, values in found.items()}
    return xr.Dataset(variables, coords={plate: rows})
