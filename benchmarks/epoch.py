"""One training epoch of a VAE: numpyro_vae, the same by hand in JAX, and with NumPyro's SVI.

    python benchmarks/epoch.py [--repeats 7]

All do the same arithmetic, that of `vae.py`. Compile time is not counted. "SVI.update in a scan" is
a loop by hand too, of the same model and guide: what NumPyro's densities and random keys cost.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from library import library_epoch
from numpyro import handlers
from timing import interleave, report
from vae import SMALL, Sizes, epoch_by_hand, init_by_hand, make_model, make_svi, random_pixels

LARGE = Sizes(num_data=60_000, pixels=784, hidden=400, latent=50, batch_size=128)
TINY = Sizes(num_data=150, pixels=16, hidden=8, latent=2, batch_size=32)


def by_hand(x, sizes):
    x = jnp.asarray(x)
    epoch = epoch_by_hand(sizes)
    state, rng_key = init_by_hand(sizes, jax.random.key(0)), jax.random.key(1)
    return lambda: jax.block_until_ready(epoch(*state, rng_key, x))


def by_library(x, sizes):
    return library_epoch(make_svi(make_model(sizes), sizes), x, sizes.batch_size)


def by_update(x, sizes):
    """A permutation and a scan of SVI.update, which scales the batch to all the data."""
    model, num_data = make_model(sizes), sizes.num_data
    svi = make_svi(model, sizes)
    scaled = partial(handlers.scale, scale=num_data / sizes.batch_size)
    svi.model, svi.guide = scaled(svi.model), scaled(svi.guide)
    x, rng_key = jnp.asarray(x), jax.random.key(1)
    state = svi.init(jax.random.key(0), x[: sizes.batch_size])

    @jax.jit
    def epoch(state, rng_key, x):
        order = jax.random.permutation(rng_key, sizes.num_steps * sizes.batch_size) % num_data
        rows = order.reshape(sizes.num_steps, sizes.batch_size)
        return jax.lax.scan(lambda state, rows: svi.update(state, x[rows]), state, rows)

    return lambda: jax.block_until_ready(epoch(state, rng_key, x))


def by_svi_run(x, sizes):
    """What svi.run compiles: a scan of updates, the plate drawing its own minibatches."""
    svi = make_svi(make_model(sizes, subsample_size=sizes.batch_size), sizes)
    x = jnp.asarray(x)
    state = svi.init(jax.random.key(0), x)
    scan = jax.jit(
        lambda state, x: jax.lax.scan(lambda s, _: svi.update(s, x), state, length=sizes.num_steps)
    )
    return lambda: jax.block_until_ready(scan(state, x))


def compare(sizes, repeats):
    x = random_pixels(sizes)
    runs = {
        "by hand in JAX": by_hand(x, sizes),
        "SVI.update in a scan": by_update(x, sizes),
        "numpyro_vae": by_library(x, sizes),
        "svi.run with a subsampling plate": by_svi_run(x, sizes),
    }
    report(f"an epoch at {sizes}", interleave(runs, repeats), "by hand in JAX")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    if args.smoke:
        return compare(TINY, 2)
    compare(LARGE, args.repeats)
    compare(SMALL, 100 * args.repeats)


if __name__ == "__main__":
    main()
