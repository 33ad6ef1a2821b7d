"""What a repair returns: better draws of some rows, and diagnostics by row."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from numpyro_vae.inference.datatree import tree_name
from numpyro_vae.inference.fingerprint import NAME, of_all, require_same_tree
from numpyro_vae.inference.rows import Rows
from numpyro_vae.repair.methods import METHODS

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["Repair"]


@dataclass(frozen=True)
class Repair:
    """Repaired draws of the rows given to `Posterior.repair`, and diagnostics by row.

    Attributes:
        dataset: along the plate's dimension, with the row numbers as coordinate: ``method``, which
            made the draws; ``passed``, whether they can be trusted; and ``khat``,
            ``log_evidence``, ``converged``, ``rhat`` and ``ess``, NaN where the method has none.
        groups: by ArviZ group and variable, draws ``(num_samples, rows, ...)``.
        stale: the sites that are computed of the rows' latents, but not of these rows alone, or
            could not be computed.
    """

    dataset: Dataset
    groups: dict[str, dict[str, np.ndarray]]
    stale: tuple[str, ...] = ()

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
        """The numbers of the rows that failed with every method that was tried."""
        return self.rows[~self.dataset["passed"].values]

    def __str__(self) -> str:
        """Return how many rows each method repaired, as plain text."""
        method, passed = self.dataset["method"].values, self.dataset["passed"].values
        lines = [f"{len(self.rows)} rows"]
        for name in METHODS:
            lines.append(f"  repaired by {name:<12}{(passed & (method == name)).sum():6d}")
        lines.append(f"  not repaired            {len(self.remaining):6d}")
        return "\n".join(lines)

    def add_to(self, tree: DataTree) -> DataTree:
        """Return the DataTree with the repaired draws of these rows in place of the guide's.

        They replace draws in the groups ``posterior`` and ``posterior_predictive``. Their
        ``log_weights`` in ``sample_stats`` become zero, as repaired draws have equal weights. The
        group ``repair`` has the variables of `dataset` for every row of the tree; ``method`` is
        ``amortized`` where the draws are the guide's. The sites in `stale` are left out, with a
        warning. The tree that is given does not change.

        Args:
            tree: from `Posterior.to_datatree` on the same data, with as many draws; in memory, or
                opened from a file.

        Raises:
            ValueError: if the tree is of other data, or has another number of draws.
        """
        plate, posterior = tree_name(self.plate), self._posterior_of(tree)
        if NAME in self.dataset.attrs:
            require_same_tree("The repair", self.dataset.attrs[NAME], tree, plate)
        equal = {"log_weights": np.zeros((posterior.sizes["draw"], len(self.rows)))}
        repaired = {"posterior_predictive": {}, **self.groups, "sample_stats": equal}
        groups = {
            name: self._replace(self._current(tree, name), variables)
            for name, variables in repaired.items()
            if name in tree.children
        }
        groups["repair"] = self._of_all(posterior[plate])
        return tree.assign({name: type(tree)(dataset) for name, dataset in groups.items()})

    def _posterior_of(self, tree: DataTree) -> Dataset:
        """Return the tree's posterior, which must have all repaired rows and as many draws."""
        if "posterior" not in tree.children:
            raise ValueError(
                f"The tree has no group 'posterior', only {list(tree.children)}. Pass the tree of "
                "Posterior.to_datatree on the same data."
            )
        posterior = tree["posterior"].to_dataset()
        plate = tree_name(self.plate)
        num_rows, num_draws = posterior.sizes.get(plate, 0), posterior.sizes["draw"]
        repaired = [len(x) for group in self.groups.values() for x in group.values()]
        last = self.rows.max(initial=-1)
        if num_rows <= last or {num_draws, *repaired} != {num_draws}:
            raise ValueError(
                f"The tree has {num_rows} rows in plate {self.plate!r} and {num_draws} draws, but "
                f"{repaired[0]} draws were repaired of rows up to {last}. Pass the tree of the "
                "same data, with as many draws."
            )
        return posterior

    def _current(self, tree: DataTree, group: str) -> Dataset:
        """Return a group of a tree without what is not of the repaired draws."""
        dataset = tree[group].to_dataset()
        stale = sorted({tree_name(name) for name in self.stale} & dataset.data_vars.keys())
        if stale:
            warnings.warn(
                f"{stale} of {group!r} are not functions of the repaired rows alone, or could not "
                "be computed, and are left out of the tree, as they are of the guide's draws. "
                "Compute them from the tree's latents.",
                UserWarning,
                stacklevel=4,
            )
        return dataset.drop_vars(stale)

    def _replace(self, dataset: Dataset, variables: dict[str, np.ndarray]) -> Dataset:
        """Return a group of a tree with other draws of the repaired rows.

        Whole variables are assigned: of a tree that is opened from a file, ``values`` is a new
        array each time, and what is written into it is lost.
        """
        new, plate = {}, tree_name(self.plate)
        variables = {tree_name(name): values for name, values in variables.items()}
        for name in variables.keys() & dataset.keys():
            rows_first = dataset[name].transpose("chain", plate, ...)
            values = np.array(rows_first.values)
            values[0, self.rows] = np.moveaxis(variables[name], 1, 0)
            new[name] = rows_first.copy(data=values).transpose(*dataset[name].dims)
        return dataset.assign(new)

    def _of_all(self, coord: Any) -> Dataset:
        """Return `dataset` with every row of the tree; what was not measured is NaN."""
        blank: dict[str, Any] = {"method": "amortized", "passed": True}
        found = {}
        for name, column in self.dataset.items():
            values = np.full(coord.size, blank.get(str(name), np.nan), object)
            values[self.rows] = column.values
            kind = {"method": str, "passed": bool}.get(str(name), float)
            found[name] = (coord.name, values.astype(kind))
        return xr.Dataset(found, coords={coord.name: coord})


def columns(rows: Rows, found: dict[str, np.ndarray], methods: np.ndarray) -> Dataset:
    """Return diagnostics by row, and the method that made the row's draws, by its number."""
    plate, numbers = rows.plate, rows.chosen
    variables = {"method": (plate, np.array(METHODS)[methods])}
    variables |= {name: (plate, values) for name, values in found.items()}
    coords = {plate: numbers, NAME: (plate, rows.fingerprint[numbers])}
    return xr.Dataset(variables, coords=coords, attrs={NAME: of_all(rows.fingerprint)})
