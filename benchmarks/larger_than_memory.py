"""Data and results larger than memory: what a row costs, and the most memory that is held.

    python benchmarks/larger_than_memory.py [--folder /tmp] [--rows 2600000] [--narrow 10000000]

Pixels are written to a Zarr without compression, 3,136 bytes a row. `fit` goes over them once,
between two fits of rows in memory with which it is compared. `to_datatree` and the quick checks, of
a model with two latents and the first 16 pixels, read them and write to stores. Rows of two numbers
show whether a row costs the same however many there are.

Each is a process of its own, whose largest resident memory is given. To see that it needs no more,
run it in a memory cgroup of 2 GiB.
"""

import argparse
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
from vae import Sizes, make_model, make_svi

from numpyro_vae import Importance, Posterior, fit

PIXELS = 784
NETWORK = Sizes(num_data=60_000, pixels=PIXELS, hidden=400, latent=40, batch_size=128)
SMALL_NETWORK = NETWORK._replace(hidden=16, latent=2)
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


def timed_fit(sizes, data, num_epochs):
    """Fit, and return the seconds of each epoch after the first."""
    svi, ends = make_svi(make_model(sizes), sizes), []
    options = {"batch_size": sizes.batch_size, "progress_bar": False, "num_epochs": num_epochs}
    fit(svi, KEY, data, callbacks=[lambda *_: ends.append(time.perf_counter())], **options)
    return np.diff(ends)


def run_fit(path, num_rows):
    stored = zarr.open_array(path, mode="r")
    sizes = NETWORK._replace(num_data=min(NETWORK.num_data, num_rows))
    known = stored[: sizes.num_data]
    before = timed_fit(sizes, known, 4)
    start = time.perf_counter()
    timed_fit(sizes, stored, 1)
    seconds = time.perf_counter() - start
    after = timed_fit(sizes, known, 4)
    told("fit on disk, compiling and all", seconds, num_rows)
    for name, epochs in (("in memory, before it", before), ("in memory, after it", after)):
        told(name, np.median(epochs), sizes.num_data)
    memory = np.median([*before, *after]) / sizes.num_data
    print(
        f"  a row on disk costs {seconds / num_rows / memory:.3f} times one in memory", flush=True
    )


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
        for number in sorted(
            {max(args.narrow // 100, 2_100), max(args.narrow // 10, 2_100), args.narrow}
        ):
            path = pathlib.Path(folder) / f"narrow{number}"
            write_narrow(path, number)
            for step in ("tree", "check") if number < args.narrow or args.smoke else ("tree",):
                run_alone(step, path, number)
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
