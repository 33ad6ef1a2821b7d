"""The lower half of a digit, predicted from the upper one by a network that reads either.

Run ``python examples/half_images.py``. A variational autoencoder of scikit-learn's digits, whose
likelihood and encoder are told which pixels are there: in training it meets each image whole and
with its lower half hidden, so one encoder knows the posterior in both cases. As half an image
leaves much open, that is a Normal with a covariance of its own. Of the images held out it is given
the upper half alone. Their lower halves are drawn, and scored by

    log p(lower | upper) = log p(whole) - log p(upper),

both terms estimated by importance sampling, next to what a pixel's own distribution says, and, in
squared error, next to a ridge regression and the nearest neighbours. A picture and an ArviZ
DataTree are written into ``output/``.

A pixel of these 8x8 images is a count out of 16, with a Beta-Binomial likelihood whose
concentration is learned for each pixel.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from matplotlib.figure import Figure
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsRegressor

from numpyro_vae import (
    MLP,
    AutoAmortizedMultivariateNormal,
    Importance,
    Posterior,
    Report,
    fit,
    plot_khat,
)

LATENT_SIZE, HIDDEN_SIZE = 16, 256
UPPER = np.repeat([[True], [False]], 4, axis=0) & np.ones(8, bool)


class Data(NamedTuple):
    """Images split in three."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def digits() -> Data:
    """1,797 images of 8x8 pixels, counts out of 16, in a fixed random order."""
    images, _ = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = images[order].reshape(-1, 8, 8).astype(np.float32)
    return Data(*np.split(images, [1297, 1437]))


def whole(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the model takes, with every pixel there."""
    return images, np.ones(images.shape, bool)


def upper_half(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the model takes, the lower half hidden; what stands there is not that of the image."""
    return np.where(UPPER, images, 0), np.broadcast_to(UPPER, images.shape)


def both(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each image twice."""
    pairs = zip(whole(images), upper_half(images), strict=True)
    return tuple(np.concatenate(pair) for pair in pairs)


class Decoder(nnx.Module):
    """From the latents of an image to a logit for each pixel."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        sizes = (LATENT_SIZE, HIDDEN_SIZE, HIDDEN_SIZE)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])
        self.last = nnx.Linear(HIDDEN_SIZE, 64, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return logits of shape ``(..., 8, 8)``."""
        for layer in self.layers:
            z = nnx.relu(layer(z))
        return self.last(z).reshape(*z.shape[:-1], 8, 8)


DECODER = Decoder(rngs=nnx.Rngs(0))


def model(images: jax.Array, there: jax.Array) -> None:
    """Latents, decoder, and a likelihood of the pixels that are there."""
    decode = nnx_module("decoder", DECODER)
    log_concentration = jnp.asarray(numpyro.param("log_concentration", jnp.full((8, 8), 2.0)))
    with numpyro.plate("image", len(images)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT_SIZE]).to_event(1))
        probs = nnx.sigmoid(9 * jnp.tanh(decode(z) / 9))  # so that no concentration underflows
        concentration = jnp.exp(log_concentration)
        pixels = dist.BetaBinomial(concentration * probs, concentration * (1 - probs), 16)
        numpyro.sample("pixels", pixels.mask(there).to_event(2), obs=images)


def log_marginals(train: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the log-density of lower halves if each pixel had its own distribution, no more."""
    counts = np.stack([(train == value).sum(0) for value in range(17)]) + 0.5
    log_probs = np.log(counts / counts.sum(0))
    found = np.take_along_axis(log_probs, images.astype(int), axis=0)
    return found[:, 4:].sum((1, 2))


def squared_errors(data: Data, predicted: np.ndarray) -> dict[str, float]:
    """Return the mean squared error of the lower halves, in counts, by method."""
    halves = [(x[:, :4].reshape(len(x), -1), x[:, 4:].reshape(len(x), -1)) for x in data]
    (upper, lower), _, (test_upper, test_lower) = halves
    found = {
        "mean image": np.broadcast_to(lower.mean(0), test_lower.shape),
        "ridge regression": RidgeCV(np.logspace(-1, 4, 11)).fit(upper, lower).predict(test_upper),
        "10 nearest": KNeighborsRegressor(10, weights="distance")
        .fit(upper, lower)
        .predict(test_upper),
        "this model": predicted[:, 4:].reshape(test_lower.shape),
    }
    return {name: float(np.square(x - test_lower).mean()) for name, x in found.items()}


def conditional_log_prob(posterior: Posterior, data: Data, num_samples: int) -> np.ndarray:
    """Return log p(lower | upper) of each test image, in nats."""
    found = [
        posterior.log_weights(jax.random.key(number), given(data.test), num_samples)
        for number, given in enumerate((whole, upper_half))
    ]
    of_whole, of_upper = (logsumexp(weights, axis=0) - np.log(num_samples) for weights in found)
    return of_whole - of_upper


def draw(data: Data, drawn: np.ndarray, checked: Report, losses: dict, path: Path) -> None:
    """Images, their upper halves, draws of the lower ones and their mean; checks and training."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplot_mosaic("III;KTT", height_ratios=[2, 1])
    rows = [data.test[:16], upper_half(data.test[:16])[0]]
    rows += [np.where(UPPER, data.test[:16], draws[:16]) for draws in drawn[:4]]
    rows += [np.where(UPPER, data.test[:16], drawn.mean(0)[:16])]
    grid = np.pad(np.stack(rows), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=8)
    axes["I"].imshow(grid.transpose(0, 2, 1, 3).reshape(len(rows) * 10, -1), cmap="gray_r")
    names = ("image", "given", "draw", "draw", "draw", "draw", "mean")
    axes["I"].set_yticks(10 * np.arange(len(names)) + 4.5, names)
    axes["I"].set_xticks([])
    plot_khat(checked, ax=axes["K"])
    for name, values in losses.items():
        axes["T"].plot(values, label=name)
    axes["T"].set(xlabel="epoch", ylabel="negative ELBO, nats a datum")
    axes["T"].legend()
    figure.savefig(path, dpi=110)


def save(posterior: Posterior, checked: Report, data: Data, num_samples: int, path: Path) -> None:
    """Write what ArviZ reads, given upper halves alone; then open it again and look at the rest."""
    images = data.test[:50]
    tree = posterior.to_datatree(jax.random.key(4), upper_half(images), num_samples)
    checked = checked.isel(image=slice(len(images)))  # of the same images
    checked.add_to(tree).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")
        lower = tree.posterior_predictive["pixels"].isel(pixels_dim_0=slice(4, None))
        low, high = np.quantile(lower.squeeze("chain"), [0.05, 0.95], axis=0)
        inside = np.mean((images[:, 4:] >= low) & (images[:, 4:] <= high))
        print(f"{inside:.1%} of hidden pixels lie in the central 90% of their draws")


def main() -> None:
    """Train, predict, compare, check, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    num_epochs, num_samples = (2, 100) if args.quick else (80, 500)

    data = digits()
    if args.quick:
        data = data._replace(test=data.test[:50])
    encoder = partial(MLP, hidden_sizes=(HIDDEN_SIZE, HIDDEN_SIZE), standardize=True)
    guide = AutoAmortizedMultivariateNormal(model, encoder)
    steps = num_epochs * -(-2 * len(data.train) // 128)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    result = fit(
        svi,
        jax.random.key(0),
        both(data.train),
        batch_size=128,
        num_epochs=num_epochs,
        validation=both(data.validation),
        patience=10,
    )

    posterior = Posterior(guide, result)
    drawn = posterior.predict(jax.random.key(1), upper_half(data.test), 100)["pixels"]
    baseline = log_marginals(data.train, data.test)
    found = conditional_log_prob(posterior, data, num_samples)
    print(f"\nlog p(lower half | upper half) of {len(found)} images held out, in nats an image:")
    for name, values in {"pixel by pixel": baseline, "this model": found}.items():
        print(f"  {name:18}{values.mean():9.2f} (se {values.std() / len(values) ** 0.5:.2f})")
    print("mean squared error of the lower half, in counts out of 16:")
    for name, value in squared_errors(data, drawn.mean(0)).items():
        print(f"  {name:18}{value:9.2f}")
    checked = posterior.check(
        jax.random.key(2),
        upper_half(data.test),
        checks=(Importance(num_samples=num_samples), "collapse"),
    )
    print(f"\nGiven the upper halves: {checked}")
    history = {name: values for name, values in result.history.items() if len(values)}
    draw(data, drawn, checked, history, args.output / "half_images.png")
    save(posterior, checked, data, 100, args.output / "half_images.nc")


if __name__ == "__main__":
    main()
