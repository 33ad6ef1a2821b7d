"""What a checkpoint costs a fit: how long training waits, and what writing takes beside it.

    python benchmarks/checkpoints.py [--repeats 20]

The state is that of the VAE of `epoch.py`, with Adam's moments. A checkpoint is written in the
background: training waits until the state has been copied, and what writing takes of the cores it
takes from training. Both are given in percent of an epoch of ten seconds.
"""

import argparse
import tempfile
import time

import jax
import numpy as np
from epoch import LARGE, TINY
from vae import make_model, make_svi, random_pixels

from numpyro_vae import Checkpoints, fit
from numpyro_vae.training.checkpoints import CheckpointFolder
from numpyro_vae.training.progress import Progress

EPOCH = 10.0  # seconds


def cost_of_checkpoints(result, repeats):
    """Return the seconds that each of some checkpoints is waited for, and those of all cores."""
    found = []
    with tempfile.TemporaryDirectory() as path:
        progress = Progress(result.state)
        with CheckpointFolder(Checkpoints(path, every_minutes=0.0), {}, progress) as folder:
            for _ in range(repeats):
                progress.add(result.state, result.losses, {})
                clock, cores = time.perf_counter(), time.process_time()
                folder.after_epoch()
                waited = time.perf_counter() - clock
                folder.manager.wait_until_finished()
                found.append((waited, time.process_time() - cores))
    return np.array(found)[1:]  # the first imports and makes what the others use


def report(sizes, repeats):
    svi = make_svi(make_model(sizes), sizes)
    x = random_pixels(sizes._replace(num_data=2 * sizes.batch_size))
    options = {"batch_size": sizes.batch_size, "num_epochs": 1, "progress_bar": False}
    result = fit(svi, jax.random.key(0), x, **options)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(result.state)) / 1e6
    waited, cores = np.median(cost_of_checkpoints(result, repeats), axis=0)
    print(f"a checkpoint of {size:.1f} MB, in the median of {repeats - 1}")
    for name, seconds in (("training waits", waited), ("all cores, in all", cores)):
        print(f"  {name:20} {1e3 * seconds:7.1f} ms, {seconds / EPOCH:.2%} of ten seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    report(*((TINY, 3) if args.smoke else (LARGE, args.repeats)))


if __name__ == "__main__":
    main()
