"""What eight draws a row bring to an MNIST model, by each objective that takes them.

    python benchmarks/mnist_particles.py --data binarized_mnist.npz [--epochs 100] [--particles 8]
        [--objectives iw,iw-dreg] [--seeds 0,1,2] [--folder rows]

Data, model and guide are those of `mnist_gaps.py`, whose options say how they are trained. A seed
is of the first weights, the order of the rows and all draws. The ELBO with as many draws is what
the importance-weighted bounds are compared with: each run is a line with the ELBO and the evidence
of the test rows, from 200 draws each, and the last lines are the gains in evidence.

With ``--folder`` the evidence of each test row is kept there, and what is there is not trained
again, so that runs may be processes of their own, ``--objectives iw-dreg --seeds 1``.
"""

import argparse
import pathlib
from functools import partial

import numpy as np
from mnist_gaps import load, parse, print_bound, together
from numpyro.infer import TraceMeanField_ELBO

from numpyro_vae import Posterior
from numpyro_vae.objectives import ImportanceWeightedELBO

OBJECTIVES = {
    "elbo": TraceMeanField_ELBO,
    "iw": partial(ImportanceWeightedELBO, gradient="plain"),
    "iw-stl": partial(ImportanceWeightedELBO, gradient="stl"),
    "iw-dreg": partial(ImportanceWeightedELBO, gradient="dreg"),
}


def trained(name, seed, x, test, args, setting):
    """Train by an objective; print its line, and return the evidence of each test row."""
    loss = OBJECTIVES[name](num_particles=args.particles)
    posterior = Posterior(*together(loss, x, args.epochs, setting, seed))
    return print_bound(f"{name}, seed {seed}", posterior, test)


def kept(path, make):
    """Return an array from a file, which is made if it is not there; always, without a path."""
    if path is None:
        return make()
    if not path.exists():
        np.save(path, make())
    return np.load(path)


def print_gains(found):
    """Print the gains over the ELBO of the same seed, by objective and seed and over seeds."""
    for name in OBJECTIVES:
        gains = {
            seed: rows - found["elbo", seed]
            for (objective, seed), rows in found.items()
            if objective == name != "elbo" and ("elbo", seed) in found
        }
        means = np.array([gain.mean() for gain in gains.values()])
        for seed, gain in gains.items():
            error = gain.std(ddof=1) / len(gain) ** 0.5
            print(f"  {name:<8} seed {seed}: {gain.mean():+.3f} (se {error:.3f} over rows) nats")
        if len(means) > 1:
            error = means.std(ddof=1) / len(means) ** 0.5
            print(f"  {name:<8} mean: {means.mean():+.3f} (se {error:.3f} over seeds) nats")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--folder", type=pathlib.Path, help="where the evidence of rows is kept")
    args, setting = parse(parser)
    x, test = load(args.data)
    if args.smoke:
        args.objectives, args.seeds, args.epochs, args.particles = "elbo,iw-dreg", "0", 1, 2
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    print(f"\nbounds of test rows after {args.epochs} epochs of {args.particles} draws a row")
    found = {}
    for seed in map(int, args.seeds.split(",")):
        for name in args.objectives.split(","):
            make = partial(trained, name, seed, x, test, args, setting)
            path = args.folder and args.folder / f"{name}-{seed}.npy"
            found[name, seed] = kept(path, make)
    print_gains(found)


if __name__ == "__main__":
    main()
