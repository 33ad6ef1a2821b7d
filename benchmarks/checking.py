"""Checks and repairs of MNIST rows, against NumPyro's own means row by row.

    python benchmarks/checking.py --data mnist.npz

A small VAE is trained first. Then the k-hat of 10,000 test images is computed with 1,000 draws
each, and 100 of them are sampled with NUTS; NumPyro's `psis_diagnostic` and `MCMC`, which take a
row at a time, are timed on a few rows, since all of them would take hours, and multiplied. `MCMC`
has the same number of chains and iterations.
"""

import argparse
import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from arviz_stats.base import array_stats
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import MCMC, NUTS, SVI, TraceMeanField_ELBO, psis_diagnostic

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit
from numpyro_vae.repair.nuts import ITERATIONS, NUM_CHAINS, ROUNDS

LATENT, HIDDEN, PIXELS = 10, 200, 784
ROWS, DRAWS = 10_000, 1_000
KEY = jax.random.key(1)


class Decoder(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(LATENT, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, PIXELS, rngs=rngs)

    def __call__(self, z):
        return self.out(nnx.relu(self.hidden(z)))


DECODER = Decoder(rngs=nnx.Rngs(0))


def model(x):
    decode = nnx_module("decoder", DECODER)
    with numpyro.plate("images", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENT]).to_event(1))
        numpyro.sample("x", dist.BernoulliLogits(decode(z)).to_event(1), obs=x)


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare_checks(posterior, guide, params, x):
    def ours(rows):
        return posterior.check(KEY, x[:rows], checks=("importance",), num_samples=DRAWS)

    def theirs(rows):
        for row in range(rows):
            psis_diagnostic(KEY, params, model, guide, x[row : row + 1], num_particles=DRAWS)

    ours(512)
    theirs(2)
    before, few, several = peak(), 20, ROWS // 4
    times = {rows: seconds(partial(ours, rows)) for rows in (several, ROWS)}
    by_row = seconds(partial(theirs, few)) / few
    print(f"\nk-hat, ELBO and evidence of {ROWS:,} rows, {DRAWS:,} draws each")
    print(f"  Posterior.check              {times[ROWS]:9.1f} s")
    print(f"    of a quarter of the rows   {times[several]:9.1f} s")
    print(f"    memory beyond its start    {peak() - before:9.0f} MiB")
    print(f"  psis_diagnostic row by row   {by_row * ROWS:9.1f} s, from {few} rows")
    print(f"  ratio                        {by_row * ROWS / times[ROWS]:9.1f}")


def compare_repairs(posterior, params, x, number):
    draws = ROUNDS[0] * ITERATIONS
    kernel = NUTS(numpyro.handlers.substitute(model, data=params), max_tree_depth=8)
    mcmc = MCMC(
        kernel,
        num_warmup=ITERATIONS,
        num_samples=draws,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
        jit_model_args=True,
    )
    sizes = []

    def theirs(rows):
        for row in range(rows):
            mcmc.run(jax.random.fold_in(KEY, row), x[row : row + 1])
            z = mcmc.get_samples(group_by_chain=True)["z"][:, :, 0]
            z = np.moveaxis(np.asarray(z, float), -1, 0)
            sizes.append(array_stats.ess(z, chain_axis=-2, draw_axis=-1).min())

    compiling = seconds(lambda: theirs(1))
    few = 8
    by_row = seconds(lambda: theirs(few)) / few
    start = time.perf_counter()
    repair = posterior.repair(KEY, x, np.arange(number), method="nuts")
    taken = time.perf_counter() - start
    found = repair.dataset
    print(f"\nNUTS on {number} rows, {NUM_CHAINS} chains, {ITERATIONS} iterations to adapt in and")
    print(f"{draws} more, compiling included; effective draws of a row's worst latent (median)")
    print(f"  Posterior.repair             {taken:9.1f} s {np.median(found['ess']):9.0f}")
    print(f"    passed: {int(found['passed'].sum())} rows")
    theirs_all = compiling + (number - 1) * by_row
    print(f"  MCMC row by row              {theirs_all:9.1f} s {np.median(sizes):9.0f}")
    print(f"    from {few} rows")
    print(f"  ratio                        {theirs_all / taken:9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="an .npz of MNIST with x_train and x_test")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repaired", type=int, default=100, help="rows that NUTS samples")
    parser.add_argument("--skip-checks", action="store_true", help="time the repair alone")
    args = parser.parse_args()
    with np.load(args.data) as file:
        train, test = (
            (file[name].reshape(-1, PIXELS) > 127).astype(np.float32)
            for name in ("x_train", "x_test")
        )
    guide = AutoAmortizedNormal(model, partial(MLP, hidden_sizes=(HIDDEN,)))
    svi = SVI(model, guide, optax.adam(1e-3), TraceMeanField_ELBO())
    result = fit(svi, jax.random.key(0), train, num_epochs=args.epochs, progress_bar=False)
    posterior = Posterior(guide, result)
    x = jnp.asarray(test[:ROWS])
    if not args.skip_checks:
        compare_checks(posterior, guide, result.params, x)
    compare_repairs(posterior, result.params, x, args.repaired)


if __name__ == "__main__":
    main()
