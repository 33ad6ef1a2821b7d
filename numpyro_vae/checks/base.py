"""What a check is, on one page.

A **check** is a frozen dataclass of its options, with a name and three methods:

* `AbstractCheck.compute` measures: a `Subject`, the posterior and the rows, becomes a dataset.
* `AbstractCheck.find` judges: it reads that dataset, and yields a `Finding` for each thing that a
  person should know, also where all is well.
* `AbstractCheck.draw` pictures the same dataset.

A check that looks at each row by itself is a `RowwiseCheck`, and has `RowwiseCheck.of_rows` in the
place of the first.

Only the first needs the posterior; a dataset that was saved can be judged and drawn again. To add
a check to the library, write one file beside this one, and add its class to ``CHECKS`` in
``run.py``. A check of your own needs neither: `Posterior.check` takes its instance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
import xarray as xr
from jaxtyping import Array

from numpyro_vae.inference.fingerprint import NAME
from numpyro_vae.inference.gathering import site_dims
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.redraw import explain_undrawn, undrawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AbstractCheck", "Finding", "NotApplicableError", "RowwiseCheck", "Subject"]

SLICE = 2**16  # rows that are read at once
COLOURS = ("#0072B2", "#E69F00", "#D55E00")  # of Okabe and Ito, for colour-blind readers too


class NotApplicableError(ValueError):
    """A check does not apply to this model or these data; its message says why, and what to do."""


@dataclass(frozen=True)
class Finding:
    """One sentence of a report.

    Attributes:
        check: the name of the check that found it.
        ok: whether all is well.
        text: what was found.
        advice: what to do about it; empty if all is well.
    """

    check: str
    ok: bool
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}" if self.advice else self.text


Findings = Iterator[Finding]


class AbstractCheck(ABC):
    """The contract of a check; see the module's docstring.

    Attributes:
        name: what it is called in ``checks=`` and in a report, different from all others.
        is_by_row: whether it looks at the posteriors of rows, and needs the guide's density of
            them.
    """

    name: ClassVar[str]
    is_by_row: ClassVar[bool] = True

    @abstractmethod
    def compute(self, subject: Subject) -> xr.Dataset:
        """Return what the check measures.

        A variable with a value for each row lies along `Subject.plate`, and is NaN for a row that
        was not looked at. No other check has variables of these names. Numbers that `find` needs
        and that are not measured, such as thresholds, are the dataset's attributes.

        Args:
            subject: the posterior, the rows, and the random key of this check.

        Raises:
            NotApplicableError: if the check does not apply to this model or these data.
        """

    @abstractmethod
    def find(self, dataset: xr.Dataset) -> Findings:
        """Yield what a person should know.

        Args:
            dataset: what all checks computed, with the attribute ``num_data``.
        """

    @abstractmethod
    def draw(self, dataset: xr.Dataset, ax: Axes) -> None:
        """Draw the picture of this check; one without a picture says ``draw = None``.

        Args:
            dataset: as for `find`.
            ax: where to draw.
        """


class RowwiseCheck(AbstractCheck):
    """A check that looks at each row by itself, so that a store can be written part by part.

    In the place of `compute` it has `of_rows`, and `of_all` if it says something of all rows
    together.
    """

    @abstractmethod
    def of_rows(self, subject: Subject) -> xr.Dataset:
        """Return the variables that lie along `Subject.plate`, and attributes.

        Args:
            subject: the posterior, some of the rows, and the random key of this check.

        Raises:
            NotApplicableError: as in `compute`.
        """

    def of_all(self, subject: Subject, dataset: xr.Dataset) -> xr.Dataset:
        """Return what else the check measures.

        Args:
            subject: the posterior, all rows, and the random key of this check.
            dataset: what `of_rows` returned of all rows; it may be on disk, so that columns of
                several values a row should be read by `slices_of`.
        """
        return xr.Dataset()

    def compute(self, subject: Subject) -> xr.Dataset:
        """Return what the check measures; see `AbstractCheck.compute`."""
        found = self.of_rows(subject)
        rest = self.of_all(subject, found)
        return found.assign(rest.variables).assign_attrs(rest.attrs)


@dataclass(frozen=True)
class Subject:
    """What is checked: a posterior, and the rows of data.

    Attributes:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key of this check.
    """

    runner: Runner
    rows: Rows
    rng_key: Array

    @property
    def plate(self) -> str:
        """The local plate's name, the dimension of variables with a value for each row."""
        return self.runner.guide.plate.name

    def dims_of(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Return the dimensions of what each datum has of a site, as they are in a DataTree.

        Unconstrained values that are not as many as the site's own have dimensions of their own.

        Args:
            name: of the site, or of several together, which have no plates of their own.
            shape: of its values, without the rows; empty for one value of all that a datum has.
        """
        sites = self.runner.guide.sites
        if name not in sites.sites:
            return [f"{name}_dim_{axis}" for axis in range(len(shape))]
        site, plates = sites.sites[name], site_dims(sites)[name]
        batch = [dim for dim in plates if dim != self.plate and shape]
        event = tuple(shape[len(batch) :])
        word = "dim" if site.event_shape in (event, site.unconstrained_shape) else "unconstrained"
        return [*batch, *(f"{name}_{word}_{axis}" for axis in range(len(event)))]

    def empty(self) -> xr.Dataset:
        """Return a dataset without variables, with the rows' fingerprints and their number."""
        known = {NAME: ([self.plate], self.rows.fingerprint_of_chosen)}
        return xr.Dataset(coords=known, attrs={"num_data": self.rows.num_rows})

    def require_amortized(self) -> None:
        """Raise NotApplicableError if the guide is of its training rows alone."""
        if self.runner.guide.not_amortized:
            raise NotApplicableError(f"{self.runner.guide.not_amortized}; use an amortized guide")

    def require_features(self) -> None:
        """Raise NotApplicableError if the guide has no features; see `AbstractEncoding`."""
        if not self.runner.has_features(self.rows):
            raise NotApplicableError(
                "the guide's distributions are no Normals of the unconstrained latents; use an "
                "amortized guide of ours"
            )

    def with_key(self, number: int) -> Subject:
        """Return the same subject with the random key of check ``number``."""
        return replace(self, rng_key=jax.random.fold_in(self.rng_key, number))

    def choose(self, at_most: int) -> np.ndarray:
        """Return the numbers of ``at_most`` rows, evenly spread over the data."""
        size = self.rows.num_chosen
        places = np.linspace(0, size - 1, min(size, at_most)).round().astype(int)
        return self.rows.numbers(places)

    def part(self, start: int, stop: int, size: int) -> Subject:
        """Return the same subject with some of the rows; see `Rows.part`."""
        return replace(self, rows=self.rows.part(start, stop, size))

    def spread(self, rows: np.ndarray, values: Any) -> np.ndarray:
        """Return values of some rows as a column for all, NaN elsewhere."""
        values = np.asarray(values, float)
        column = np.full((self.rows.num_rows, *values.shape[1:]), np.nan)
        column[rows] = values
        return column


def slices_of(column: xr.DataArray) -> Iterator[np.ndarray]:
    """Yield the values of a variable in slices of rows, as those of a store may be too many."""
    dim, number = column.dims[0], len(column)
    for start in range(0, number, SLICE):
        yield column.isel({dim: slice(start, start + SLICE)}).values


def require_drawn(trace: dict[str, Any]) -> dict[str, Any]:
    """Return a trace of the model without its data, from which all of them must have been drawn.

    Raises:
        NotApplicableError: if an observed site cannot be drawn.
    """
    reasons = undrawn(trace)
    if reasons:
        raise NotApplicableError(explain_undrawn(reasons))
    return trace


def require_at_least(minimum: int, **options: int) -> None:
    """Raise ValueError if an option of a check is too small."""
    for name, value in options.items():
        if value < minimum:
            raise ValueError(f"{name} is {value}, expected at least {minimum}.")


def require_variable(dataset: xr.Dataset, variable: str, check: str) -> None:
    """Raise ValueError if a dataset lacks what a check computes, as the check was not run."""
    if not any(str(name).startswith(variable) for name in dataset.data_vars):
        raise ValueError(
            f"The {check} check was not run, so the report has no {variable}. "
            f"Pass checks={check!r}, or add it to the checks."
        )
