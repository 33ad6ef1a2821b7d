"""Data and results larger than memory: what a row costs, and the most memory that is held.

    python benchmarks/larger_than_memory.py [--folder /tmp] [--rows 2600000] [--narrow 10000000]

Pixels are written to a Zarr without compression, 3,136 bytes a row. `fit` goes over them once,
and then over some of them in turn with as many in memory. `to_datatree` and the quick checks, of
a model with two latents and the first 16 pixels, read them and write to stores. Rows of two numbers
show whether a row costs the same however many there are.

Each is a process of its own, whose largest resident memory is given. To see that it needs no more,
run it in a memory cgroup of 2 GiB.
"""

import argparse
import itertools
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import zarr
from timing import interleave, report
from vae import Sizes, make_model, make_svi

from numpyro_vae import Importance, Posterior, fit

PIXELS = 784
NETWORK = Sizes(num_data=60_000, pixels=PIXELS, hidden=400, latent=40, batch_size=128)
SMALL_NETWORK = NETWORK._replace(hidden=16, latent=2)
REPEATS = 7
CHUNK = 2_048  # rows in a file
CHECKS = (Importance(num_samples=100), "collapse", "predictive")
NUM_DRAWS, NUM_OBSERVED = 10, 16
KEY = jax.random.key(0)


def write_pixels(path, num_rows):
    rng = np.random.default_rng(0)
    shape, chunks = (num_rows, PIXELS), (min(CHUNK, num_rows), PIXELS)
    stored = zarr.create_array(path, shape=shape, chunks=chunks, dtype="f4", compressors=None)
    for start in range(0, num_rows, CHUNK):
        size = min(CHUNK, num_rows - start)
        stored[start : start + size] = rng.random((size, PIXELS), np.float32) < 0.3


def write_narrow(path, num_rows):
    rng, size = np.random.default_rng(0), 2**16
    shape, chunks = (num_rows, 2), (min(size, num_rows), 2)
    stored = zarr.create_array(path, shape=shape, chunks=chunks, dtype="f4", compressors=None)
    for start in range(0, num_rows, size):
        stored[start : start + size] = rng.normal(size=(min(size, num_rows - start), 2))


def linear_model(x):
    x = x[:, :NUM_OBSERVED]
    weights = numpyro.param("weights", jnp.ones((2, x.shape[1])) / 2)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weights, 1.0).to_event(1), obs=x)


def told(name, seconds, num_rows):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cost = 1e6 * seconds / num_rows
    print(f"  {name:34} {num_rows:>10,} rows {seconds:7.0f} s {cost:8.2f} us a row, ", end="")
    print(f"at most {peak:.2f} GiB", flush=True)


class Slice:
    """Consecutive rows of an array on disk, which is an array on disk itself."""

    def __init__(self, stored, start, num_rows):
        self.stored, self.start, self.ndim, self.dtype = stored, start, 2, stored.dtype
        self.shape, self.chunks = (num_rows, PIXELS), stored.chunks

    def __array__(self, dtype=None, copy=None):
        return self[: len(self)]

    def __getitem__(self, key):
        rows = key[0] if isinstance(key, tuple) else key
        return self.stored[self.start + rows.start : self.start + rows.stop]


def run_fit(path, num_rows):
    """Fit once to all rows, and then in turn to as many of them on disk and in memory."""
    stored = zarr.open_array(path, mode="r")
    number = min(NETWORK.num_data, num_rows // 2)
    sizes = NETWORK._replace(num_data=number)
    options = {"batch_size": sizes.batch_size, "progress_bar": False, "num_epochs": 1}
    svis = {name: make_svi(make_model(sizes), sizes) for name in ("in memory", "on disk")}
    start = time.perf_counter()
    fit(make_svi(make_model(sizes), sizes), KEY, stored, **options)
    told("fit, compiling and all", time.perf_counter() - start, num_rows)
    starts = itertools.cycle(range(0, num_rows - number + 1, number))
    known, slices = stored[:number], (Slice(stored, start, number) for start in starts)
    runs = {
        "in memory": lambda: fit(svis["in memory"], KEY, known, **options),
        "on disk": lambda: fit(svis["on disk"], KEY, next(slices), **options),
    }
    report(f"a fit of {number:,} rows", interleave(runs, REPEATS), "in memory")


def posterior_of(stored):
    svi = make_svi(linear_model, SMALL_NETWORK)
    return Posterior(svi.guide, fit(svi, KEY, stored[:2_000], num_epochs=1, progress_bar=False))


def run_tree(path, num_rows):
    stored = zarr.open_array(path, mode="r")
    posterior, start = posterior_of(stored), time.perf_counter()
    options = {"groups": ("posterior", "sample_stats"), "store": f"{path}.tree"}
    tree = posterior.to_datatree(KEY, stored, NUM_DRAWS, **options)
    told(f"to_datatree(store=), {NUM_DRAWS} draws", time.perf_counter() - start, num_rows)
    assert tree.posterior["z"].shape == (1, NUM_DRAWS, num_rows, 2)


def run_check(path, num_rows):
    stored = zarr.open_array(path, mode="r")
    posterior, start = posterior_of(stored), time.perf_counter()
    report = posterior.check(KEY, stored, CHECKS, progress_bar=False, store=f"{path}.report")
    told("check(store=), 100 draws", time.perf_counter() - start, num_rows)
    assert len(report.verdict) == num_rows


STEPS = {"fit": run_fit, "tree": run_tree, "check": run_check}


def run_alone(step, path, num_rows):
    """Run a step in a process of its own, and remove what it wrote."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(path)]
    try:
        subprocess.run([*command, "--rows", str(num_rows)], check=True, env=dict(os.environ))
    finally:
        for suffix in ("tree", "report", "tree.partial", "report.partial"):
            shutil.rmtree(f"{path}.{suffix}", ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where 20 GB are free")
    parser.add_argument("--rows", type=int, default=2_600_000, help="of pixels, 3,136 bytes each")
    parser.add_argument("--narrow", type=int, default=10_000_000, help="rows of two numbers")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        STEPS[args.step](args.folder, args.rows)
        return
    if args.smoke:
        args.rows, args.narrow = 2_100, 30_000
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = pathlib.Path(folder) / "pixels"
        write_pixels(path, args.rows)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(f"pixels: {size / 1e9:.2f} GB on disk", flush=True)
        for step in STEPS:
            run_alone(step, path, args.rows)
        shutil.rmtree(path)
        print("rows of two numbers", flush=True)
        for number in (args.narrow // 100, args.narrow // 10, args.narrow):
            path = pathlib.Path(folder) / f"narrow{number}"
            write_narrow(path, number)
            for step in ("tree", "check") if number < args.narrow or args.smoke else ("tree",):
                run_alone(step, path, number)
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
