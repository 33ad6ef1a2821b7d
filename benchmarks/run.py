"""Runs every benchmark, each in a process of its own.

    python benchmarks/run.py [--data mnist.npz]

Without MNIST the convolutional network is timed on images drawn at random, and what compares
held-out ELBOs, checks and repairs is left out.
"""

import argparse
import pathlib
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz of MNIST with x_train and x_test")
    args = parser.parse_args()
    data = ["--data", args.data] if args.data else []
    commands = [["imports.py"], ["epoch.py"], ["sampling.py"], ["convolution.py", *data]]
    if data:
        commands += [["mnist_elbo.py", *data], ["checking.py", *data]]
    folder = pathlib.Path(__file__).parent
    codes = [
        subprocess.run([sys.executable, folder / script, *options], check=False).returncode
        for script, *options in commands
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
