"""Checks that are written to Zarr, in parts of the rows, and reports that are read from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from numpyro_vae.checks.base import AbstractCheck, NotApplicableError, RowwiseCheck, Subject
from numpyro_vae.checks.choose import CHECKS
from numpyro_vae.checks.report import Report
from numpyro_vae.inference.datatree import for_tree, require_known_dims, tree_name
from numpyro_vae.inference.make_datatree import coords_of_part
from numpyro_vae.inference.regions import (
    Regions,
    identify,
    path_of,
    read_notes,
    rows_of_part,
)
from numpyro_vae.training.identity import digest

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["open_report"]

ROW_BYTES = 2**12  # what a check holds of a row while it adds up draws
NAMES = "names"  # the attribute that has them in order, with slashes, which a store cannot have

Found = tuple[xr.Dataset, list[AbstractCheck], dict[str, str]]


@dataclass(frozen=True)
class StoredChecks:
    """Checks whose results are written to Zarr.

    Those that look at each row by itself are written part by part, and are not run again for the
    rows that are there if a run was killed; then the others run, and all are judged.

    Args:
        chosen: the checks by place.
        subject: the posterior, and the rows.
        progress_bar: whether to show one.
        named: whether each of the checks was asked for by its name.
        coords: coordinates by dimension.
        others: by check that does not run why.
    """

    chosen: Mapping[int, AbstractCheck]
    subject: Subject
    progress_bar: bool
    named: bool
    coords: Mapping[str, Any]
    others: Mapping[str, str]
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self, store: str | os.PathLike[str]) -> Found:
        """Return what `run_checks` computes: read from the store, once it is written there.

        Raises:
            NotApplicableError: if a check does not apply and was named, or none applies.
            ValueError: if there is something else than these results.
        """
        rows, plate = self.subject.rows, self.subject.plate
        whole = rows.data.is_whole or not any(self._rowwise())
        size = rows.num_rows if whole else rows_of_part(ROW_BYTES, rows.num_rows)
        path = path_of(store)
        regions = Regions(path, self._identity(), tree_name(plate), rows.num_rows, size)
        with tqdm(total=rows.num_rows, disable=not self.progress_bar, unit="row") as bar:

            def make(start: int, stop: int, size: int) -> DataTree:
                bar.update(stop - bar.n)
                return xr.DataTree(self._of_rows(start, stop, size))

            notes = regions.write(make, self._finish)
        done = [check for check in self.chosen.values() if check.name in notes["done"]]
        return open_dataset(path), done, dict(notes["skipped"])

    def _identity(self) -> dict[str, str]:
        checks = {f"the check {check.name}": _described(check) for check in self.chosen.values()}
        subject = self.subject
        given = {str(dim): np.asarray(coord).tolist() for dim, coord in self.coords.items()}
        options = {"kind": "report", "coords": digest(given), **checks}
        return identify(subject.runner, subject.rows, subject.rng_key, **options)

    def _rowwise(self) -> Iterable[tuple[int, RowwiseCheck]]:
        pairs = self.chosen.items()
        return ((place, check) for place, check in pairs if isinstance(check, RowwiseCheck))

    def _of_rows(self, start: int, stop: int, size: int) -> xr.Dataset:
        """Return what the checks that look at each row by itself say of some rows."""
        subject = self.subject.part(start, stop, size)
        if size == self.subject.rows.num_rows:
            subject = self.subject
        dataset = subject.empty()
        for place, check in self._rowwise():
            try:
                require_applicable(check, self.subject)
                found = check.of_rows(subject.with_key(place))
            except NotApplicableError as reason:
                if self.named:
                    raise
                self.skipped[check.name] = str(reason)
                continue
            dataset = dataset.assign(found.variables).assign_attrs(found.attrs)
        given = coords_of_part(self.coords, subject.plate, start, stop)
        given[subject.plate] = given.pop(tree_name(subject.plate))
        return stored_form(with_coords(dataset, given))

    def _finish(self, folder: Path) -> dict[str, Any]:
        """Run what is of all rows together, add it to the store, and return what was run."""
        stored = open_dataset(folder, consolidated=False)
        dataset, done, skipped = xr.Dataset(), [], self.skipped
        for place, check in self.chosen.items():
            if check.name in skipped:
                continue
            subject = self.subject.with_key(place)
            try:
                require_applicable(check, subject)
                if isinstance(check, RowwiseCheck):
                    found = check.of_all(subject, stored)
                else:
                    found = check.compute(subject)
            except NotApplicableError as reason:
                if self.named:
                    raise
                skipped[check.name] = str(reason)
                continue
            dataset = dataset.assign(found.variables).assign_attrs(found.attrs)
            done.append(check.name)
        if not done:
            raise NotApplicableError(next(iter(skipped.values())))
        dims = {*stored.dims, *dataset.dims}
        require_known_dims(self.coords, self.subject.runner.guide.sites, dims)
        _add(folder, stored, with_coords(dataset, self.coords))
        options = {check.name: _options(check) for check in self.chosen.values()}
        return {"done": done, "skipped": {**skipped, **self.others}, "options": options}


def _add(folder: Path, stored: xr.Dataset, dataset: xr.Dataset) -> None:
    """Add variables and attributes to a store."""
    there = [name for name in dataset.coords if name in stored.coords]
    dataset = dataset.drop_vars(there).assign_attrs(stored.attrs | dataset.attrs)
    added = stored_form(dataset, [*map(str, stored.data_vars), *map(str, stored.coords)])
    added.to_zarr(folder, mode="a", consolidated=False)


def require_applicable(check: AbstractCheck, subject: Subject) -> None:
    """Raise NotApplicableError if a check needs densities of rows, and the guide has none."""
    if check.is_by_row and subject.runner.guide.no_density:
        raise NotApplicableError(subject.runner.guide.no_density)


def with_coords(dataset: xr.Dataset, coords: Mapping[str, Any]) -> xr.Dataset:
    """Return the dataset with coordinates for every dimension, by default numbers."""
    known = {dim: np.arange(size) for dim, size in dataset.sizes.items()}
    known |= {dim: coord for dim, coord in dataset.coords.items() if dim in known}
    known |= {dim: coord for dim, coord in coords.items() if dim in known}
    return dataset.assign_coords(known)


def report_of(
    dataset: xr.Dataset, checks: Iterable[AbstractCheck], skipped: Mapping[str, str]
) -> Report:
    """Return the report of checks that were run, judged from what they computed."""
    checks = tuple(checks)
    findings = [finding for check in checks for finding in check.find(dataset)]
    return Report(dataset, tuple(findings), dict(skipped), checks)


def open_report(path: str | os.PathLike[str], checks: Iterable[AbstractCheck] = ()) -> Report:
    """Return the report that `Posterior.check` has written with ``store=``.

    Its dataset is read where it is looked at.

    Args:
        path: the folder.
        checks: checks of your own among those that were run.

    Raises:
        ValueError: if there is no such report, or a check is missing.
    """
    notes, own = read_notes(Path(path)), {check.name: check for check in checks}
    if notes is None or "done" not in notes:
        raise ValueError(
            f"There is no report at {path}. Pass the folder that was the store= of Posterior.check."
        )
    known = CHECKS.keys() | own.keys()
    missing = [name for name in notes["done"] if name not in known]
    if missing:
        raise ValueError(f"The checks {missing} are your own: pass them, as in checks=[MyCheck()].")
    done = [
        own[name] if name in own else CHECKS[name](**notes["options"][name])
        for name in notes["done"]
    ]
    return report_of(open_dataset(Path(path)), done, notes["skipped"])


# -- the form in a store -----------------------------------------------------------------------


def stored_form(dataset: xr.Dataset, before: Iterable[str] = ()) -> xr.Dataset:
    """Return a dataset in which no name has a slash, and an attribute with its names in order."""
    names = dict.fromkeys([*before, *dataset.data_vars, *dataset.coords, *dataset.dims])
    return for_tree(dataset).assign_attrs({NAMES: json.dumps(list(names))})


def open_dataset(path: Path, **options: Any) -> xr.Dataset:
    """Return a dataset as it was before `stored_form`, which is read where it is looked at."""
    dataset = xr.open_dataset(path, engine="zarr", cache=False, **options)
    names = json.loads(dataset.attrs.pop(NAMES))
    there = {*dataset.variables, *dataset.dims}
    changed = {tree_name(name): name for name in names if tree_name(name) != name}
    dataset = dataset.rename({name: known for name, known in changed.items() if name in there})
    return dataset[[name for name in names if name in dataset.data_vars]]


def _described(check: AbstractCheck) -> str:
    """Return what tells a check from others of its name."""
    found = [getattr(check, entry.name) for entry in fields(check)] if is_dataclass(check) else []
    return f"{check!r} {digest(found)}"


def _options(check: AbstractCheck) -> dict[str, Any]:
    """Return the options of a check that are numbers or texts, which say how it was run."""
    names = [entry.name for entry in fields(check)] if is_dataclass(check) else []
    options = {name: getattr(check, name) for name in names}
    return {k: v for k, v in options.items() if isinstance(v, int | float | str | bool)}
