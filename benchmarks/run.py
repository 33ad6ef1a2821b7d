"""Runs every benchmark, each in a process of its own.

    python benchmarks/run.py [--data mnist.npz]
    python benchmarks/run.py --smoke

Without MNIST the convolutional network is timed on images drawn at random, and what compares
held-out ELBOs, checks and repairs is left out. ``--smoke`` runs all of them at tiny sizes, MNIST
replaced by random images: it shows that they run, and its figures mean nothing.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

FOLDER = pathlib.Path(__file__).parent
WITHOUT_DATA = (
    "latency.py",
    "devices.py",
    "checkpoints.py",
    "epoch.py",
    "imports.py",
    "sampling.py",
    "objectives.py",
    "quality.py",
    "serving.py",
    "global_sites.py",
    "sbibm.py",
    "hierarchical.py",
    "item_response_classes.py",
    "larger_than_memory.py",
)
OPTIONAL_DATA = ("convolution.py",)
NEED_DATA = (
    "checking.py",
    "mnist_elbo.py",
    "mnist_gaps.py",
    "mnist_particles.py",
    "hand_written.py",
    "tutorial.py",
)
# Nearly all of a smoke run is compiling, which takes half as long without optimization.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def commands(data: str | None, smoke: bool) -> list[list[str]]:
    """Return the scripts to run, each with its options."""
    if smoke:
        return [[script, "--smoke"] for script in (*NEED_DATA, *OPTIONAL_DATA, *WITHOUT_DATA)]
    options = ["--data", data] if data else []
    with_data = (*OPTIONAL_DATA, *NEED_DATA) if data else OPTIONAL_DATA
    return [[script] for script in WITHOUT_DATA] + [[script, *options] for script in with_data]


def run(command: list[str], env: dict[str, str], *, capture: bool) -> int:
    """Run a script, say how long it took, and return its exit status."""
    script, *options = command
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, FOLDER / script, *options],
        env=env,
        check=False,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
    )
    state = "done" if done.returncode == 0 else f"FAILED with status {done.returncode}"
    seconds = time.perf_counter() - start
    print(f"{done.stdout or ''}\n-- {script}: {state} in {seconds:.0f} s\n", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz of MNIST with x_train and x_test")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: do they run?")
    args = parser.parse_args()
    env = dict(os.environ)
    if args.smoke:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {COMPILE_FAST}"
    # Two at once where no time is to be measured: compiling one program keeps one core busy.
    with ThreadPoolExecutor(2 if args.smoke else 1) as pool:
        start = partial(run, env=env, capture=args.smoke)
        codes = list(pool.map(start, commands(args.data, args.smoke)))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
