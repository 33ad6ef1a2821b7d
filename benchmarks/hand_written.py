"""NumPyro's examples ``vae.py`` and ``prodlda.py``, with their guides and with the library's.

    python benchmarks/hand_written.py --data mnist.npz --documents ap.npz

Of each program the model, the network, the optimizer, the batch size and the number of epochs stay
as they are; the guide written by hand, and the loop that trains it, are replaced. The VAE's network
is the very same. ProdLDA's guide is a Dirichlet distribution, and the library's a Normal on the
unconstrained scale: the layers before the last are the same. It prints the ELBO of rows held out
and the seconds of an epoch, both programs timed in turn.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import mnist_elbo as vae
import numpy as np
import optax
import prodlda
from library import library_epoch
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from timing import interleave, report

from numpyro_vae import AutoAmortizedNormal, fit

BY_HAND, LIBRARY = "by hand", "numpyro_vae"


class Program(NamedTuple):
    """A program to be trained in both ways.

    Attributes:
        svis: makes, by the name of the way, what is to be trained.
        epoch: compiles an epoch of the loop written by hand, ``(state, rng_key) -> state``.
        evaluated: the model's keyword arguments where it is evaluated.
        train: rows to train with.
        test: rows held out.
        batch_size: rows of a step.
        num_epochs: how often training sees each row.
    """

    svis: dict[str, Callable[[], SVI]]
    epoch: Callable[[SVI, jax.Array, int], Callable[..., Any]]
    evaluated: dict[str, Any]
    train: jax.Array
    test: jax.Array
    batch_size: int
    num_epochs: int


def shuffled_epoch(svi: SVI, x: jax.Array, batch_size: int) -> Callable[..., Any]:
    """An epoch over rows in a random order, as of ``vae.py``; what fills no batch is left out."""
    num_steps = len(x) // batch_size

    @jax.jit
    def epoch(state, rng_key, x):
        order = jax.random.permutation(rng_key, len(x))[: num_steps * batch_size]
        rows = order.reshape(num_steps, batch_size)
        return jax.lax.scan(lambda state, rows: svi.update(state, x[rows]), state, rows)[0]

    return lambda state, rng_key: epoch(state, rng_key, x)


def subsampled_epoch(svi: SVI, x: jax.Array, batch_size: int) -> Callable[..., Any]:
    """An epoch as ``svi.run`` makes it, as of ``prodlda.py``: the plate draws rows in each step."""
    num_steps = -(-len(x) // batch_size)

    @jax.jit
    def epoch(state, x):
        return jax.lax.scan(lambda state, _: svi.update(state, x), state, length=num_steps)[0]

    return lambda state, rng_key: epoch(state, x)


def first_state(program: Program, svi: SVI, seed: int) -> Any:
    """Return the state from which the loop written by hand starts."""
    rows = program.train
    if program.epoch is shuffled_epoch:
        rows = rows[: program.batch_size]
    return svi.init(jax.random.key(seed), rows)


def train_by_hand(program: Program, seed: int) -> tuple[dict[str, Any], Any]:
    """Return parameters, with the network's state among them, and the guide."""
    svi = program.svis[BY_HAND]()
    state = first_state(program, svi, seed)
    epoch = program.epoch(svi, program.train, program.batch_size)
    for rng_key in jax.random.split(jax.random.key(seed + 1), program.num_epochs):
        state = epoch(state, rng_key)
    return {**svi.get_params(state), **(state.mutable_state or {})}, svi.guide


def train_by_library(program: Program, seed: int) -> tuple[dict[str, Any], Any]:
    """Return parameters, with the network's state among them, and the guide."""
    svi = program.svis[LIBRARY]()
    result = fit(
        svi,
        jax.random.key(seed),
        program.train,
        batch_size=program.batch_size,
        num_epochs=program.num_epochs,
        progress_bar=False,
    )
    return result.params, svi.guide.eval()


def held_out(program: Program, params: dict[str, Any], svi: SVI, guide: Any) -> tuple[float, float]:
    """Return the ELBO in nats a datum, one particle at a time, and its Monte Carlo error."""

    @jax.jit
    def elbo(rng_key, x):
        loss = Trace_ELBO().loss(rng_key, params, svi.model, guide, x, **program.evaluated)
        return -loss / len(x)

    found = [elbo(rng_key, program.test) for rng_key in jax.random.split(jax.random.key(99), 16)]
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found)))


def compare(title: str, program: Program, seeds: int, repeats: int) -> None:
    """Train in both ways, print ELBOs, and then time epochs in turn."""
    print(f"\n{title}: held-out ELBO after {program.num_epochs} epochs, nats a datum", flush=True)
    for seed in range(seeds):
        for name, train in ((BY_HAND, train_by_hand), (LIBRARY, train_by_library)):
            params, guide = train(program, seed)
            elbo, error = held_out(program, params, program.svis[name](), guide)
            print(f"  seed {seed}  {name:<14}{elbo:10.3f}  (se {error:.3f})", flush=True)
    svi, x, size = program.svis[BY_HAND](), program.train, program.batch_size
    state, epoch = first_state(program, svi, 0), program.epoch(svi, x, size)
    rng_key = jax.random.key(1)
    runs = {
        BY_HAND: lambda: jax.block_until_ready(epoch(state, rng_key)),
        LIBRARY: library_epoch(program.svis[LIBRARY](), np.asarray(x), size),
    }
    report(f"{title}: an epoch", interleave(runs, repeats), BY_HAND)


def same_weights(program: Program) -> None:
    """Print how far losses and gradients of the two guides of the VAE are apart, weights alike."""
    rng_key, x = jax.random.key(0), program.train[: program.batch_size]
    by_hand, svi = program.svis[BY_HAND](), program.svis[LIBRARY]()
    params = by_hand.get_params(by_hand.init(rng_key, x))
    theirs = svi.get_params(svi.init(rng_key, x))
    weights = jax.tree.leaves(params["encoder$params"])
    renamed = jax.tree.unflatten(jax.tree.structure(theirs["auto$params"]), weights)
    ours = {"auto$params": renamed, "decoder$params": params["decoder$params"]}
    found = (gradients(by_hand, rng_key, params, x), gradients(svi, rng_key, ours, x))
    loss, *others = (
        float(abs(one - other).max() / abs(one).max()) for one, other in zip(*found, strict=True)
    )
    print(f"\nVAE, the same weights: losses differ by {loss:.0e}, gradients by {max(others):.0e}")


def gradients(svi: SVI, rng_key: jax.Array, params: dict[str, Any], x: jax.Array) -> list[Any]:
    """Return the loss of a batch, and its gradient: the decoder's and the encoder's."""

    def loss(params):
        return svi.loss.loss(rng_key, params, svi.model, svi.guide, x)

    value, found = jax.jit(jax.value_and_grad(loss))(params)
    decoder = found.pop("decoder$params")
    return [value, *jax.tree.leaves(decoder), *jax.tree.leaves(found)]


def vae_program(path: str | None, num_train: int, num_test: int, num_epochs: int) -> Program:
    """NumPyro's VAE of MNIST, binarized once."""

    def svi(guide):
        return SVI(vae.model, guide, optax.adam(1e-3), Trace_ELBO())

    train, test = vae.binarized(path, num_train, num_test)
    svis = {
        BY_HAND: lambda: svi(vae.hand_written_guide),
        LIBRARY: lambda: svi(AutoAmortizedNormal(vae.model, vae.encoder(), scale="scale")),
    }
    return Program(svis, shuffled_epoch, {}, train, test, vae.BATCH, num_epochs)


def prodlda_program(path: str | None, sizes: prodlda.Sizes, num_epochs: int) -> Program:
    """NumPyro's topic model of documents."""
    train, test, sizes = prodlda.load(path, sizes)
    model = prodlda.make_model(sizes)

    def svi(guide):
        return SVI(model, guide, optax.adam(1e-3), TraceMeanField_ELBO(), is_training=True)

    svis = {
        BY_HAND: lambda: svi(prodlda.make_guide(sizes)),
        LIBRARY: lambda: svi(AutoAmortizedNormal(model, prodlda.Trunk(sizes.hidden))),
    }
    evaluated = {"is_training": False}
    return Program(svis, subsampled_epoch, evaluated, train, test, sizes.batch_size, num_epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz of MNIST with x_train and x_test")
    parser.add_argument("--documents", help="an .npz with a sparse matrix of counts of words")
    parser.add_argument("--smoke", action="store_true", help="random data, few: does it run?")
    parser.add_argument("--epochs", type=int, default=10, help="of the VAE")
    parser.add_argument("--passes", type=int, default=50, help="epochs of the topic model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if args.smoke:
        program = vae_program(None, 2 * vae.BATCH, vae.BATCH, 1)
        same_weights(program)
        compare("VAE", program, 1, 1)
        compare("ProdLDA", prodlda_program(None, prodlda.TINY, 1), 1, 1)
    if args.data:
        program = vae_program(args.data, 20_000, 10_000, args.epochs)
        same_weights(program)
        compare("VAE", program, args.seeds, args.repeats)
    if args.documents:
        program = prodlda_program(args.documents, prodlda.AP, args.passes)
        compare("ProdLDA", program, args.seeds, args.repeats)


if __name__ == "__main__":
    main()
