"""Pictures of a fit, a posterior and its checks; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.batches import ArrayData
from numpyro_vae.checks import COLLAPSED, UNTRUSTWORTHY, VERDICTS, Check
from numpyro_vae.fit import FitResult
from numpyro_vae.plates import all_rows
from numpyro_vae.posterior import Posterior
from numpyro_vae.sites import Site, sites_of_trace, trace_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_collapse",
    "plot_khat",
    "plot_latents",
    "plot_prior_samples",
    "plot_reconstructions",
    "plot_training",
]

COLOURS = ("#0072B2", "#E69F00", "#D55E00")  # of Okabe and Ito, which everyone can tell apart
MAX_LABELS = 20  # more distinct labels than this are taken as values on a scale


def plot_training(result: FitResult, *, ax: Axes | None = None) -> Axes:
    """Plot the training loss, and the validation loss if there is one, of every epoch.

    Args:
        result: what `fit` returned.
        ax: where to draw; by default a new figure.

    Returns:
        The axes: a line for each loss, and a point at the best validation loss.

    Example:
        >>> history = {"loss": np.array([3.0, 2.0, 1.5]), "validation_loss": np.array([3, 2, 2.1])}
        >>> ax = plot_training(FitResult({}, None, np.zeros(3), history))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['training', 'validation', 'best, epoch 2']
    """
    ax = _axes(ax)
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


def plot_reconstructions(
    posterior: Posterior,
    rng_key: Array,
    data: Any,
    *,
    num_samples: int = 200,
    var_name: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    batch_axes: Any = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot images above their posterior predictive means.

    A mean is that of ``num_samples`` draws of the observed site, each with latents of its own.

    Args:
        posterior: the trained posterior.
        rng_key: the random key.
        data: the rows to draw, as for `fit`.
        num_samples: draws behind each mean.
        var_name: the observed site with the images; by default the only one.
        image_shape: ``(height, width)``, or with channels; by default the site's own.
        batch_axes: as for `fit`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes, with one picture: the data in its first row, the means in its second.

    Raises:
        ValueError: if there are several observed sites to choose from, or they hold no images.
    """
    trace = _trace(posterior, posterior.guide.model, rng_key, data, batch_axes)
    name = _only(sites_of_trace(trace).observed(posterior.guide.plate.name), var_name, "observed")
    draws = posterior.predict(rng_key, data, num_samples, var_names=[name], batch_axes=batch_axes)
    rows = (_rows(posterior, trace, name, trace[name]["value"]), draws[name].mean(0))
    images = np.stack([_images(row, image_shape, name) for row in rows])
    ax = _show(images, ax)
    height = images.shape[2] + 1
    ax.set_yticks([height / 2 - 1, 1.5 * height - 1], ["data", "mean"])
    ax.set_title("Data, and their posterior predictive means")
    return ax


def plot_prior_samples(
    posterior: Posterior,
    rng_key: Array,
    data: Any,
    *,
    num_samples: int = 200,
    var_name: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    batch_axes: Any = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot a grid of what the trained model expects of latents drawn from their prior.

    Each image is the mean of the likelihood given one draw of the latents: exact where the
    distribution knows its mean, else that of ``num_samples`` draws. Global sites are drawn from
    their posterior, once for all images.

    Args:
        posterior: the trained posterior, for the parameters of the model and its global sites.
        rng_key: the random key.
        data: rows as for `fit`, of which observed values are ignored; an image is drawn for each.
        num_samples: draws behind each mean that is not known.
        var_name: the observed site with the images; by default the only one.
        image_shape: ``(height, width)``, or with channels; by default the site's own.
        batch_axes: as for `fit`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes, with one picture: a grid of images, as square as their number allows.

    Raises:
        ValueError: if there are several observed sites to choose from, or they hold no images.
    """
    model = posterior.guide.model
    trace = _trace(posterior, model, rng_key, data, batch_axes)
    name = _only(sites_of_trace(trace).observed(posterior.guide.plate.name), var_name, "observed")
    trace = _trace(posterior, handlers.uncondition(model), rng_key, data, batch_axes)
    fn = trace[name]["fn"]
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = fn.sample(jax.random.fold_in(rng_key, 1), (num_samples,)).mean(0)
    images = _images(_rows(posterior, trace, name, mean), image_shape, name)
    columns = int(np.ceil(np.sqrt(len(images))))
    missing = np.full((-len(images) % columns, *images.shape[1:]), _white(images, images.ndim == 4))
    grid = np.concatenate([images, missing]).reshape(-1, columns, *images.shape[1:])
    ax = _show(grid, ax)
    ax.set(title="Means of draws from the prior", yticks=[])
    return ax


def plot_latents(
    posterior: Posterior,
    data: Any,
    *,
    labels: Any = None,
    dims: tuple[int, int] | None = None,
    var_name: str | None = None,
    batch_axes: Any = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot where each datum lies in two dimensions of its latents, by the ``loc`` of the guide.

    By default they are those along which ``loc`` varies most from datum to datum, in units of the
    guide's scale: the most active ones in the sense of Burda et al. (2016).

    Args:
        posterior: the trained posterior.
        data: as for `fit`, any number of rows.
        labels: for each datum what to colour it by, categories or numbers.
        dims: the two dimensions of the site, flattened.
        var_name: the local site; by default the only one.
        batch_axes: as for `fit`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes, with a point for each datum.

    Raises:
        ValueError: if there are several local sites to choose from, or it has one dimension.
    """
    from matplotlib import colormaps

    encodings = posterior.encode(data, batch_axes=batch_axes)
    name = _only(posterior.guide.local_sites, var_name, "local")
    loc, scale = (part.reshape(len(part), -1) for part in encodings[name])
    if loc.shape[1] < 2:
        raise ValueError(f"Site {name!r} has one dimension, and a map needs two.")
    if dims is None:
        activity = loc.var(0) / (scale**2).mean(0)
        dims = tuple(np.argsort(-activity, kind="stable")[:2].tolist())
    ax = _axes(ax)
    points = loc[:, list(dims)]
    style = {"s": 12, "alpha": 0.8, "linewidths": 0}
    if labels is None:
        ax.scatter(*points.T, **style)
    elif len(kinds := np.unique(labels)) > MAX_LABELS:
        ax.figure.colorbar(ax.scatter(*points.T, c=np.asarray(labels), **style), ax=ax)
    else:
        palette = "tab10" if len(kinds) <= 10 else "tab20"
        for number, kind in enumerate(kinds):
            chosen = points[np.asarray(labels) == kind]
            colour = colormaps[palette](number)
            ax.scatter(*chosen.T, color=colour, label=str(kind), **style)
        ax.legend(frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel=f"{name}[{dims[0]}]", ylabel=f"{name}[{dims[1]}]", title="Latents")
    return ax


def plot_khat(check: Check, *, ax: Axes | None = None) -> Axes:
    """Plot the k-hat of every datum, sorted, coloured and counted by what it means.

    Args:
        check: what `numpyro_vae.check` returned.
        ax: where to draw; by default a new figure.

    Returns:
        The axes, with a point for each datum, those with no tail at all (minus infinity) at the
        bottom, and a line at each threshold.

    Example:
        >>> import xarray as xr
        >>> khat = xr.Dataset({"khat": ("data", [0.2, 1.3, 0.1])}, attrs={"khat_threshold": 0.7})
        >>> ax = plot_khat(Check(khat))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['fine: 2 (67%)', 'borderline: 0 (0%)', 'not to be trusted: 1 (33%)']
    """
    khat = check.dataset["khat"].values
    order = np.argsort(khat, kind="stable")
    floor = min(0.0, np.min(khat[np.isfinite(khat)], initial=0.0))
    heights, verdict = np.maximum(khat, floor)[order], check.verdict[order]
    ax = _axes(ax)
    for value, (label, colour) in enumerate(zip(VERDICTS, COLOURS, strict=True)):
        places = np.flatnonzero(verdict == value)
        label = f"{label}: {len(places)} ({len(places) / len(khat):.0%})"
        ax.scatter(places + 1, heights[places], s=8, linewidths=0, color=colour, label=label)
    for threshold in (check.dataset.attrs["khat_threshold"], UNTRUSTWORTHY):
        ax.axhline(threshold, color="grey", linestyle="--", linewidth=0.8, zorder=0)
    ax.set(xlabel="datum, sorted", ylabel="Pareto k-hat", title="Can each posterior be trusted?")
    ax.legend(frameon=False, markerscale=2)
    return ax


def plot_collapse(check: Check, *, ax: Axes | None = None) -> Axes:
    """Plot how far the guide is from the prior in each latent dimension, on average over data.

    Args:
        check: what `numpyro_vae.check` returned.
        ax: where to draw; by default a new figure.

    Returns:
        The axes: a bar for each dimension, largest first, on a logarithmic scale, and a line at
        the divergence below which a dimension counts as collapsed.

    Example:
        >>> import xarray as xr
        >>> kl = xr.Dataset({"kl_z": (["data", "z_dim_0"], [[1.0, 0.0], [3.0, 0.001]])})
        >>> ax = plot_collapse(Check(kl))
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['z[0]', 'z[1]']
    """
    means = {}
    for name, kl in check.dataset.data_vars.items():
        if str(name).startswith("kl_"):
            for index, value in np.ndenumerate(np.asarray(kl.mean(kl.dims[0]))):
                place = f"[{', '.join(map(str, index))}]" if index else ""
                means[str(name)[3:] + place] = float(value)
    names = sorted(means, key=lambda name: -means[name])
    heights = np.array([means[name] for name in names])
    collapsed, floor = heights < COLLAPSED, COLLAPSED / 10
    colours = np.where(collapsed, COLOURS[2], COLOURS[0])
    ax = _axes(ax)
    ax.bar(names, np.maximum(heights, floor) - floor, bottom=floor, color=colours.tolist())
    label = f"collapsed below {COLLAPSED} nats: {collapsed.sum()} of {len(names)}"
    ax.axhline(COLLAPSED, color="grey", linestyle="--", linewidth=0.8, label=label)
    ax.set(yscale="log", ylabel="KL from the prior (nats)", title="Latent dimensions")
    ax.set_ylim(floor, 3 * max(heights.max(), COLLAPSED))
    ax.tick_params("x", rotation=90 if len(names) > 8 else 0)
    ax.legend(frameon=False)
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Return the axes given, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _only(sites: Iterable[Site], var_name: str | None, kind: str) -> str:
    """Return the name of the site meant."""
    names = [site.name for site in sites]
    if var_name in names:
        return var_name
    if var_name is None and len(names) == 1:
        return names[0]
    raise ValueError(f"var_name is {var_name!r}; choose one of the {kind} sites {names}.")


def _trace(
    posterior: Posterior, model: Callable[..., Any], rng_key: Array, data: Any, batch_axes: Any
) -> dict:
    """Run a model on all rows, with trained parameters and a draw of the global sites."""
    guide = posterior.guide
    args, kwargs = ArrayData.read(data, batch_axes).whole()
    kwargs = {**kwargs, **posterior.static_kwargs}
    guide.setup(*args, **kwargs)
    globals_ = guide.sample_globals(rng_key, posterior.params, (1,), args, kwargs)
    values = posterior.params | {name: value[0] for name, value in globals_.items()}
    with handlers.seed(rng_seed=rng_key):
        return trace_model(all_rows(handlers.substitute(model, data=values)), args, kwargs)


def _rows(posterior: Posterior, trace: dict, name: str, value: Any) -> np.ndarray:
    """Return a value of a site with a row for each datum."""
    sites = sites_of_trace(trace)
    return np.asarray(sites.sites[name].rows(value, sites.plates[posterior.guide.plate.name]))


def _images(rows: np.ndarray, image_shape: tuple[int, ...] | None, name: str) -> np.ndarray:
    """Return rows as images, ``(num_images, height, width)`` or with channels."""
    shape = rows.shape[1:] if image_shape is None else image_shape
    if len(shape) not in (2, 3) or math.prod(shape) != math.prod(rows.shape[1:]):
        raise ValueError(
            f"A datum of site {name!r} has shape {rows.shape[1:]}, and image_shape is "
            f"{image_shape}. Give image_shape=(height, width), or with channels."
        )
    return rows.reshape(len(rows), *shape)


def _white(images: np.ndarray, colour: bool) -> float:
    """Return the value that is drawn white: the highest in colour, the lowest as ink on paper."""
    return float(images.max() if colour else images.min())


def _show(images: np.ndarray, ax: Axes | None) -> Axes:
    """Draw images, ``(rows, columns, height, width)`` or with channels, a pixel apart."""
    colour = images.ndim == 5
    gaps = [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)][: images.ndim]
    padded = np.pad(images, gaps, constant_values=_white(images, colour))
    rows, columns, height, width = padded.shape[:4]
    picture = padded.swapaxes(1, 2).reshape(rows * height, columns * width, *padded.shape[4:])
    ax = _axes(ax)
    ax.imshow(picture, cmap=None if colour else "gray_r", interpolation="nearest")
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
