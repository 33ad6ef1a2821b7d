"""A variational autoencoder of handwritten digits: trained, checked datum by datum, saved.

Run ``python examples/digits_vae.py``. It trains on scikit-learn's digits, prints what the check
finds on images held out, and writes a picture and an ArviZ DataTree into ``output/``.

A pixel of these 8x8 images counts how many of 4x4 bits were on, so it is a number out of 16. The
bits of a block tend to agree, which spreads the counts wider than a Binomial allows: the
likelihood is a Beta-Binomial, with a concentration learned for each pixel. With
``--dataset mnist`` each pixel of MNIST is set at random, once, with the probability that its grey
level says, and the likelihood is Bernoulli.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from matplotlib.figure import Figure
from numpyro.contrib.module import nnx_module
from sklearn.datasets import load_digits

from numpyro_vae import (
    AutoAmortizedMultivariateNormal,
    ConvNet,
    Importance,
    Posterior,
    Report,
    amortize,
    plot_collapse,
    plot_khat,
    plot_latents,
    plot_prior_samples,
    plot_reconstructions,
)

MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
LATENT_SIZE = 8


class Data(NamedTuple):
    """Images split in three, the labels of the test images, and how pixels are distributed."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    likelihood: Callable[[jax.Array], dist.Distribution]


def digits() -> Data:
    """1,797 images of 8x8 pixels, counts out of 16, in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = images[order].reshape(-1, 8, 8).astype(np.float32)
    train, validation, test = np.split(images, [1297, 1437])
    return Data(train, validation, test, labels[order][1437:], counts_out_of_16)


def mnist(path: Path | None) -> Data:
    """70,000 images of 28x28 pixels, binarized at random."""
    if path is None:
        import pooch

        path = Path(pooch.retrieve(MNIST_URL, f"sha256:{MNIST_SHA256}", progressbar=True))
    with np.load(path) as file:
        images = np.concatenate([file["x_train"], file["x_test"]])
        labels = file["y_test"]
    random = np.random.default_rng(0).random(images.shape, np.float32)
    images = (random < images / np.float32(255)).astype(np.float32)
    train, validation, test = np.split(images, [58_000, 60_000])
    return Data(train, validation, test[:1000], labels[:1000], dist.BernoulliLogits)


def counts_out_of_16(logits: jax.Array) -> dist.Distribution:
    """Beta-Binomial counts; the smaller a pixel's concentration, the wider their spread."""
    log_concentration = numpyro.param("log_concentration", jnp.full(logits.shape[-2:], 2.0))
    concentration = jnp.exp(jnp.asarray(log_concentration))
    probs = nnx.sigmoid(9 * jnp.tanh(logits / 9))  # so that neither concentration underflows
    return dist.BetaBinomial(concentration * probs, concentration * (1 - probs), 16)


class Decoder(nnx.Module):
    """From the latents of an image to a logit for each pixel."""

    def __init__(self, hidden_size: int, image_shape: tuple[int, ...], *, rngs: nnx.Rngs) -> None:
        self.image_shape = image_shape
        self.layers = nnx.Sequential(
            nnx.Linear(LATENT_SIZE, hidden_size, rngs=rngs),
            nnx.relu,
            nnx.Linear(hidden_size, hidden_size, rngs=rngs),
            nnx.relu,
            nnx.Linear(hidden_size, int(np.prod(image_shape)), rngs=rngs),
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return logits of shape ``(batch, *image_shape)``."""
        return self.layers(z).reshape(*z.shape[:-1], *self.image_shape)


def make_model(data: Data, hidden_size: int) -> Callable[[jax.Array], None]:
    """The generative model: latents, decoder, likelihood."""
    decoder = Decoder(hidden_size, data.train.shape[1:], rngs=nnx.Rngs(0))

    def model(images: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("image", len(images)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT_SIZE]).to_event(1))
            pixels = data.likelihood(decode(z)).to_event(2)
            numpyro.sample("pixels", pixels, obs=images)

    return model


def draw(posterior: Posterior, found: Report, data: Data, path: Path) -> None:
    """One picture of everything."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplot_mosaic("RRP;LKC", height_ratios=[1, 1.2])
    plot_reconstructions(posterior, jax.random.key(2), data.test[:6], ax=axes["R"])
    plot_prior_samples(posterior, jax.random.key(3), data.test[:25], ax=axes["P"])
    plot_latents(posterior, data.test, labels=data.labels, ax=axes["L"])
    plot_khat(found, ax=axes["K"])
    plot_collapse(found, ax=axes["C"])
    figure.savefig(path, dpi=110)


def save(
    posterior: Posterior, found: Report, images: np.ndarray, num_samples: int, path: Path
) -> None:
    """Write what ArviZ reads, with the checks, then open it again and ask ArviZ.

    The decoder's weights are point estimates, so the log-likelihood of an image, marginal over its
    latents, differs between draws by Monte Carlo error alone. That error is what ``p_loo`` shows,
    and the log evidence is ``elpd_loo + p_loo``.
    """
    tree = posterior.to_datatree(jax.random.key(4), images, num_samples)
    checked = found.isel(image=slice(len(images)))  # of the same images
    checked.add_to(tree).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")
        print(az.loo(tree))


def main() -> None:
    """Train, check, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--mnist", type=Path, help="a local mnist.npz; else it is downloaded")
    parser.add_argument("--encoder", choices=["chosen", "conv"], default="chosen")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    if args.dataset == "digits":
        data, hidden_size, batch_size, num_steps = digits(), 128, 128, 4000
    else:
        data, hidden_size, batch_size, num_steps = mnist(args.mnist), 400, 250, 5000
    num_samples = 100 if args.quick else 1000
    num_simulation_steps = 60 if args.quick else 3000
    num_steps = 60 if args.quick else num_steps

    model = make_model(data, hidden_size)
    # A Normal: here its k-hats are no worse than a flow's, and its dimensions can be drawn.
    conv = partial(ConvNet, features=hidden_size) if args.encoder == "conv" else None
    guide = AutoAmortizedMultivariateNormal(model, conv)
    posterior = amortize(
        model,
        jax.random.key(0),
        data.train,
        guide=guide,
        validation=data.validation,
        batch_size=batch_size,
        num_steps=num_steps,
        num_simulation_steps=num_simulation_steps,
        natural_steps=8,  # of each row, after the network
    )
    found = posterior.check(
        jax.random.key(1), data.test, checks=(Importance(num_samples=num_samples), "collapse")
    )
    print(f"\nHeld out: {found}")
    draw(posterior, found, data, args.output / f"{args.dataset}_vae.png")
    num_samples = 50 if args.quick else 100
    save(posterior, found, data.test[:100], num_samples, args.output / f"{args.dataset}_vae.nc")


if __name__ == "__main__":
    main()
