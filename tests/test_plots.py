"""What is drawn, on results of tiny fits."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from numpyro.infer import SVI, Trace_ELBO
from scipy import stats

from numpyro_vae import (
    AutoAmortizedNormal,
    FitResult,
    Importance,
    Posterior,
    Report,
    fit,
    plot_collapse,
    plot_khat,
    plot_latents,
    plot_manifold,
    plot_prior_samples,
    plot_reconstructions,
    plot_training,
)

NUM_DATA, HEIGHT, WIDTH = 40, 3, 4
PATTERN = np.random.default_rng(0).normal(size=(3, HEIGHT, WIDTH)).astype(np.float32)
NOISE = 0.2


def model(x):
    """Images that are sums of three patterns, brighter by a global level."""
    level = numpyro.sample("level", dist.Normal(0.0, 10.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = level + jnp.tensordot(z, PATTERN, 1)
        numpyro.sample("x", dist.Normal(mean, NOISE).to_event(2), obs=x)


def untrained(model, x, auto=AutoAmortizedNormal):
    guide = auto(model)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    return Posterior(guide, svi.get_params(svi.init(jax.random.key(0), x)))


def train(model, data, num_epochs, **options):
    guide = AutoAmortizedNormal(model)
    svi = SVI(model, guide, optax.adam(3e-2), Trace_ELBO())
    result = fit(svi, jax.random.key(0), data, num_epochs=num_epochs, progress_bar=False, **options)
    return result, Posterior(guide, result)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(NUM_DATA, 3))
    x = 5.0 + np.tensordot(z, PATTERN, 1) + NOISE * rng.normal(size=(NUM_DATA, HEIGHT, WIDTH))
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def fitted(x):
    return train(model, x, 300, batch_size=20, validation=x[:10])


@pytest.fixture
def key():
    return jax.random.key(5)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def picture(ax):
    (image,) = ax.get_images()
    return np.asarray(image.get_array())


def tiles(ax, height=HEIGHT, width=WIDTH):
    """The images of a grid, ``(rows, columns, height, width)``, without the gaps."""
    found = picture(ax)
    rows, columns = found.shape[0] // (height + 1), found.shape[1] // (width + 1)
    found = found.reshape(rows, height + 1, columns, width + 1, *found.shape[2:]).swapaxes(1, 2)
    return found[:, :, :height, :width]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.slow
def test_training_draws_the_history(fitted):
    result, _ = fitted
    ax = plot_training(result)
    training, validation, best = ax.get_lines()
    np.testing.assert_array_equal(training.get_ydata(), result.history["loss"])
    np.testing.assert_array_equal(training.get_xdata(), np.arange(1, 301))
    np.testing.assert_array_equal(validation.get_ydata(), result.history["validation_loss"])
    assert best.get_ydata() == [result.history["validation_loss"].min()]
    assert legend(ax)[:2] == ["training", "validation"]
    assert ax.get_xlabel() == "epoch"
    assert "nats" in ax.get_ylabel()


def test_training_without_validation():
    ax = plot_training(FitResult({}, None, np.zeros(2), {"loss": np.array([2.0, 1.0])}))
    assert legend(ax) == ["training"]


def test_figures_are_new_unless_axes_are_given(fitted, x):
    _, given = plt.subplots()
    assert plot_training(fitted[0], ax=given) is given
    assert plot_latents(fitted[1], x, ax=given) is given
    assert plot_training(fitted[0]) is not given
    assert len(plt.get_fignums()) == 2


def test_reconstructions_lie_below_their_data(fitted, x, key):
    ax = plot_reconstructions(fitted[1], key, x[:5])
    data, means = tiles(ax)
    np.testing.assert_array_equal(data, x[:5])
    # The model, trained a little, explains most of how the images differ.
    assert np.var(means - data) < 0.2 * np.var(x)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data", "mean"]


def test_reconstructions_are_predictive_means(fitted, x, key):
    _, means = tiles(plot_reconstructions(fitted[1], key, x[:3], num_samples=400))
    draws = fitted[1].predict(key, x[:3], 400)["x"]
    error = draws.std(0) / np.sqrt(len(draws))
    np.testing.assert_array_less(np.abs(means - draws.mean(0)), 5 * error)


def images(x, subsample_size=None):
    """The same model without the global level; its plate may select rows."""
    with numpyro.plate("data", len(x), subsample_size=subsample_size) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = jnp.tensordot(z, PATTERN, 1)
        numpyro.sample("x", dist.Normal(mean, NOISE).to_event(2), obs=x[rows])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rows", "whole", "subsampled"])
def test_many_images_are_computed_in_batches(form, x, key):
    """Each row has the draws that it has in any batch, however the model takes the data."""
    options = {"batch_axes": None} if form == "whole" else {}
    if form == "subsampled":
        options["static_kwargs"] = {"subsample_size": 20}
    guide, many = AutoAmortizedNormal(images), np.tile(x, (8, 1, 1))
    svi = SVI(images, guide, optax.adam(1e-2), Trace_ELBO())
    posterior = Posterior(guide, svi.get_params(svi.init(jax.random.key(0), x)), **options)
    data, means = tiles(plot_reconstructions(posterior, key, many, num_samples=50))
    np.testing.assert_array_equal(data, many)
    expected = posterior.predict(key, many, 50)["x"].mean(0)
    error = NOISE / np.sqrt(50)
    np.testing.assert_array_less(np.abs(means - expected), 6 * error)
    assert np.std(means - expected) == pytest.approx(error, rel=0.05)
    draws = tiles(plot_prior_samples(posterior, key, many)).reshape(-1, HEIGHT * WIDTH)[:320]
    assert len(np.unique(draws.round(4), axis=0)) == len(many)  # none is drawn twice


def memory(name):
    """Megabytes of this process: `VmRSS` now, `VmHWM` at the most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_draws(key):
    """The means of 200 draws of every row, held at once, would be 800 MB."""

    def photographs(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[:, None] * np.ones(1000), 1.0).to_event(1), obs=x)

    x = np.ones((1000, 1000), np.float32)
    posterior = untrained(photographs, x[:10])
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = memory("VmRSS")
    plot_reconstructions(posterior, key, x, image_shape=(25, 40))
    assert memory("VmHWM") - before < 300


def test_gaps_between_images_are_white(fitted, x, key):
    found = picture(plot_reconstructions(fitted[1], key, x[:5]))
    white = tiles(plot_reconstructions(fitted[1], key, x[:5])).min()
    assert found.shape == (2 * (HEIGHT + 1), 5 * (WIDTH + 1))
    np.testing.assert_array_equal(found[HEIGHT :: HEIGHT + 1], white)
    np.testing.assert_array_equal(found[:, WIDTH :: WIDTH + 1], white)


def test_prior_samples_come_from_the_prior(fitted, x, key):
    _, posterior = fitted
    draws = tiles(plot_prior_samples(posterior, key, np.tile(x, (10, 1, 1))))
    draws = draws.reshape(-1, HEIGHT, WIDTH)
    assert len(draws) == 20**2
    # Sums of the patterns and a global level, without noise: four dimensions explain it all.
    singular = np.linalg.svd((draws - draws.mean((1, 2), keepdims=True)).reshape(400, -1))[1]
    assert singular[3] < 1e-4 * singular[0]
    # The level is a draw from its posterior, and not from its prior; z has its prior's spread.
    levels = posterior.sample(key, x, 1000, var_names=["level"])["level"]
    assert levels.std() < 0.5
    spread = np.sqrt((PATTERN**2).sum(0))
    error = spread / np.sqrt(400) + levels.std()
    np.testing.assert_array_less(np.abs(draws.mean(0) - levels.mean()), 5 * error)
    np.testing.assert_allclose(draws.std(0), spread, rtol=5 / np.sqrt(2 * 400))


def test_prior_samples_fill_the_grid_with_white(fitted, x, key):
    found = tiles(plot_prior_samples(fitted[1], key, x[:5]))
    assert found.shape == (2, 3, HEIGHT, WIDTH)
    np.testing.assert_array_equal(found[1, 2], found[0].min().clip(max=found[1, :2].min()))


def test_a_manifold_is_of_the_likelihood_at_quantiles(fitted, x, key):
    _, posterior = fitted
    found = tiles(plot_manifold(posterior, key, x, size=3, dims=(0, 2)))
    quantiles = stats.norm.ppf([1 / 6, 1 / 2, 5 / 6])
    z = np.zeros((3, 3, 3))
    z[:, :, 0], z[:, :, 2] = quantiles, quantiles[::-1, None]  # to the right, and upwards
    expected = np.tensordot(z, PATTERN, 1)
    np.testing.assert_allclose(found - found[1, 1], expected, atol=1e-5)
    levels = posterior.sample(key, x, 1000, var_names=["level"])["level"]
    assert abs(found[1, 1].mean() - levels.mean()) < 5 * levels.std()  # drawn from its posterior


@pytest.mark.parametrize("form", ["whole", "subsampled"])
def test_a_manifold_does_not_depend_on_how_the_model_takes_data(form, x, key):
    options = {"batch_axes": None} if form == "whole" else {}
    if form == "subsampled":
        options["static_kwargs"] = {"subsample_size": 20}
    guide = AutoAmortizedNormal(images)
    svi = SVI(images, guide, optax.adam(1e-2), Trace_ELBO())
    posterior = Posterior(guide, svi.get_params(svi.init(jax.random.key(0), x)), **options)
    found = tiles(plot_manifold(posterior, key, x, size=2))
    corner = stats.norm.ppf(0.25) * (PATTERN[0] + PATTERN[1])
    np.testing.assert_allclose(found[1, 0], corner, rtol=1e-5)


@pytest.mark.parametrize("dims", [(0, 0), (0, 3), (-1, 0)])
def test_a_manifold_needs_two_dimensions(fitted, x, key, dims):
    with pytest.raises(ValueError, match=r"3 latent dimension.*from 0 to 2"):
        plot_manifold(fitted[1], key, x, dims=dims)


def test_means_that_no_distribution_knows_are_drawn(key):
    def categories(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            logits = jnp.stack([jnp.full(4, -20.0), jnp.full(4, 20.0)], -1) + 0 * z[:, :1, None]
            numpyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    x = np.ones((3, 4), np.int32)
    posterior = untrained(categories, x)
    shape = {"image_shape": (2, 2)}
    np.testing.assert_array_equal(tiles(plot_reconstructions(posterior, key, x, **shape), 2, 2), 1)
    drawn = tiles(plot_prior_samples(posterior, key, x, **shape), 2, 2)
    np.testing.assert_array_equal(drawn, 1)
    grid = tiles(plot_manifold(posterior, key, x, size=2, **shape), 2, 2)
    np.testing.assert_array_equal(grid, 1)


def test_images_with_channels(key):
    def colours(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[:, None] * np.ones(12), 1.0).to_event(1), obs=x)

    x = np.random.default_rng(0).uniform(size=(3, 12)).astype(np.float32)
    posterior = untrained(colours, x)
    ax = plot_reconstructions(posterior, key, x, image_shape=(2, 2, 3))
    assert picture(ax).shape == (2 * 3, 3 * 3, 3)


def test_latents_are_the_guides_loc(fitted, x):
    _, posterior = fitted
    labels = np.arange(NUM_DATA) % 3
    ax = plot_latents(posterior, x, labels=labels, dims=(2, 0))
    loc = posterior.encode(x)["z"].loc
    assert legend(ax) == ["0", "1", "2"]
    for label, points in enumerate(ax.collections):
        np.testing.assert_array_equal(points.get_offsets(), loc[labels == label][:, [2, 0]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[2]", "z[0]")


def test_latents_by_default_are_the_most_active(fitted, x):
    _, posterior = fitted
    loc, scale = posterior.encode(x)["z"]
    first, second, _ = np.argsort(-loc.var(0) / (scale**2).mean(0))
    ax = plot_latents(posterior, x)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (f"z[{first}]", f"z[{second}]")
    (points,) = ax.collections
    assert len(points.get_offsets()) == NUM_DATA
    assert ax.get_legend() is None


def test_many_labels_are_a_scale(fitted, x):
    values = np.linspace(0.0, 1.0, NUM_DATA)
    ax = plot_latents(fitted[1], x, labels=values)
    np.testing.assert_array_equal(ax.collections[0].get_array(), values)
    assert len(ax.figure.axes) == 2  # the other is the colour bar


def test_khat_draws_and_counts_every_datum(fitted, x, key):
    found = fitted[1].check(key, x, checks=(Importance(num_samples=200), "collapse"))
    ax = plot_khat(found)
    points = np.concatenate([c.get_offsets() for c in ax.collections])
    np.testing.assert_array_equal(np.sort(points[:, 1]), np.sort(found.dataset["khat"]))
    np.testing.assert_array_equal(np.sort(points[:, 0]), np.arange(1, NUM_DATA + 1))
    counts = np.bincount(found.verdict, minlength=4)
    assert [len(c.get_offsets()) for c in ax.collections] == counts.tolist()
    assert [int(text.split(": ")[1].split(" ")[0]) for text in legend(ax)] == counts.tolist()
    lines = [line.get_ydata()[0] for line in ax.get_lines()]
    assert lines == [found.dataset.attrs["khat_threshold"], 1.0]


def test_khat_of_weights_without_a_tail_is_drawn_at_the_bottom():
    columns = {
        "khat": [-np.inf, 0.4, -0.2],
        "divergence": np.zeros(3),
        "divergence_mcse": np.zeros(3),
    }
    attrs = {"khat_threshold": 0.7, "max_divergence": 0.1}
    found = xr.Dataset({name: ("data", x) for name, x in columns.items()}, attrs=attrs)
    points = plot_khat(Report(found)).collections[0].get_offsets()
    np.testing.assert_allclose(points, [[1, -0.2], [2, -0.2], [3, 0.4]])


def test_collapse_draws_a_bar_for_each_dimension(fitted, x, key):
    found = fitted[1].check(key, x, checks=(Importance(num_samples=200), "collapse"))
    ax = plot_collapse(found)
    means = found.dataset["kl_z"].mean("data").values
    order = np.argsort(-means)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], means[order], rtol=1e-6)
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"z[{i}]" for i in order]
    assert legend(ax) == ["collapsed below 0.01 nats: 0 of 3"]


def test_collapse_counts_and_colours_what_is_collapsed():
    kl = {"kl_z": (["data", "z_dim_0"], [[1.0, 0.0], [3.0, -1e-9]]), "kl_w": ("data", [0.1, 0.3])}
    ax = plot_collapse(Report(xr.Dataset(kl)))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["z[0]", "w", "z[1]"]
    assert legend(ax) == ["collapsed below 0.01 nats: 1 of 3"]
    first, second, third = (bar.get_facecolor() for bar in ax.patches)
    assert first == second != third
    assert ax.get_lines()[0].get_ydata()[0] == 0.01


def two_images(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None] * np.ones(4), 1.0).to_event(1), obs=x)
        numpyro.sample("y", dist.Normal(z[:, None] * np.ones(4), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"var_name is None; choose one of the observed sites \['x', 'y'\]"),
        ({"var_name": "z"}, r"var_name is 'z'; choose one of the observed sites"),
        ({"var_name": "x"}, r"site 'x' has shape \(4,\), and image_shape is None"),
        ({"var_name": "x", "image_shape": (2, 3)}, r"image_shape is \(2, 3\)"),
    ],
)
@pytest.mark.parametrize("plot", [plot_reconstructions, plot_prior_samples])
def test_what_cannot_be_drawn(plot, options, message, key):
    x = np.zeros((3, 4), np.float32)
    posterior = untrained(two_images, x)
    with pytest.raises(ValueError, match=message):
        plot(posterior, key, x, **options)


def test_a_map_needs_two_dimensions():
    x = np.zeros((3, 4), np.float32)
    posterior = untrained(two_images, x)
    with pytest.raises(ValueError, match="one dimension"):
        plot_latents(posterior, x)
