"""What guides of an MNIST model lose of the evidence, and what simulations bring back.

    python benchmarks/mnist_gaps.py --data binarized_mnist.npz [--epochs 1000] [--steps 30000]
        [--rate 2e-3] [--decays 0.1,0.01] [--standardize]

The images of published tables are those of Larochelle and Murray (2011), binarized once: an .npz
with ``train``, ``valid`` and ``test``, a row of 784 pixels each, or of 98 bytes that hold them.
Grey ones, as for `mnist_elbo.py`, are binarized here. The model is 40-400-784, with ReLU, and its
encoder 784-400-40.

``bound``: model and guide are trained by the plain ELBO on the rows of ``train`` and ``valid``,
with weight decay, without which the encoder learns these rows by heart. The encoder reads the
pixels as they are unless ``--standardize`` is given. The ELBO and the evidence of the test rows,
from 200 draws each, before and after the guide alone is trained on simulations and data in equal
parts.

``gaps``: to the model as it is after 60 epochs, a guide of full covariance with a residual encoder,
trained on simulations and a few data. On 500 test rows: its gaps (Cremer, Li and Duvenaud, 2018),
the shares of verdicts, and what `repair` mends without NUTS.
"""

import argparse
import time
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from mnist_elbo import binarized
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, TraceMeanField_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Posterior,
    ResidualMLP,
    Simulations,
    fit,
)
from numpyro_vae.checks import Gap, Importance
from numpyro_vae.objectives import ImportanceWeightedELBO

PIXELS, HIDDEN, LATENT, BATCH, CHECKED = 784, 400, 40, 128, 500
NATURAL_STEPS = 0, 1, 2, 4
VERDICTS = ("fine", "reweight", "borderline", "not to be trusted")


class Setting(NamedTuple):
    """How model and guide are trained together."""

    rate: float = 2e-3
    encoder_decay: float = 0.1
    decoder_decay: float = 0.01
    standardize: bool = False

    @property
    def decay(self):
        return decay("auto", self.encoder_decay), decay("decoder", self.decoder_decay)

    @property
    def encoder(self):
        return partial(
            MLP, hidden_sizes=(HIDDEN,), activation=jax.nn.relu, standardize=self.standardize
        )


FEW_EPOCHS = Setting(1e-3, 0.0, 0.0, standardize=True)


def make_model(seed=0):
    """Return the model; the first weights of its decoder are those of a seed."""
    decoder = nnx.Sequential(
        nnx.Linear(LATENT, HIDDEN, rngs=nnx.Rngs(2 * seed)),
        nnx.relu,
        nnx.Linear(HIDDEN, PIXELS, rngs=nnx.Rngs(2 * seed + 1)),
    )

    def model(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("image", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    return model


def load(path):
    """Return binary images to train with and to test with; few random ones without a path."""
    if path is None:
        rng = np.random.default_rng(0)
        return tuple(rng.binomial(1, 0.2, (n, PIXELS)).astype(np.float32) for n in (256, 8))
    with np.load(path) as file:
        if "x_train" in file:
            return tuple(map(np.asarray, binarized(path, 60_000, 10_000)))
        parts = {name: file[name] for name in ("train", "valid", "test")}
    pixels = {name: x if x.shape[1] == PIXELS else np.unpackbits(x, 1) for name, x in parts.items()}
    train = np.concatenate([pixels["train"], pixels["valid"]])
    return train.astype(np.float32), pixels["test"].astype(np.float32)


def decay(start, strength):
    """Return the decay of the kernels of a network, whose parameters' names begin with `start`."""

    def mask(params):
        return jax.tree.map_with_path(
            lambda path, x: path[0].key.startswith(start) and x.ndim == 2, params
        )

    return optax.add_decayed_weights(strength, mask)


def train(guide, loss, data, steps, batch_size=BATCH, rate=1e-3, decay=(), seed=0, **options):
    """Train for about so many steps, with a rate that falls to zero."""
    rows = data.num_data if isinstance(data, Simulations) else len(data)
    epochs = max(round(steps * batch_size / rows), 1)
    warmup = min(200, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps)
    adam = optax.scale_by_adam(eps=1e-4), *decay, optax.scale_by_learning_rate(schedule)
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), *adam)
    svi = SVI(guide.model, guide, optimizer, loss)
    options |= {"batch_size": batch_size, "num_epochs": epochs, "progress_bar": False}
    start = time.perf_counter()
    result = fit(svi, jax.random.key(seed), data, **options)
    print(f"  {epochs} epochs, {time.perf_counter() - start:.0f} s", flush=True)
    return result


def simulations(data, steps, real_fraction):
    """Return a source of ten epochs, all drawn anew after each."""
    number = max(steps * BATCH // 10, BATCH)
    return Simulations(number, like=data, real_fraction=real_fraction)


def together(loss, x, epochs, setting, seed=0):
    """Train model and guide on rows."""
    guide = AutoAmortizedNormal(make_model(seed), setting.encoder)
    steps = epochs * -(-len(x) // BATCH)
    options = {"rate": setting.rate, "decay": setting.decay, "seed": seed}
    return guide, train(guide, loss, x, steps, **options)


def bound(x, test, epochs, steps, setting):
    guide, result = together(TraceMeanField_ELBO(), x, epochs, setting)
    print_bound(f"{epochs} epochs", Posterior(guide, result), test)
    stepped = Posterior(guide, result, natural_steps=NATURAL_STEPS[-1])
    print_bound("and natural steps", stepped, test)
    source, start = simulations(x, steps, 0.5), {"init_params": result.params, "freeze": "model"}
    result = train(guide, TraceMeanField_ELBO(), source, steps, rate=5e-4, **start)
    print_bound("and simulations", Posterior(guide, result), test)


def print_bound(name, posterior, test):
    """Print the ELBO and the evidence of rows; return the evidence of each."""
    checks = (Importance(num_samples=200),)
    found = posterior.check(jax.random.key(1), test, checks, progress_bar=False).dataset
    error = found["log_evidence"].std().item() / len(test) ** 0.5
    elbo, evidence = (-found[name].mean().item() for name in ("elbo", "log_evidence"))
    print(
        f"  {name:<18} -ELBO {elbo:.2f}, -evidence {evidence:.2f} (se {error:.2f}) nats", flush=True
    )
    return found["log_evidence"].values


def gaps(x, test, epochs, steps, width):
    small, result = together(TraceMeanField_ELBO(), x, epochs, FEW_EPOCHS)
    rows = np.random.default_rng(0).choice(len(test), min(CHECKED, len(test)), replace=False)
    _judge("independent Normals, 784-400-40", small, result, test[rows])
    encoder = partial(ResidualMLP, hidden_size=width, num_blocks=3)
    guide = AutoAmortizedMultivariateNormal(small.model, encoder)
    params = {name: x for name, x in result.params.items() if name.startswith("decoder")}
    source = simulations(x, steps, 0.3)
    start = {"init_params": params, "freeze": "model"}
    result = train(guide, ImportanceWeightedELBO(1, "stl"), source, steps, **start)
    _judge(f"full covariance, residual, {width} wide", guide, result, test[rows])


def _judge(name, guide, result, x):
    """Print the gaps of rows with and without steps of their own, and what repair mends."""
    print(f"  {name}")
    for number in NATURAL_STEPS:
        posterior = Posterior(guide, result, natural_steps=number)
        posterior.encode(x)
        start = time.perf_counter()
        posterior.encode(x)
        cost = 1e3 * (time.perf_counter() - start) / len(x)
        print(f"    {number} natural-gradient steps, {cost:.2f} ms a row: ", end="")
        _print_gaps(posterior, x)
    report = posterior.check(jax.random.key(2), x, "importance", progress_bar=False)
    start = time.perf_counter()
    repaired = posterior.repair(jax.random.key(3), x, report, method="refine")
    share, seconds = repaired.dataset["passed"].mean().item(), time.perf_counter() - start
    print(f"    repaired without NUTS: {share:.1%} of {len(repaired.rows)} rows, {seconds:.0f} s")


def _print_gaps(posterior, x):
    checks = Importance(), Gap(max_rows=len(x))
    report = posterior.check(jax.random.key(1), x, checks, progress_bar=False)
    shares = [f"{name} {(report.verdict == n).mean():.1%}" for n, name in enumerate(VERDICTS)]
    means = [
        f"{part} gap {np.nanmean(report.dataset[f'gap_{part}'].values):.2f}"
        for part in ("amortization", "approximation")
    ]
    print(f"{', '.join(shares)}; {', '.join(means)} nats", flush=True)


def parse(parser):
    """Add what says how model and guide are trained; return all options and the setting."""
    best = Setting()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="an .npz with train, valid and test")
    source.add_argument("--smoke", action="store_true", help="few random images: does it run?")
    parser.add_argument("--rate", type=float, default=best.rate)
    decays = f"{best.encoder_decay},{best.decoder_decay}"
    parser.add_argument("--decays", default=decays, help="of the encoder's and decoder's weights")
    parser.add_argument("--standardize", action="store_true", help="the encoder's pixels")
    args = parser.parse_args()
    encoder_decay, decoder_decay = map(float, args.decays.split(","))
    return args, Setting(args.rate, encoder_decay, decoder_decay, args.standardize)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="bound,gaps")
    parser.add_argument("--epochs", type=int, default=1000, help="of the part `bound`")
    parser.add_argument("--steps", type=int, default=30_000, help="on simulations")
    parser.add_argument("--width", type=int, default=512, help="of the residual encoder")
    args, setting = parse(parser)
    x, test = load(args.data)
    if args.smoke:
        args.epochs, args.steps, args.width, few = 1, 20, 16, 1
    else:
        few = 60
    if "bound" in args.parts:
        print("\nbounds of test rows, plain ELBO")
        bound(x, test, args.epochs, args.steps, setting)
    if "gaps" in args.parts:
        print("\na guide of full covariance")
        gaps(x, test, few, args.steps, args.width)


if __name__ == "__main__":
    main()
