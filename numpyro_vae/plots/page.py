"""A report as a page: what was found in words, and a picture of every check."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_vae.checks.calibration import DEVIATION
from numpyro_vae.checks.novelty import LEVEL
from numpyro_vae.checks.report import Report
from numpyro_vae.plots.figures import COLOURS, plot_collapse, plot_khat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_report"]


def save_report(report: Report, path: str | Path) -> None:
    """Write a report with a picture of every check that was run.

    Args:
        report: from `Posterior.check`.
        path: where to: a page if the name ends in ``.html``, else just the picture, in any format
            that matplotlib writes.

    Raises:
        ValueError: if no check was run that has a picture.
    """
    path, figure = Path(path), _figure(report)
    if path.suffix != ".html":
        figure.savefig(path, dpi=110)
        return
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    path.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Checks</title>"
        "<style>body{font-family:sans-serif;margin:2em} td{padding:.2em 1em}</style></head>\n"
        f"<body><h1>Checks</h1>\n{report._repr_html_()}\n"
        f"<p><img style='max-width:100%' alt='{escape(_title(report))}' "
        f"src='data:image/png;base64,{data}'></p></body></html>\n",
        encoding="utf-8",
    )


def _title(report: Report) -> str:
    return f"Pictures of the checks: {str(report).splitlines()[0]}"


def _figure(report: Report) -> Figure:
    """Return a figure with a panel for each check that was run."""
    from matplotlib.figure import Figure

    names = [str(name) for name in report.dataset.data_vars]
    panels: dict[str, Callable[[Report, Axes], Any]] = {
        "khat": lambda report, ax: plot_khat(report, ax=ax),
        "gap_": _draw_gaps,
        "pit_": _draw_ranks,
        "kl_": lambda report, ax: plot_collapse(report, ax=ax),
        "novelty": _draw_novelty,
        "predictive_": _draw_predictive,
    }
    drawn = [draw for key, draw in panels.items() if any(name.startswith(key) for name in names)]
    if not drawn:
        raise ValueError(f"The report has no check to draw, only the variables {names}.")
    rows, columns = -(-len(drawn) // 3), min(len(drawn), 3)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for place, draw in enumerate(drawn):
        draw(report, figure.add_subplot(rows, columns, place + 1))
    return figure


def _draw_gaps(report: Report, ax: Axes) -> None:
    """Draw both gaps of each datum that was looked at, the widest first."""
    gaps = [report.dataset[f"gap_{kind}"].values for kind in ("approximation", "amortization")]
    gaps = [gap[np.isfinite(gap)].clip(0) for gap in gaps]
    order = np.argsort(-(gaps[0] + gaps[1]))
    places = np.arange(1, len(order) + 1)
    lower, upper = gaps[0][order], (gaps[0] + gaps[1])[order]
    ax.fill_between(places, lower, step="mid", color=COLOURS[1], label="approximation: the family")
    ax.fill_between(
        places, lower, upper, step="mid", color=COLOURS[0], label="amortization: the network"
    )
    ax.set(xlabel="datum, sorted", ylabel="nats", title="Inference gap")
    ax.legend(frameon=False)


def _draw_ranks(report: Report, ax: Axes) -> None:
    """Draw how far the ranks of each dimension are from uniform, and from how far on it matters."""
    grid = np.linspace(0, 1, 201)
    for name, values in report.dataset.items():
        if str(name).startswith("pit_"):
            for pit in values.values.reshape(len(values), -1).T:
                below = np.searchsorted(np.sort(pit), grid, side="right") / len(pit)
                ax.plot(grid, below - grid, color=COLOURS[0], linewidth=0.8, alpha=0.7)
    for bound in (-DEVIATION, DEVIATION):
        ax.axhline(bound, color="grey", linestyle="--", linewidth=0.8)
    ax.set(xlabel="rank", ylabel="ECDF less uniform", title="Calibration, by dimension")
    ax.set_ylim(-max(2 * DEVIATION, -ax.get_ylim()[0]), max(2 * DEVIATION, ax.get_ylim()[1]))


def _draw_novelty(report: Report, ax: Axes) -> None:
    p = np.sort(report.dataset["novelty"].values)
    ax.plot(p, np.arange(1, len(p) + 1) / len(p), color=COLOURS[0])
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    ax.axvline(LEVEL, color="grey", linestyle="--", linewidth=0.8)
    ax.set(xlabel="p-value", ylabel="share of the data below", title="Novelty")


def _draw_predictive(report: Report, ax: Axes) -> None:
    p = report.dataset["predictive_p"].values
    ax.hist(p[np.isfinite(p)], bins=20, range=(0, 1), color=COLOURS[0])
    ax.set(xlabel="p-value of the log-likelihood", ylabel="data", title="Posterior predictive")
