"""The pictures of a report, and the HTML page with them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from numpyro_vae.checks.base import AbstractCheck

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_checks(checks: Iterable[AbstractCheck], dataset: xr.Dataset) -> Figure:
    """Return a figure with a panel for each check that has a picture.

    Raises:
        ValueError: if none has.
    """
    from matplotlib.figure import Figure

    drawn = [check for check in checks if check.draw is not None]
    if not drawn:
        raise ValueError(
            "The report has no check with a picture. Save a report of Posterior.check, or "
            "print(report)."
        )
    rows, columns = -(-len(drawn) // 3), min(len(drawn), 3)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for place, check in enumerate(drawn):
        check.draw(dataset, figure.add_subplot(rows, columns, place + 1))
    return figure


def write_page(path: Path, table: str, figure: Figure, alt: str) -> None:
    """Write an HTML page of its own, with the figure inside it.

    Args:
        path: where to.
        table: the findings, as HTML.
        figure: the pictures.
        alt: their description.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    path.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Checks</title>"
        "<style>body{font-family:sans-serif;margin:2em} td{padding:.2em 1em}</style></head>\n"
        f"<body><h1>Checks</h1>\n{table}\n"
        f"<p><img style='max-width:100%' alt='{escape(alt)}' "
        f"src='data:image/png;base64,{data}'></p></body></html>\n",
        encoding="utf-8",
    )
