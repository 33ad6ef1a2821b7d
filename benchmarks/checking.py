"""Checks and repairs of MNIST rows, against NumPyro's own means row by row.

    python benchmarks/checking.py --data mnist.npz

A small VAE is trained first. Then the k-hat of 10,000 test images is computed with 1,000 draws
each, and 100 of them are sampled with NUTS; NumPyro's `psis_diagnostic` and `MCMC`, which take a
row at a time, are timed on a few rows, since all of them would take hours, and multiplied. `MCMC`
has the same number of chains and iterations.
"""

import argparse
import resource
from functools import partial
from typing import NamedTuple

import images
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from arviz_stats.base import array_stats
from numpyro.infer import MCMC, NUTS, psis_diagnostic
from timing import seconds_of
from vae import Sizes, make_model, make_svi

from numpyro_vae import Posterior, fit
from numpyro_vae.repair.nuts import ITERATIONS, NUM_CHAINS, ROUNDS

DRAWS = 1_000  # for a k-hat, as `Posterior.check` has it by default
KEY = jax.random.key(1)


class Rows(NamedTuple):
    """How many rows each part takes: all of them, and those that NumPyro takes one by one."""

    checked: int
    checked_singly: int
    repaired: int
    repaired_singly: int


FULL = Rows(10_000, 20, 100, 8)
FULL_VAE = Sizes(num_data=60_000, pixels=784, hidden=200, latent=10, batch_size=128)
TINY = Rows(8, 1, 2, 1)
TINY_VAE = Sizes(num_data=256, pixels=16, hidden=8, latent=2, batch_size=128)


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare_checks(svi, result, x, few):
    posterior = Posterior(svi.guide, result)

    def ours(rows):
        return posterior.check(KEY, x[:rows], checks="importance", progress_bar=False)

    def theirs(rows):
        for row in range(rows):
            one = x[row : row + 1]
            psis_diagnostic(KEY, result.params, svi.model, svi.guide, one, num_particles=DRAWS)

    ours(512)
    theirs(1)
    before = peak_mib()
    quarter, whole = (seconds_of(partial(ours, rows)) for rows in (len(x) // 4, len(x)))
    by_row = seconds_of(partial(theirs, few)) / few
    print(f"\nk-hat, ELBO and evidence of {len(x):,} rows, {DRAWS:,} draws each")
    print(f"  Posterior.check              {whole:9.1f} s")
    print(f"    of a quarter of the rows   {quarter:9.1f} s")
    print(f"    memory beyond its start    {peak_mib() - before:9.0f} MiB")
    print(f"  psis_diagnostic row by row   {by_row * len(x):9.1f} s, from {few} rows")
    print(f"  ratio                        {by_row * len(x) / whole:9.1f}")


def single_row_mcmc(model, params):
    """Return a function from a key and a row to the effective draws of its worst latent."""
    kernel = NUTS(numpyro.handlers.substitute(model, data=params), max_tree_depth=8)
    mcmc = MCMC(
        kernel,
        num_warmup=ITERATIONS,
        num_samples=ROUNDS[0] * ITERATIONS,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
        jit_model_args=True,
    )

    def run(key, row):
        mcmc.run(key, row)
        z = mcmc.get_samples(group_by_chain=True)["z"][:, :, 0]
        z = np.moveaxis(np.asarray(z, float), -1, 0)
        return array_stats.ess(z, chain_axis=-2, draw_axis=-1).min()

    return run


def compare_repairs(svi, result, x, number, few):
    posterior, run = Posterior(svi.guide, result), single_row_mcmc(svi.model, result.params)
    ess, repairs = [], []

    def theirs(rows):
        for row in range(rows):
            ess.append(run(jax.random.fold_in(KEY, row), x[row : row + 1]))

    def ours():
        repairs.append(posterior.repair(KEY, x, np.arange(number), method="nuts").dataset)

    compiling, by_row = seconds_of(lambda: theirs(1)), seconds_of(lambda: theirs(few)) / few
    theirs_all, taken = compiling + (number - 1) * by_row, seconds_of(ours)
    (found,) = repairs
    print(f"\nNUTS on {number} rows, {NUM_CHAINS} chains, {ITERATIONS} iterations to adapt in and")
    print(f"{ROUNDS[0] * ITERATIONS} more, compiling included; effective draws of a row's worst")
    print("latent (median)")
    print(f"  Posterior.repair             {taken:9.1f} s {np.median(found['ess']):9.0f}")
    print(f"    passed: {int(found['passed'].sum())} rows")
    print(f"  MCMC row by row              {theirs_all:9.1f} s {np.median(ess):9.0f}")
    print(f"    from {few} rows")
    print(f"  ratio                        {theirs_all / taken:9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    images_from = parser.add_mutually_exclusive_group(required=True)
    images_from.add_argument("--data", help="an .npz of MNIST with x_train and x_test")
    images_from.add_argument("--smoke", action="store_true", help="few random images: does it run?")
    parser.add_argument("--skip-checks", action="store_true", help="time the repair alone")
    args = parser.parse_args()
    rows, vae, epochs = (TINY, TINY_VAE, 1) if args.smoke else (FULL, FULL_VAE, 10)
    train, x = (
        (grey.reshape(len(grey), -1)[:, : vae.pixels] > 127).astype(np.float32)
        for grey in images.load(args.data, vae.num_data, rows.checked)
    )
    svi = make_svi(make_model(vae), vae)
    options = {"batch_size": vae.batch_size, "num_epochs": epochs, "progress_bar": False}
    result, x = fit(svi, jax.random.key(0), train, **options), jnp.asarray(x)
    if not args.skip_checks:
        compare_checks(svi, result, x, rows.checked_singly)
    compare_repairs(svi, result, x, rows.repaired, rows.repaired_singly)


if __name__ == "__main__":
    main()
