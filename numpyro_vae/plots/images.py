"""Pictures of images: of the data, and of what a model makes of latents.

Every function draws into ``ax``, by default the axes of a new figure, and returns it. They take
``var_name``, the observed site that holds the images (by default the only one), and
``image_shape``, ``(height, width)`` or with channels (by default the site's own).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array
from scipy.stats import norm

from numpyro_vae.inference import quantities
from numpyro_vae.plots.figures import axes_or_new, only_site
from numpyro_vae.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_manifold", "plot_prior_samples", "plot_reconstructions"]


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


def plot_manifold(
    posterior: Posterior,
    rng_key: Array,
    data: Any,
    *,
    size: int = 20,
    dims: tuple[int, int] = (0, 1),
    num_samples: int = 200,
    var_name: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot means of the likelihood at places on a grid in two dimensions of the latents.

    The places are at quantiles of the standard Normal, so that of latents with that prior each
    image stands for as much of it (Kingma and Welling, "Auto-Encoding Variational Bayes", 2013,
    arXiv 1312.6114, figure 4). Latents of other supports are on the unconstrained scale, and those
    in further dimensions are 0.

    Args:
        posterior: the trained posterior.
        rng_key: for a draw of the global sites from their posterior, one for all images.
        data: as for `fit`; of the first row, all but what is observed is used.
        size: the number of places along each dimension.
        dims: the dimensions, counted over all local sites side by side, in the model's order.
        num_samples: how many draws of the site are averaged, where its mean is not known.
        var_name: the observed site that holds the images.
        image_shape: their shape.
        ax: where to draw.

    Raises:
        ValueError: if there are no such two dimensions, or several observed sites to choose from,
            or they hold no images.
    """
    runner = posterior._runner
    rows = runner.read(data).choose([0])
    name = _image_site(posterior, var_name)
    globals_ = runner.draw_globals(rng_key, rows, 1)
    places = _grid(size, dims, runner.width())
    sizes = {"num_samples": num_samples, "name": name, "row_axis": 1}
    mean = partial(
        runner.per_batch, quantities.expected_at, rows, places, rng_key, globals_, **sizes
    )
    images = _images(_known_or_drawn(mean)[:, 0], image_shape, name)
    ax = _show(images.reshape(size, size, *images.shape[1:]), ax)
    ax.set(title="Means of places among the latents", yticks=[])
    return ax


def _grid(size: int, dims: tuple[int, int], width: int) -> np.ndarray:
    """Return packed latents, the first dimension along columns, the second upwards."""
    if len(set(dims)) != 2 or not all(0 <= dim < width for dim in dims):
        raise ValueError(
            f"dims is {tuple(dims)}, and a datum has {width} latent dimension(s). Give two "
            f"different numbers from 0 to {width - 1}."
        )
    quantiles = np.asarray(norm.ppf((np.arange(size) + 0.5) / size), np.float32)
    second, first = np.meshgrid(quantiles[::-1], quantiles, indexing="ij")
    places = np.zeros((size * size, width), np.float32)
    places[:, dims[0]], places[:, dims[1]] = first.ravel(), second.ravel()
    return places


def _image_site(posterior: Posterior, var_name: str | None) -> str:
    """Return the name of the observed site with the images."""
    guide = posterior.guide
    return only_site(guide.sites.observed(guide.plate.name), var_name, "observed")


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
    ax = axes_or_new(ax)
    ax.imshow(picture, cmap=None if colour else "gray_r", interpolation="nearest")
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
