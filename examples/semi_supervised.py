"""Semi-supervised digits: a hundred labels, and what a thousand images without any add to them.

Run ``python examples/semi_supervised.py``. Of scikit-learn's digits, 10 of each are labelled, some
1,200 images are not, and 500 are held out. Which digit an image shows, and in which of three ways
it is written, are discrete latents, summed over by ``TraceEnum_ELBO``; the latents that the decoder
draws the image from have a Normal prior for each digit and way of writing it. A label is an
observation of the digit, and ``Posterior.probabilities`` says which digit an image shows. That is
compared with what the labels alone teach a logistic regression and a nearest neighbour.

Labels are few, and clusters that have settled without them stay where they are. So at first each
labelled image counts many times, and only then once, which is what the model says.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, TraceEnum_ELBO
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit

CLASSES, STYLES, LATENT_SIZE, HIDDEN_SIZE = 10, 3, 16, 128
UNKNOWN = -1
REPEATS = 30  # of the labelled images, at first
# The log-probability of a wrong label. Minus infinity would do but for rounding: of a labelled
# image that for now looks like another digit entirely, nothing would be left in the sum.
WRONG = -20.0


class Data(NamedTuple):
    """Images ``(n, 64)`` of counts out of 16, and their labels, `UNKNOWN` where hidden."""

    images: np.ndarray
    labels: np.ndarray

    def without_labels(self) -> "Data":
        """Return the images, and that nothing is known of them."""
        return Data(self.images, np.full_like(self.labels, UNKNOWN))

    def repeat_labelled(self, times: int) -> "Data":
        """Return the data with more copies of what is labelled."""
        labelled = np.flatnonzero(self.labels != UNKNOWN)
        rows = np.concatenate([np.arange(len(self.labels)), np.repeat(labelled, times)])
        return Data(self.images[rows], self.labels[rows])


def load(seed: int) -> tuple[Data, Data]:
    """Return the data to learn from, with 10 labels of each digit, and 500 images held out."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order].astype(np.float32), labels[order].astype(np.int32)
    seen = np.full(len(images) - 500, UNKNOWN, np.int32)
    for digit in range(CLASSES):
        seen[np.flatnonzero(labels[:-500] == digit)[:10]] = digit
    return Data(images[:-500], seen), Data(images[-500:], labels[-500:])


class Decoder(nnx.Module):
    """From the latents of an image to a logit for each pixel."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.Sequential(
            nnx.Linear(LATENT_SIZE, HIDDEN_SIZE, rngs=rngs),
            nnx.relu,
            nnx.Linear(HIDDEN_SIZE, HIDDEN_SIZE, rngs=rngs),
            nnx.relu,
            nnx.Linear(HIDDEN_SIZE, 64, rngs=rngs),
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return logits ``(batch, 64)``."""
        return self.layers(z)


def counts_out_of_16(logits: jax.Array) -> dist.Distribution:
    """Beta-Binomial counts; the smaller a pixel's concentration, the wider their spread."""
    concentration = jnp.exp(jnp.asarray(numpyro.param("log_concentration", jnp.full(64, 2.0))))
    probs = nnx.sigmoid(9 * jnp.tanh(logits / 9))  # so that neither concentration underflows
    return dist.BetaBinomial(concentration * probs, concentration * (1 - probs), 16)


def enumerate_class(name: str, size: int) -> Any:
    """Declare a discrete latent with ``size`` equally probable values, to be summed over."""
    fn = dist.Categorical(jnp.full(size, 1 / size))
    return numpyro.sample(name, fn, infer={"enumerate": "parallel"})  # a dict of its own


def make_model() -> Callable[..., None]:
    """The generative model: digit, style, latents, pixels."""
    decoder = Decoder(rngs=nnx.Rngs(0))
    shape = (CLASSES, STYLES, LATENT_SIZE)
    label_logits = jnp.where(jnp.eye(CLASSES) == 1, 0.0, WRONG)

    def small(rng_key: jax.Array) -> jax.Array:
        return 0.1 * jax.random.normal(rng_key, shape)  # no two alike, and labels do the rest

    def model(images: jax.Array, labels: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        centre: Any = numpyro.param("centre", small)
        spread = jnp.exp(jnp.asarray(numpyro.param("log_spread", jnp.zeros(shape))))
        with numpyro.plate("image", len(images)):
            digit = enumerate_class("digit", CLASSES)
            label = dist.Categorical(logits=label_logits[digit]).mask(labels != UNKNOWN)
            numpyro.sample("label", label, obs=jnp.maximum(labels, 0))
            style = enumerate_class("style", STYLES)
            prior = dist.Normal(centre[digit, style], spread[digit, style]).to_event(1)
            z = numpyro.sample("z", prior)
            numpyro.sample("pixels", counts_out_of_16(decode(z)).to_event(1), obs=images)

    return model


def train(data: Data, epochs: tuple[int, int]) -> Posterior:
    """Learn with many copies of what is labelled, then from the data as they are."""
    model = make_model()
    encoder = partial(MLP, hidden_sizes=(HIDDEN_SIZE, HIDDEN_SIZE), standardize=True)
    # The encoder sees no labels, so that it says the same of an image with and without.
    guide = AutoAmortizedNormal(model, encoder, inputs=lambda images, labels: images)
    params = None
    for given, num_epochs in zip((data.repeat_labelled(REPEATS), data), epochs, strict=True):
        steps = num_epochs * -(-len(given.labels) // 64)
        optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
        svi = SVI(model, guide, optimizer, TraceEnum_ELBO())
        result = fit(
            svi,
            jax.random.key(0),
            tuple(given),
            batch_size=64,
            num_epochs=num_epochs,
            init_params=params,
        )
        params = result.params
    return Posterior(guide, params)


def classify(posterior: Posterior, data: Data, particles: int) -> np.ndarray:
    """Return the probability of each digit, labels unseen."""
    found = posterior.probabilities(
        jax.random.key(1), tuple(data.without_labels()), 1, num_particles=particles
    )
    return found["digit"]


def report(probabilities: np.ndarray, train: Data, test: Data) -> None:
    """Print how many images held out are recognized, by us and from the labels alone."""
    labelled = train.labels != UNKNOWN
    right = {"this model": probabilities.argmax(1) == test.labels}
    baselines = {
        "nearest neighbour": KNeighborsClassifier(1),
        "logistic regression": LogisticRegression(max_iter=2000),
    }
    for name, classifier in baselines.items():
        classifier.fit(train.images[labelled], train.labels[labelled])
        right[name] = classifier.predict(test.images) == test.labels
    unlabelled = (~labelled).sum()
    print(f"\n{labelled.sum()} labels, {unlabelled} images without, {len(test.labels)} held out:")
    print("the share that is right, and how much larger the model's is, with the standard error")
    for name, hits in right.items():
        gain = right["this model"].astype(float) - hits
        error = gain.std() / np.sqrt(len(gain))
        difference = f"  {gain.mean():+6.1%} (se {error:.1%})" if gain.any() else ""
        print(f"  {name:<20}{hits.mean():6.1%}{difference}")
    print(f"The model itself expects to be right on {probabilities.max(1).mean():.1%} of them.")


def tile(images: np.ndarray, columns: int, above: int) -> np.ndarray:
    """Lay images ``(n, 64)`` out in rows, with white space between them, and more above each."""
    framed = np.pad(images.reshape(-1, 8, 8), ((0, 0), (above, 1), (2, 2)))
    height, width = framed.shape[1:]
    rows = framed.reshape(-1, columns, height, width).transpose(0, 2, 1, 3)
    return rows.reshape(-1, columns * width)


def draw_styles(posterior: Posterior, ax: Axes) -> None:
    """Draw the mean image at the centre of every digit and style."""
    decoder = make_decoder(posterior)
    means = np.asarray(jax.nn.sigmoid(decoder(jnp.asarray(posterior.params["centre"]))))
    ax.imshow(tile(means.transpose(1, 0, 2).reshape(-1, 64), CLASSES, above=1), cmap="gray_r")
    ax.set(title="What was learned: each digit, in three ways")
    ax.axis("off")


def make_decoder(posterior: Posterior) -> Decoder:
    """Return the decoder with what it has learned."""
    decoder = Decoder(rngs=nnx.Rngs(0))
    nnx.update(decoder, nnx.State(posterior.params["decoder$params"]))
    return decoder


def draw_unsure(probabilities: np.ndarray, test: Data, ax: Axes) -> None:
    """Draw the images held out that the model is least sure of, with its two best guesses."""
    unsure = np.argsort(probabilities.max(1))[:20]
    ax.imshow(tile(test.images[unsure], 10, above=5), cmap="gray_r")
    for place, row in enumerate(unsure):
        second, first = np.argsort(probabilities[row])[-2:]
        colour = "#0072B2" if first == test.labels[row] else "#D55E00"
        x, y = 12 * (place % 10) + 6, 14 * (place // 10) + 4
        ax.text(x, y, f"{first} or {second}", color=colour, fontsize=9, ha="center")
    ax.set(title="Least sure of (red: the first guess is wrong)")
    ax.axis("off")


def draw_confusion(probabilities: np.ndarray, test: Data, ax: Axes) -> None:
    """Draw which digits are taken for which."""
    table = np.zeros((CLASSES, CLASSES), int)
    np.add.at(table, (test.labels, probabilities.argmax(1)), 1)
    ax.imshow(np.sqrt(table), cmap="Blues")
    for (digit, taken), count in np.ndenumerate(table):
        if count:
            colour = "white" if count > 20 else "black"
            ax.text(taken, digit, str(count), ha="center", va="center", fontsize=8, color=colour)
    ticks = np.arange(CLASSES)
    ax.set(title="Held out", xlabel="taken for", ylabel="digit", xticks=ticks, yticks=ticks)


def draw_latents(posterior: Posterior, train: Data, test: Data, ax: Axes) -> None:
    """Draw the latents in the two directions in which the digits' centres differ most."""
    centre = np.asarray(posterior.params["centre"]).reshape(-1, LATENT_SIZE)
    directions = np.linalg.svd(centre - centre.mean(0), full_matrices=False)[2][:2].T
    for data, size, edge in ((test.without_labels(), 8, "none"), (train, 40, "black")):
        known = data.labels != UNKNOWN
        shown = data.labels[known] if known.any() else test.labels
        rows = Data(data.images[known], data.labels[known]) if known.any() else data
        z = posterior.encode(tuple(rows))["z"].loc @ directions
        ax.scatter(*z.T, c=shown, cmap="tab10", s=size, edgecolors=edge, linewidths=0.7)
    ax.set(title="Latents: held out, and (ringed) labelled", xticks=[], yticks=[])


def picture(
    posterior: Posterior, probabilities: np.ndarray, train: Data, test: Data, path: Path
) -> None:
    """One picture of everything."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplot_mosaic("SU;LC", height_ratios=[1, 2])
    draw_styles(posterior, axes["S"])
    draw_unsure(probabilities, test, axes["U"])
    draw_latents(posterior, train, test, axes["L"])
    draw_confusion(probabilities, test, axes["C"])
    figure.savefig(path, dpi=110)


def save(posterior: Posterior, test: Data, num_samples: int, path: Path) -> None:
    """Write what ArviZ reads, then open it again and ask which digits were drawn."""
    tree = posterior.to_datatree(
        jax.random.key(2), tuple(test.without_labels()), num_samples, num_particles=4
    )
    tree.to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")
        hits = (tree.posterior["digit"].values == test.labels).mean()
        print(f"A digit drawn for an image held out is the right one with probability {hits:.1%}.")


def main() -> None:
    """Train, classify, compare, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=4, help="which images are labelled, held out")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    train_data, test = load(args.seed)
    posterior = train(train_data, (1, 1) if args.quick else (40, 80))
    probabilities = classify(posterior, test, particles=2 if args.quick else 20)
    report(probabilities, train_data, test)
    picture(posterior, probabilities, train_data, test, args.output / "semi_supervised.png")
    shown = Data(test.images[:50], test.labels[:50])
    save(posterior, shown, 20 if args.quick else 100, args.output / "semi_supervised.nc")


if __name__ == "__main__":
    main()
