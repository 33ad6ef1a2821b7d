"""What a check is, on one page.

A **check** is a module with two functions:

* one, of the module's name, that computes: from a `Subject` and options it returns variables,
  ``name -> (dims, values)`` as xarray takes them. What is of one datum lies along the local
  plate's dimension, and is NaN for a datum that was not looked at.
* ``find``, that judges: from the dataset of all variables, and its attributes, it yields what a
  person should know, a `Finding` each, those included that all is well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Rowwise

__all__ = ["Finding"]


class NotApplicableError(ValueError):
    """A check cannot be made of this model or these data; its message says why, and what to do."""


@dataclass(frozen=True)
class Finding:
    """One sentence of a report.

    Attributes:
        check: which check found it.
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


@dataclass(frozen=True)
class Subject:
    """What is checked: a posterior, and the rows of data.

    Attributes:
        rowwise: the trained guide.
        rows: the data.
        rng_key: the random key of this check.
        data: the data as they were given.
        batch_axes: likewise.
    """

    rowwise: Rowwise
    rows: Rows
    rng_key: Array
    data: Any
    batch_axes: Any

    @property
    def plate(self) -> str:
        """The local plate's name, the dimension of what is of one datum."""
        return self.rowwise.guide.plate.name

    def with_key(self, number: int) -> Subject:
        """Return the same subject with a random key of its own."""
        return replace(self, rng_key=jax.random.fold_in(self.rng_key, number))

    def choose(self, at_most: int) -> np.ndarray:
        """Return the numbers of some rows, evenly spread over the data, or of all."""
        size = len(self.rows.chosen)
        places = np.linspace(0, size - 1, min(size, at_most)).round().astype(int)
        return self.rows.chosen[places]

    def spread(self, rows: np.ndarray, values: Any) -> np.ndarray:
        """Return values of some rows as a column for all, NaN elsewhere."""
        values = np.asarray(values, float)
        column = np.full((self.rows.num_rows, *values.shape[1:]), np.nan)
        column[rows] = values
        return column
