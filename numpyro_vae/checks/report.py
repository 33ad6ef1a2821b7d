"""A report: what the checks found, as a dataset, in sentences and in pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_vae.checks.base import AbstractCheck, Finding
from numpyro_vae.checks.collapse import count_collapsed
from numpyro_vae.checks.importance import VERDICTS, meanings, verdicts
from numpyro_vae.checks.page import draw_checks, write_page
from numpyro_vae.inference.datatree import for_tree, tree_name
from numpyro_vae.inference.fingerprint import (
    NAME,
    Fingerprint,
    of_all,
    require_same_rows,
    require_same_tree,
)

if TYPE_CHECKING:
    from rich.table import Table
    from xarray import Dataset, DataTree

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What `Posterior.check` found.

    ``print(report)`` writes it as plain text, ``rich.print(report)`` in colour, and a notebook
    shows it as a table.

    Attributes:
        dataset: all that was computed, along the plate's dimension where there is a value for each
            row; the page on checks explains each variable. In nats where not said otherwise.
        findings: what a person should know, in sentences.
        skipped: by check that was not run, why.
        checks: those that were run, with their options.

    Example:
        >>> import xarray as xr
        >>> columns = {"khat": [0.2, 1.3, 0.1], "divergence": [0.0, 2.0, 0.3]}
        >>> columns["divergence_mcse"] = [0.0, 0.5, 0.01]
        >>> attrs = {"khat_threshold": 0.7, "max_divergence": 0.1, "num_data": 3}
        >>> dataset = xr.Dataset({k: ("data", x) for k, x in columns.items()}, attrs=attrs)
        >>> report = Report(dataset, (Finding("importance", False, "2 of 3 rows are not fine"),))
        >>> report.verdict.tolist(), report.flagged.tolist()
        ([0, 3, 1], [1, 2])
        >>> print(report)
        3 data
          importance   ! 2 of 3 rows are not fine
    """

    dataset: Dataset
    findings: tuple[Finding, ...] = ()
    skipped: Mapping[str, str] | None = None
    checks: tuple[AbstractCheck, ...] = ()

    @property
    def verdict(self) -> np.ndarray:
        """For each row 0, 1, 2 or 3: fine, reweight, borderline, or not to be trusted.

        *Fine* draws are usable as they are; those to *reweight* are usable with their importance
        weights. See `Importance` for the rules.

        Raises:
            ValueError: if the importance check was not run.
        """
        return verdicts(self.dataset)

    @property
    def flagged(self) -> np.ndarray:
        """The numbers of the rows that are not fine, for `Posterior.repair`."""
        return np.flatnonzero(self.verdict)

    def flagged_of(self, fingerprint: Fingerprint) -> np.ndarray:
        """Return `flagged` for the data with this fingerprint.

        Raises:
            ValueError: if the report is on other data.
        """
        remedy = "Pass the data that were checked, or the rows' numbers."
        if self.dataset.attrs["num_data"] != len(fingerprint):
            raise ValueError(
                f"The report is on {self.dataset.attrs['num_data']} rows of data, and the data "
                f"have {len(fingerprint)}. {remedy}"
            )
        known = self.dataset.coords.get(NAME, fingerprint)
        require_same_rows("The report", known, fingerprint, remedy)
        return self.flagged

    def collapsed(self) -> dict[str, tuple[int, int]]:
        """Return by site how many latent dimensions have collapsed, and of how many."""
        return count_collapsed(self.dataset)

    def isel(self, **indexers: Any) -> Report:
        """Return what was computed of some rows only, chosen as by `xarray.Dataset.isel`.

        The findings, which are about all rows, are left out.
        """
        dataset = self.dataset.isel(**indexers)
        (dim,) = indexers
        return Report(dataset.assign_attrs(num_data=dataset.sizes[dim]), checks=self.checks)

    def save(self, path: str | Path) -> None:
        """Write the report to a file, with a picture of every check that was run.

        Args:
            path: where to. A name that ends in ``.html`` is written as a page; any other as the
                pictures alone, in the format of its ending, which matplotlib must know.

        Raises:
            ValueError: if no check was run that has a picture.
        """
        figure = draw_checks(self.checks, self.dataset)
        if Path(path).suffix.lower() == ".html":
            write_page(Path(path), self._repr_html_(), figure, f"Pictures of {self._title()}")
        else:
            figure.savefig(path, dpi=110)

    def add_to(self, tree: DataTree) -> DataTree:
        """Return the DataTree with these checks as its group ``checks``.

        The ranks of the calibration check, if it was run, become the group ``prior_sbc``, which
        `arviz.plot_ecdf_pit` reads.

        Raises:
            ValueError: if the tree is of other data.
        """
        known = self.dataset.coords.get(NAME)
        if known is not None:
            (plate,) = map(str, known.dims)
            require_same_tree("The report", of_all(known.values), tree, tree_name(plate))
        groups = {"checks": type(tree)(for_tree(self.dataset))}
        ranks = {name: x for name, x in self.dataset.items() if str(name).startswith("pit_")}
        if ranks:
            pits = self.dataset[list(ranks)].rename({n: str(n)[4:] for n in ranks})
            pits = pits.drop_attrs().rename(simulation="draw").expand_dims("chain")
            groups["prior_sbc"] = type(tree)(for_tree(pits))
        return tree.assign(groups)

    def __str__(self) -> str:
        """Return what was found, as plain text."""
        lines = [self._title(), *(f"  {line}" for line in self._means())]
        for finding in self._told():
            mark = " " if finding.ok else "!"
            lines.append(f"  {finding.check:<12} {mark} {finding}")
        for name, reason in (self.skipped or {}).items():
            lines.append(f"  {name:<12}   not run: {reason}")
        return "\n".join(lines)

    def _told(self) -> Iterator[Finding]:
        """Yield the findings, with advice that is the same for several after the last of them."""
        for finding, following in itertools.zip_longest(self.findings, self.findings[1:]):
            again = following is not None and following.advice == finding.advice
            yield replace(finding, advice="") if again else finding

    def _title(self) -> str:
        draws = self.dataset.attrs.get("num_samples")
        return f"{self.dataset.attrs['num_data']} data" + (
            f", {draws} draws of each" if draws else ""
        )

    def _means(self) -> list[str]:
        """Return the means of the bounds, with two standard errors, and the verdicts.

        Rows whose weights are not finite have no bounds, and are left out of the means.
        ``se`` is the standard error as an estimate for such data in general, ``Monte Carlo`` the
        part of it that more draws would reduce.
        """
        if "elbo" not in self.dataset:
            return []
        lines = []
        for name in ("elbo", "log_evidence"):
            values = self.dataset[name].values
            there = np.isfinite(values)
            if not there.any():
                continue
            values = values[there]
            error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
            errors = self.dataset[f"{name}_mcse"].values[there]
            monte_carlo = np.sqrt((errors**2).sum()) / values.size
            found = f"{values.mean():10.3f} nats a datum"
            lines.append(f"{name:<13}{found} (se {error:.3f}, Monte Carlo {monte_carlo:.3f})")
        counts = np.bincount(self.verdict, minlength=len(VERDICTS))
        for label, count, meaning in zip(VERDICTS, counts, meanings(self.dataset), strict=True):
            share = count / counts.sum()
            lines.append(f"{label:<19}{count:6d}  ({share:6.1%})  {meaning}")
        return lines

    def __rich__(self) -> Table:
        """Return what was found as a table in colour."""
        from rich.table import Table

        table = Table(title="\n".join([self._title(), *self._means()]), title_justify="left")
        for column in ("check", "", "found", "advice"):
            table.add_column(column)
        for finding in self._told():
            mark = "[green]ok[/]" if finding.ok else "[red]look[/]"
            table.add_row(finding.check, mark, finding.text, finding.advice)
        for name, reason in (self.skipped or {}).items():
            table.add_row(name, "[dim]not run[/]", reason, "")
        return table

    def _repr_html_(self) -> str:
        """Return what was found as a page's table, with sentences of advice."""
        from html import escape

        marks = {True: "ok", False: "<b>look</b>"}
        rows = [
            f"<tr><td>{f.check}</td><td>{marks[f.ok]}</td><td>{escape(f.text)}</td>"
            f"<td>{escape(f.advice)}</td></tr>"
            for f in self._told()
        ]
        rows += [
            f"<tr><td>{name}</td><td>not run</td><td colspan=2>{escape(reason)}</td></tr>"
            for name, reason in (self.skipped or {}).items()
        ]
        head = "\n".join([self._title(), *self._means()])
        return f"<pre>{escape(head)}</pre>\n<table>\n" + "\n".join(rows) + "\n</table>"
