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

import jax
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.checks.collapse import Collapse
from numpyro_vae.checks.importance import Importance
from numpyro_vae.checks.report import Report
from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.model.plates import all_rows
from numpyro_vae.model.sites import Site
from numpyro_vae.model.trace import sites_of_trace, trace_model
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
    batch_axes: Any = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot the images of all rows of data, as `fit` takes them, above what the posterior predicts.

    That is the mean of the likelihood, averaged over ``num_samples`` draws of the latents; or of as
    many draws of the observed site, where its distribution does not know its mean.

    Raises:
        ValueError: if there are several observed sites to choose from, or they hold no images.
    """
    arrays, model = ArrayData.read(data, batch_axes), posterior.guide.model
    name = _image_site(posterior, arrays, var_name)
    latents = posterior.sample(rng_key, data, num_samples, batch_axes=batch_axes)

    @jax.jit
    def expected(draw: dict[str, Any]) -> Array:
        site, rows = _run(posterior, model, rng_key, arrays, name, draw)
        return rows(site["fn"].mean)

    mean = _known_or_drawn(
        lambda: jax.vmap(expected)(latents).mean(0),
        lambda: posterior.predict(rng_key, data, num_samples, batch_axes=batch_axes)[name].mean(0),
    )
    site, rows = _run(posterior, model, rng_key, arrays, name)
    images = np.stack([_images(x, image_shape, name) for x in (rows(site["value"]), mean)])
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

    There is an image for each row of data, whose observed values are ignored. It is the mean of
    the likelihood given one draw of the latents: exact where the distribution knows its mean, else
    that of ``num_samples`` draws. Global sites are drawn from their posterior, once for all.

    Raises:
        ValueError: if there are several observed sites to choose from, or they hold no images.
    """
    model = handlers.uncondition(posterior.guide.model)
    arrays = ArrayData.read(data, batch_axes)
    name = _image_site(posterior, arrays, var_name)

    @partial(jax.jit, static_argnames="known")
    def expected(rng_key: Array, known: bool) -> Array:
        site, rows = _run(posterior, model, rng_key, arrays, name)
        if known:
            return rows(site["fn"].mean)
        return rows(site["fn"].sample(jax.random.fold_in(rng_key, 1), (num_samples,)).mean(0))

    mean = _known_or_drawn(partial(expected, rng_key, True), partial(expected, rng_key, False))
    images = _images(mean, image_shape, name)
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
    batch_axes: Any = 0,
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
        batch_axes: as for `fit`.
        ax: where to draw.

    Raises:
        ValueError: if there are several local sites to choose from, or it has one dimension.
    """
    from matplotlib import colormaps

    encodings = posterior.encode(data, batch_axes=batch_axes)
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
        >>> khat = xr.Dataset({"khat": ("data", [0.2, 1.3, 0.1])}, attrs={"khat_threshold": 0.7})
        >>> ax = plot_khat(Report(khat))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['fine: 2 (67%)', 'borderline: 0 (0%)', 'not to be trusted: 1 (33%)']
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


def _image_site(posterior: Posterior, arrays: ArrayData, var_name: str | None) -> str:
    """Return the name of the observed site with the images, the guide being set up."""
    guide = posterior.guide
    args, kwargs = arrays.whole()
    guide.setup(*args, **kwargs, **posterior.static_kwargs)
    return _only(guide.sites.observed(guide.plate.name), var_name, "observed")


def _run(
    posterior: Posterior,
    model: Callable[..., Any],
    rng_key: Array,
    arrays: ArrayData,
    name: str,
    latents: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Callable[[Any], Array]]:
    """Run a trained model on all rows, with a draw of the global sites where none is given.

    Returns:
        The message of the site, and a function that puts the rows of a value of it in front.
    """
    args, kwargs = arrays.whole()
    kwargs = {**kwargs, **posterior.static_kwargs}
    drawn = posterior.guide.sample_globals(rng_key, posterior.params, (1,), args, kwargs)
    values = posterior.params | {key: draw[0] for key, draw in drawn.items()} | (latents or {})
    with handlers.seed(rng_seed=rng_key):
        trace = trace_model(all_rows(handlers.substitute(model, data=values)), args, kwargs)
    sites = sites_of_trace(trace)
    site, plate = sites.sites[name], sites.plates[posterior.guide.plate.name]
    return trace[name], lambda value: site.rows(value, plate)


def _known_or_drawn(known: Callable[[], Any], drawn: Callable[[], Any]) -> np.ndarray:
    """Return a mean: known, or drawn where the distribution has none to tell."""
    try:
        mean = np.asarray(known())
    except NotImplementedError:
        return np.asarray(drawn())
    return mean if np.isfinite(mean).all() else np.asarray(drawn())


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
