"""What checkpoints cost a fit: an epoch of ten seconds, without them and with one after each epoch.

    python benchmarks/checkpoints.py [--seconds 10] [--epochs 2]

The model is that of `epoch.py`, of as many data as fill an epoch. Fits without and with checkpoints
take turns, and their seconds are those of the clock, and of all cores, as writing goes on beside
training.
"""

import argparse
import tempfile
import time
from dataclasses import replace

import jax
import numpy as np
from epoch import LARGE, TINY
from vae import make_model, make_svi, random_pixels

from numpyro_vae import Checkpoints, fit


def timed_fit(sizes, x, num_epochs, checkpoint):
    """Return the seconds of each epoch but the first: of the clock, and of all cores."""
    marks = []

    def mark(epoch, state, metrics):
        jax.block_until_ready(state)
        marks.append((time.perf_counter(), time.process_time()))

    svi = make_svi(make_model(sizes), sizes)
    options = {"batch_size": sizes.batch_size, "num_epochs": num_epochs, "progress_bar": False}
    fit(svi, jax.random.key(0), x, checkpoint=checkpoint, callbacks=[mark], **options)
    return np.diff(np.array(marks), axis=0)


def compare(sizes, seconds, num_epochs, repeats):
    x = random_pixels(sizes)
    if seconds:
        once = timed_fit(sizes, x, 3, None)[:, 0].min()
        sizes = replace(sizes, num_data=int(sizes.num_data * seconds / once))
        x = random_pixels(sizes)
    found = {"without": [], "with a checkpoint after each": []}
    for _ in range(repeats):
        for name, times in found.items():
            with tempfile.TemporaryDirectory() as folder:
                path = None if name == "without" else Checkpoints(f"{folder}/c", every_minutes=0.0)
                times.extend(timed_fit(sizes, x, num_epochs + 1, path))
    medians = {name: np.median(times, axis=0) for name, times in found.items()}
    base = medians["without"]
    print(f"an epoch of {sizes.num_data:,} data, of {num_epochs * repeats} each")
    for name, (clock, cores) in medians.items():
        print(
            f"  {name:30} {clock:7.2f} s ({clock / base[0] - 1:+.1%}), "
            f"of all cores {cores:7.2f} s ({cores / base[1] - 1:+.1%})"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    if args.smoke:
        return compare(TINY, None, 2, 1)
    compare(LARGE, args.seconds, args.epochs, args.repeats)


if __name__ == "__main__":
    main()
