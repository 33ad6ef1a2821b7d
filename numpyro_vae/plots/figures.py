"""Pictures of a fit, a posterior and its checks; matplotlib is imported when one is drawn.

Every function draws into ``ax``, by default the axes of a new figure, and returns it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from numpyro_vae.checks.collapse import Collapse
from numpyro_vae.checks.importance import VERDICT_COLOURS, VERDICTS, Importance
from numpyro_vae.checks.report import Report
from numpyro_vae.comparison import Comparison
from numpyro_vae.families import Flow
from numpyro_vae.model.sites import Site
from numpyro_vae.posterior import Posterior
from numpyro_vae.training.result import FitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_collapse",
    "plot_comparison",
    "plot_khat",
    "plot_latents",
    "plot_training",
]

NUM_DRAWS = 256  # of which the mean is drawn, where there is no loc
MAX_LABELS = 20  # more distinct labels than this are taken as values on a scale


def plot_training(result: FitResult, *, ax: Axes | None = None) -> Axes:
    """Plot the loss of every epoch, and the validation loss if there is one with its minimum.

    Example:
        >>> history = {"loss": np.array([3.0, 2.0, 1.5]), "validation_loss": np.array([3, 2, 2.1])}
        >>> ax = plot_training(FitResult({}, None, np.zeros(3), history))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['training', 'validation', 'best, epoch 2']
    """
    ax = axes_or_new(ax)
    for label, name in (("training", "loss"), ("validation", "validation_loss")):
        if name in result.history:
            values = result.history[name]
            ax.plot(np.arange(1, len(values) + 1), values, label=label)
    scores = result.history.get("validation_loss")
    if scores is not None and np.isfinite(scores).any():
        best = int(np.nanargmin(scores))
        ax.plot(best + 1, scores[best], "o", color="black", label=f"best, epoch {best + 1}")
    ax.set(xlabel="epoch", ylabel="negative ELBO (nats a datum)", title="Training")
    ax.legend(frameon=False)
    return ax


def plot_latents(
    posterior: Posterior,
    data: Any,
    *,
    labels: Any = None,
    dims: tuple[int, int] | None = None,
    var_name: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the guide's ``loc`` of every datum in two dimensions of a local site.

    Of a family without one, such as a flow, it is the mean of draws of the latents.

    Args:
        posterior: the trained posterior.
        data: as for `fit`, any number of rows.
        labels: for each datum what to colour it by, categories or numbers.
        dims: the dimensions, counted in the flattened site; by default the two along which ``loc``
            varies most from datum to datum, in units of the guide's scale.
        var_name: the local site; by default the only one.
        ax: where to draw.

    Raises:
        ValueError: if there are several local sites to choose from, or it has one dimension.
    """
    from matplotlib import colormaps

    name = only_site(posterior.guide.local_sites, var_name, "local")
    loc, scale = (part.reshape(len(part), -1) for part in _places(posterior, data, name))
    if loc.shape[1] < 2:
        raise ValueError(f"Site {name!r} has one dimension, and a map needs two.")
    first, second = np.argsort(-loc.var(0) / (scale**2).mean(0))[:2] if dims is None else dims
    points, ax = loc[:, [first, second]], axes_or_new(ax)
    scatter = partial(ax.scatter, s=12, alpha=0.8, linewidths=0)
    kinds = np.unique([""] if labels is None else labels)
    if len(kinds) > MAX_LABELS:
        ax.figure.colorbar(scatter(*points.T, c=np.asarray(labels)), ax=ax)
    elif labels is None:
        scatter(*points.T)
    else:
        colours = colormaps["tab10" if len(kinds) <= 10 else "tab20"]
        for number, kind in enumerate(kinds):
            scatter(*points[np.asarray(labels) == kind].T, color=colours(number), label=str(kind))
        ax.legend(frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel=f"{name}[{first}]", ylabel=f"{name}[{second}]", title="Latents")
    return ax


def _places(posterior: Posterior, data: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where the latents of each datum are, and how far they spread."""
    if not isinstance(getattr(posterior.guide, "family", None), Flow):
        return posterior.encode(data)[name]
    draws = posterior.sample(jax.random.key(0), data, NUM_DRAWS, var_names=[name])[name]
    return draws.mean(0), draws.std(0)


def plot_khat(report: Report, *, ax: Axes | None = None) -> Axes:
    """Plot the k-hat of every row, sorted, coloured and counted by its verdict.

    A k-hat of minus infinity (weights without a tail) is drawn at the bottom.

    Raises:
        ValueError: if the importance check was not run.

    Example:
        >>> import xarray as xr
        >>> columns = {"khat": [0.2, 1.3, 0.1], "divergence": [0.3, 2.0, 0.0]}
        >>> columns["divergence_mcse"] = [0.01, 0.5, 0.0]
        >>> attrs = {"khat_threshold": 0.7, "max_divergence": 0.1}
        >>> report = Report(xr.Dataset({k: ("data", x) for k, x in columns.items()}, attrs=attrs))
        >>> [text.get_text() for text in plot_khat(report).get_legend().get_texts()]
        ['fine: 1 (33%)', 'reweight: 1 (33%)', 'borderline: 0 (0%)', 'not to be trusted: 1 (33%)']
    """
    ax = axes_or_new(ax)
    Importance().draw(report.dataset, ax)
    return ax


def plot_collapse(report: Report, *, ax: Axes | None = None) -> Axes:
    """Plot the mean KL divergence from the prior of each latent dimension, sorted.

    A dimension below the dashed line has collapsed to the prior.

    Raises:
        ValueError: if the collapse check was not run.

    Example:
        >>> import xarray as xr
        >>> kl = xr.Dataset({"kl_z": (["data", "z_dim_0"], [[1.0, 0.0], [3.0, 0.001]])})
        >>> [label.get_text() for label in plot_collapse(Report(kl)).get_xticklabels()]
        ['z[0]', 'z[1]']
    """
    ax = axes_or_new(ax)
    Collapse().draw(report.dataset, ax)
    return ax


def plot_comparison(comparison: Comparison, *, ax: Axes | None = None) -> Axes:
    """Plot by posterior how far its bound is below the best, and the verdicts on its rows.

    The dot is the difference of the bounds of all latents together in nats a datum, with two
    standard errors of the difference over rows; the bar is of the shares of the rows by verdict, in
    the colours of `plot_khat`. Where rows have no posteriors of their own, and so no verdicts, the
    dot is hollow, its error that of Monte Carlo, and the joint k-hat stands in place of the bar.

    Example:
        >>> import xarray as xr
        >>> from numpyro_vae.comparison import Whole
        >>> columns = {"elbo": [-1.0, -2.0], "log_evidence": [-1.0, -1.0], "khat": [0.1, 1.2]}
        >>> columns |= {"divergence": [0.0, 1.0], "divergence_mcse": [0.0, 0.1]}
        >>> attrs = {"khat_threshold": 0.7, "max_divergence": 0.1}
        >>> report = Report(xr.Dataset({k: ("data", x) for k, x in columns.items()}, attrs=attrs))
        >>> whole = Whole(-1.5, 0.1, 0.9)
        >>> ax = plot_comparison(Comparison({"one": report}, {"one": whole}, {"one": 1.0}, {}))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['one']
    """
    ax, table = axes_or_new(ax), comparison.table
    which = "joint_diff" if table["joint_diff"].notna().any() else "elbo_diff"
    behind, by_row = table[which].to_numpy(), table.index.isin(comparison.by_row)
    room = max(1.05 * float(np.max(behind, initial=0.0, where=np.isfinite(behind))), 0.01)
    for place, name in enumerate(table.index):
        if by_row[place]:
            _draw_shares(ax, place, room, comparison.reports[name])
        else:
            text = f"all rows jointly, k-hat {table['joint_khat'].iloc[place]:.2f}"
            side = ("left", 0.01) if behind[place] > room / 2 else ("right", 0.99)
            ax.text(side[1] * room, place, text, color="grey", va="center", ha=side[0])
    for chosen, error, fill in ((by_row, "dse", "full"), (~by_row, "joint_mcse", "none")):
        xerr = 2 * table[error].fillna(0.0).to_numpy()[chosen]
        draw = partial(ax.errorbar, fmt="o", color="black")
        draw(behind[chosen], np.flatnonzero(chosen), xerr=xerr, fillstyle=fill)
    ax.set_yticks(np.arange(len(table)), list(table.index))
    ax.invert_yaxis()
    ax.set(xlabel="nats a datum below the best bound", title="Comparison")
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    ax.legend(*_each_once(ax), frameon=False, title="bars: shares of the rows", **beside)
    return ax


def _draw_shares(ax: Axes, place: int, room: float, report: Report) -> None:
    """Draw the shares of the rows by verdict as parts of a bar."""
    shares = np.bincount(report.verdict, minlength=len(VERDICTS))
    left = 0.0
    for share, label, colour in zip(shares, VERDICTS, VERDICT_COLOURS, strict=True):
        width = room * share / max(shares.sum(), 1)
        ax.barh(place, width, left=left, height=0.5, color=colour, alpha=0.35, label=label)
        left += width


def _each_once(ax: Axes) -> tuple[list, list]:
    """Return handles and labels of the legend, of each label the first."""
    handles, labels = ax.get_legend_handles_labels()
    found = {label: handle for handle, label in reversed(list(zip(handles, labels, strict=True)))}
    names = [label for label in VERDICTS if label in found]
    return [found[label] for label in names], names


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the axes, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def only_site(sites: Iterable[Site], var_name: str | None, kind: str) -> str:
    """Return the name of the site meant."""
    names = [site.name for site in sites]
    if var_name in names or (var_name is None and len(names) == 1):
        return var_name or names[0]
    raise ValueError(f"var_name is {var_name!r}; choose one of the {kind} sites {names}.")
