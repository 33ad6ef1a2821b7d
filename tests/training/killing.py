"""Trains with checkpoints, is killed at random moments and started again, and compares.

    python tests/training/killing.py [--kills 50] [--seed 0]

Its result must be that of a fit that was not interrupted, bit for bit. Each start is a process of
its own, with another order of Python's sets.
"""

import argparse
import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, Checkpoints, fit

NUM_EPOCHS = 30
X = np.random.default_rng(0).normal(1.0, 2.0, (90, 3)).astype(np.float32)
STARTED = "started"
LAST = 4.0  # seconds after the first epoch within which a fit is killed


class Network(nnx.Module):
    """Integer names, batch statistics, and random keys of dropout."""

    def __init__(self, example_inputs, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, inputs):
        for layer in self.layers:
            inputs = nnx.relu(layer(inputs))
        return self.dropout(self.norm(inputs))


def model(x):
    loc = numpyro.sample("loc", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    noise = numpyro.param("noise", jnp.ones(()), constraint=dist.constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        numpyro.sample("x", dist.Normal(z * scale[:, None], noise).to_event(1), obs=x)


def train(checkpoint=None, *, num_epochs=NUM_EPOCHS, data=X[:80], validation=X[80:], **options):
    """Fit with everything that a checkpoint has: schedule, early stopping, state, dropout."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 200))
    svi = SVI(model, AutoAmortizedNormal(model, Network), optimizer, Trace_ELBO())
    options = {"batch_size": 32, "patience": 25, "progress_bar": False} | options
    options |= {"validation": validation, "num_epochs": num_epochs, "checkpoint": checkpoint}
    return fit(svi, jax.random.key(0), data, **options)


def numbers(result) -> list[np.ndarray]:
    """All that a result has, as arrays."""
    leaves = jax.tree.leaves((result.params, result.state, result.losses, result.history))
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    pairs = zip(leaves, is_key, strict=True)
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in pairs]


def assert_same(result, expected) -> None:
    assert len(result) == len(expected)
    for one, other in zip(result, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


def run(folder: str, out: str) -> None:
    """Train in this process, slowly, and say when it has begun."""

    def slowly(epoch, state, metrics):
        print(STARTED, flush=True)
        time.sleep(0.1)

    checkpoint = None if folder == "none" else Checkpoints(folder, every_minutes=0.0)
    result = train(checkpoint, callbacks=[] if checkpoint is None else [slowly])
    np.savez(out, *numbers(result))


def start(folder, out) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", __file__, "--run", str(folder), str(out)]
    root = pathlib.Path(__file__).parent.parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "random"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def load(path) -> list[np.ndarray]:
    with np.load(path) as found:
        return [found[name] for name in found]


def kill_and_compare(folder: pathlib.Path, kills: int, seed: int) -> int:
    """Kill so many fits, and return how many have been completed, each with the same result."""
    rng, completed = random.Random(seed), 0
    start("none", folder / "expected.npz").communicate()
    expected = load(folder / "expected.npz")
    while kills or not completed:
        process = start(folder / "checkpoints", folder / "result.npz")
        process.stdout.readline()  # of the first epoch, if there is one
        if kills:
            time.sleep(rng.uniform(0.0, LAST))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills -= 1
        process.communicate()
        if process.returncode == 0:
            assert_same(load(folder / "result.npz"), expected)
            shutil.rmtree(folder / "checkpoints")
            completed += 1
        elif process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"training ended with status {process.returncode}")
    return completed


def fill(path: str) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def train_on_full_disk(folder: str) -> None:
    """Train on a disk that is full after the first checkpoint, and go on when it is not."""
    path, filler, epochs = f"{folder}/checkpoints", f"{folder}/filler", []
    train(path, num_epochs=3)
    fill(filler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = train(path, num_epochs=6)
    told = "\n".join(str(warning.message) for warning in caught)
    assert re.search("could not be written.*the last checkpoint is the one after epoch 3", told)
    assert_same(numbers(first), numbers(train(num_epochs=6)))
    os.remove(filler)
    again = train(path, num_epochs=9, callbacks=[lambda epoch, *_: epochs.append(epoch)])
    assert epochs == list(range(3, 9))
    assert_same(numbers(again), numbers(train(num_epochs=9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "OUT"), help="train, in this process")
    parser.add_argument("--full-disk", metavar="FOLDER", help="train in a folder of little room")
    args = parser.parse_args()
    if args.full_disk:
        return train_on_full_disk(args.full_disk)
    if args.run:
        return run(*args.run)
    with tempfile.TemporaryDirectory() as folder:
        completed = kill_and_compare(pathlib.Path(folder), args.kills, args.seed)
    print(f"{args.kills} kills, {completed} fits completed, each with the same bits")


if __name__ == "__main__":
    main()
