"""Pictures of a fit, a posterior and its checks; matplotlib is imported when one is drawn.

Every function draws into ``ax``, by default the axes of a new figure, and returns it. Those that
draw images take ``var_name``, the observed site that holds them (by default the only one), and
``image_shape``, ``(height, width)`` or with channels (by default the site's own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array

from numpyro_vae.checks.collapse import Collapse
from numpyro_vae.checks.importance import Importance
from numpyro_vae.checks.report import Report
from numpyro_vae.inference import quantities
from numpyro_vae.model.sites import Site
from numpyro_vae.posterior import Posterior
from numpyro_vae.training.fit import FitResult

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

MAX_LABELS = 20  # more distinct labels than this are taken as values on a scale


def plot_training(result: FitResult, *, ax: Axes | None = None) -> Axes:
    """Plot the loss of every epoch, and the validation loss if there is one with its minimum.

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
    ax: Axes | None = None,
) -> Axes:
    """Plot the images of all rows of data, as `fit` takes them, above posterior predictive means.

    These are means of the likelihood, averaged over ``num_samples`` draws of the latents. Where the
    distribution of the observed site has no known mean, as many draws of the site are averaged.

    Raises:
        ValueError: if there are several observed sites to choose from, or they hold no images.
    """
    runner = posterior._runner
    rows = runner.read(data)
    name = _image_site(posterior, var_name)
    seen = _images(runner.per_batch(quantities.observed, rows)[name], image_shape, name)
    globals_ = runner.draw_globals(rng_key, rows, num_samples)
    sizes = {"num_samples": num_samples, "num_draws": num_samples, "name": name}
    mean = partial(runner.per_batch, quantities.expected, rows, rng_key, globals_, **sizes)
    images = np.stack([seen, _images(_known_or_drawn(mean), image_shape, name)])
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
    ax: Axes | None = None,
) -> Axes:
    """Plot a grid of means of the likelihood, given local latents drawn from their prior.

    There is an image for each row of data, whose observed values are ignored. Where the
    distribution of the observed site has no known mean, ``num_samples`` draws of the site are
    averaged. Global sites are drawn from their posterior, one draw for all images.

    Raises:
        ValueError: if there are several observed sites to choose from, or they hold no images.
    """
    runner = posterior._runner
    rows = runner.read(data)
    name = _image_site(posterior, var_name)
    globals_ = runner.draw_globals(rng_key, rows, 1)
    sizes = {"num_samples": num_samples, "name": name}
    mean = partial(runner.per_batch, quantities.expected_a_priori, rows, rng_key, globals_, **sizes)
    images = _images(_known_or_drawn(mean), image_shape, name)
    columns = math.ceil(math.sqrt(len(images)))
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
    ax: Axes | None = None,
) -> Axes:
    """Plot the guide's ``loc`` of every datum in two dimensions of a local site.

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

    encodings = posterior.encode(data)
    name = _only(posterior.guide.local_sites, var_name, "local")
    loc, scale = (part.reshape(len(part), -1) for part in encodings[name])
    if loc.shape[1] < 2:
        raise ValueError(f"Site {name!r} has one dimension, and a map needs two.")
    first, second = np.argsort(-loc.var(0) / (scale**2).mean(0))[:2] if dims is None else dims
    points, ax = loc[:, [first, second]], _axes(ax)
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
    ax = _axes(ax)
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
    ax = _axes(ax)
    Collapse().draw(report.dataset, ax)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _only(sites: Iterable[Site], var_name: str | None, kind: str) -> str:
    """Return the name of the site meant."""
    names = [site.name for site in sites]
    if var_name in names or (var_name is None and len(names) == 1):
        return var_name or names[0]
    raise ValueError(f"var_name is {var_name!r}; choose one of the {kind} sites {names}.")


def _image_site(posterior: Posterior, var_name: str | None) -> str:
    """Return the name of the observed site with the images."""
    guide = posterior.guide
    return _only(guide.sites.observed(guide.plate.name), var_name, "observed")


def _known_or_drawn(mean: Callable[..., np.ndarray]) -> np.ndarray:
    """Return the mean of a site, or the average of its draws if its distribution knows none."""
    try:
        found = mean(known=True)
    except NotImplementedError:
        return mean(known=False)
    return found if np.isfinite(found).all() else mean(known=False)


def _images(rows: Any, image_shape: tuple[int, ...] | None, name: str) -> np.ndarray:
    """Return rows as images, ``(num_images, height, width)`` or with channels."""
    rows = np.asarray(rows)
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
    if colour and picture.max() > 1:
        picture = picture / picture.max()
    ax = _axes(ax)
    ax.imshow(picture, cmap=None if colour else "gray_r", interpolation="nearest")
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
