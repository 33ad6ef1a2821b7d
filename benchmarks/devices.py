"""One training epoch on all devices of this process, and the same written by hand in JAX.

    python benchmarks/devices.py [--repeats 5] [--num-data 131072]
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/devices.py

Both do the arithmetic of `vae.py` with the same sharding: the rows of a batch are divided among the
devices, each of which has a copy of the parameters and of the data. Compile time is not counted.
Virtual devices of one CPU share its cores, and show that it runs, not how it scales.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from library import library_epoch
from timing import interleave, report
from vae import (
    Sizes,
    epoch_by_hand,
    init_by_hand,
    loss_by_hand,
    make_model,
    make_svi,
    random_pixels,
)

from numpyro_vae.data.devices import Devices

NETWORK = {"pixels": 784, "hidden": 400, "latent": 50}
BATCH_SIZES = 4_096, 65_536
TINY = [Sizes(num_data=256, pixels=16, hidden=8, latent=2, batch_size=64)]


def by_hand(x, sizes, mesh):
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))

    def loss(params, batch, key):
        return loss_by_hand(params, jax.lax.with_sharding_constraint(batch, rows), key)

    epoch = epoch_by_hand(sizes, loss)
    given = (*init_by_hand(sizes, jax.random.key(0)), jax.random.key(1), jnp.asarray(x))
    given = jax.device_put(given, everywhere)
    return lambda: jax.block_until_ready(epoch(*given))


def compare(sizes, repeats):
    mesh = Mesh(jax.devices(), "batch")
    x, svi = random_pixels(sizes), make_svi(make_model(sizes), sizes)
    runs = {
        "by hand in JAX": by_hand(x, sizes, mesh),
        "numpyro_vae": library_epoch(svi, x, sizes.batch_size, Devices.of(mesh)),
        "numpyro_vae, without a mesh": library_epoch(svi, x, sizes.batch_size),
    }
    title = f"an epoch at {sizes}, on {mesh.size} x {jax.devices()[0].device_kind}"
    report(title, interleave(runs, repeats), "by hand in JAX")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-data", type=int, default=131_072, help="rows of an epoch")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    sizes = [Sizes(num_data=args.num_data, batch_size=size, **NETWORK) for size in BATCH_SIZES]
    for one in TINY if args.smoke else sizes:
        compare(one, 2 if args.smoke else args.repeats)


if __name__ == "__main__":
    main()
