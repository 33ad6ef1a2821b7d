"""TensorFlow's tutorial "Convolutional Variational Autoencoder", in NumPyro.

Run ``python examples/tutorial_cvae.py --data mnist.npz`` with MNIST as Keras publishes it,
https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz; any file with grey images of
28 x 28 pixels from 0 to 255 named ``x_train`` and ``x_test`` will do.

All is as in the tutorial (https://www.tensorflow.org/tutorials/generative/cvae): pixels are on or
off, the encoder returns mean and log-variance of two latents, the decoder logits, and each step
draws one sample. The guide takes the place of the tutorial's ``encode``, ``reparameterize`` and
``compute_loss``. ``--scale`` says what the encoder's second output means; with its default the
network is the tutorial's. It prints the ELBO of the test images after each epoch, and writes a
picture and an ArviZ DataTree: images of the same latents as training goes on, a row for each
epoch, the images that belong to places in the space of the latents, the latents of the digits, and
the losses.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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

from numpyro_vae import (
    AutoAmortizedNormal,
    Conv,
    ConvTranspose,
    FitResult,
    Posterior,
    fit,
    plot_latents,
    plot_manifold,
    plot_training,
)

KERAS = nnx.initializers.glorot_uniform()  # how Keras starts, and so the tutorial
LATENT_SIZE, BATCH_SIZE, LEARNING_RATE = 2, 32, 1e-4
NUM_SHOWN = 16  # images of each epoch
IMAGES = ("x_train", "x_test")


class Encoder(nnx.Module):
    """From images to the mean and the raw scale of their latents."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        conv = partial(
            Conv, kernel_size=(3, 3), strides=2, padding="VALID", kernel_init=KERAS, rngs=rngs
        )
        self.conv_1, self.conv_2 = conv(1, 32), conv(32, 64)
        self.dense = nnx.Linear(6 * 6 * 64, 2 * LATENT_SIZE, kernel_init=KERAS, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return arrays ``(batch, LATENT_SIZE)``."""
        hidden = nnx.relu(self.conv_2(nnx.relu(self.conv_1(images[..., None]))))
        loc, raw_scale = jnp.split(self.dense(hidden.reshape(len(images), -1)), 2, axis=-1)
        return loc, raw_scale


class Decoder(nnx.Module):
    """From latents to logits of the pixels."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        transpose = partial(ConvTranspose, kernel_size=(3, 3), kernel_init=KERAS, rngs=rngs)
        self.dense = nnx.Linear(LATENT_SIZE, 7 * 7 * 32, kernel_init=KERAS, rngs=rngs)
        self.conv_1 = transpose(32, 64, strides=2)
        self.conv_2 = transpose(64, 32, strides=2)
        self.conv_3 = transpose(32, 1)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Return logits ``(batch, 28, 28)``."""
        hidden = nnx.relu(self.dense(latents)).reshape(-1, 7, 7, 32)
        hidden = nnx.relu(self.conv_2(nnx.relu(self.conv_1(hidden))))
        return self.conv_3(hidden)[..., 0]


class Data(NamedTuple):
    """Images with pixels on or off, to train and to test with, and the labels of the latter."""

    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray


def load(path: Path) -> Data:
    """Read images; a pixel is on from half its range."""
    with np.load(path) as file:
        train, test = ((file[name] / 255 >= 0.5).astype(np.float32) for name in IMAGES)
        return Data(train, test, file["y_test"])


def make_model(decoder: Decoder) -> Callable[[jax.Array], None]:
    """The generative model: two latents, decoder, pixels on or off."""

    def model(images: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("image", len(images)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT_SIZE]).to_event(1))
            numpyro.sample("pixels", dist.BernoulliLogits(decode(z)).to_event(2), obs=images)

    return model


def decode(decoder: Decoder, params: dict[str, Any], latents: np.ndarray) -> np.ndarray:
    """Return how likely pixels are on, given latents and trained parameters."""
    graphdef, state = nnx.split(decoder)
    nnx.replace_by_pure_dict(state, params["decoder$params"])
    return np.asarray(nnx.sigmoid(nnx.merge(graphdef, state)(jnp.asarray(latents))))


class Watch:
    """After each epoch, keeps images of the same latents, and prints how far training is."""

    def __init__(self, svi: SVI, decoder: Decoder) -> None:
        self.svi, self.decoder = svi, decoder
        self.latents = np.random.default_rng(0).normal(size=(NUM_SHOWN, LATENT_SIZE))
        self.rows: list[np.ndarray] = []
        self.start = time.perf_counter()

    def __call__(self, epoch: int, state: Any, metrics: Mapping[str, float]) -> None:
        """Look at an epoch."""
        self.rows.append(decode(self.decoder, self.svi.get_params(state), self.latents))
        now = time.perf_counter()
        elbo, seconds = -metrics["validation_loss"], now - self.start
        print(f"epoch {epoch + 1:2d}  test ELBO {elbo:8.2f} nats an image  {seconds:6.1f} s")
        self.start = now


def draw(
    posterior: Posterior, result: FitResult, rows: list[np.ndarray], data: Data, path: Path
) -> None:
    """One picture of everything."""
    figure = Figure(figsize=(13, 13), layout="constrained")
    axes = figure.subplot_mosaic("EM;LT")
    padded = np.pad(np.stack(rows), [(0, 0), (0, 0), (0, 1), (0, 1)])
    height, width = 29 * len(rows), 29 * NUM_SHOWN
    axes["E"].imshow(padded.swapaxes(1, 2).reshape(height, width), cmap="gray_r", aspect="auto")
    ticks = 29 * np.arange(len(rows)) + 14
    axes["E"].set(title="The same latents, by epoch", xticks=[], yticks=ticks)
    axes["E"].set_yticklabels(np.arange(len(rows)) + 1)
    plot_manifold(posterior, jax.random.key(1), data.test[:1], ax=axes["M"])
    plot_latents(posterior, data.test, labels=data.labels, dims=(0, 1), ax=axes["L"])
    plot_training(result, ax=axes["T"])
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz; see this file's head")
    scales = ("log_variance", "log_scale", "softplus")
    parser.add_argument("--scale", choices=scales, default="log_variance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    data, rngs = load(args.data), nnx.Rngs(args.seed)
    decoder, encoder = Decoder(rngs=rngs), Encoder(rngs=rngs)
    model = make_model(decoder)
    guide = AutoAmortizedNormal(model, encoder, scale=args.scale)
    svi = SVI(model, guide, optax.adam(LEARNING_RATE), Trace_ELBO())
    watch = Watch(svi, decoder)
    result = fit(
        svi,
        jax.random.key(args.seed),
        data.train,
        batch_size=BATCH_SIZE,
        num_epochs=2 if args.quick else args.epochs,
        validation=data.test,
        callbacks=[watch],
        progress_bar=False,
    )
    posterior = Posterior(guide, result)
    draw(posterior, result, watch.rows, data, args.output / "tutorial_cvae.png")
    num_samples = 20 if args.quick else 100
    tree = posterior.to_datatree(jax.random.key(2), data.test[:100], num_samples)
    tree.to_netcdf(args.output / "tutorial_cvae.nc")
    print(f"{args.output / 'tutorial_cvae.nc'} holds {', '.join(tree.children)}")


if __name__ == "__main__":
    main()
