"""One epoch of a convolutional VAE on CPU: TensorFlow, our convolutions, flax's convolutions.

    python benchmarks/convolution.py                     synthetic images
    python benchmarks/convolution.py --data mnist.npz    MNIST, as Keras publishes it

First the epoch is written by hand in TensorFlow, with the library's layers and with flax's: 12,800
images of 28 x 28, batches of 32, Adam at 1e-4, one draw from the posterior, the ELBO by Monte
Carlo. Flax's layers, being slow here, see fewer images, and their time is scaled up. Then `fit`
trains a NumPyro model whose networks have flax's layers, against `svi.update` taking as many steps
one by one. Without TensorFlow its row is skipped. Compile time is not counted.
"""

import argparse
import importlib.util

import images
import jax
import jax.numpy as jnp
import numpy as np
from convolutional_vae import LEARNING_RATE, linen_svi, nnx_svi, step_by_hand
from flax import nnx
from library import library_epoch
from timing import interleave, report

from numpyro_vae.layers.convolution import Conv, ConvTranspose

FULL = {"images": 12_800, "slow_images": 640, "batch_size": 32, "rounds": 3}
TINY = {"images": 4, "slow_images": 2, "batch_size": 2, "rounds": 1}


def in_scan(step, carry, batches):
    """An epoch as one compiled `lax.scan`."""
    epoch = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    return lambda: float(epoch(carry, batches)[1][-1])


def in_loop(step, first, batches):
    """An epoch as a Python loop over a compiled step."""
    step = jax.jit(step)

    def epoch():
        carry = first
        for batch in batches:
            carry, value = step(carry, batch)
        return float(value)

    return epoch


def in_tensorflow(batches):
    """An epoch in TensorFlow by name, or nothing without TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:
        print("\nTensorFlow is not installed: its row is skipped.")
        return {}
    from tensorflow_vae import dataset, tensorflow_vae

    data = dataset(batches.reshape(-1, 28, 28)).batch(batches.shape[1])
    epoch, _ = tensorflow_vae(data, data, LEARNING_RATE)
    return {"TensorFlow": epoch}


def compare_by_hand(batches, num_slow, rounds):
    """Time the epoch written by hand, flax's layers on the first ``num_slow`` batches."""
    all_, few = jnp.asarray(batches), jnp.asarray(batches[:num_slow])
    ours, flax = step_by_hand(Conv, ConvTranspose), step_by_hand(nnx.Conv, nnx.ConvTranspose)
    runs = in_tensorflow(batches) | {
        "numpyro_vae, scan": in_scan(*ours, all_),
        "numpyro_vae, loop": in_loop(*ours, all_),
        "flax, scan": in_scan(*flax, few),
        "flax, loop": in_loop(*flax, few),
    }
    seconds = interleave(runs, rounds)
    for name in ("flax, scan", "flax, loop"):
        seconds[name] = [value * len(all_) / len(few) for value in seconds[name]]
    batch_size = batches.shape[1]
    title = f"an epoch of {len(all_) * batch_size} images; flax's from {len(few) * batch_size}"
    report(f"{title}, scaled up", seconds, "numpyro_vae, scan")


def compare_fit(batches, rounds):
    """Time `fit` of networks of flax's layers against the same steps one by one; goal 1.1x."""
    x = batches.reshape(-1, *batches.shape[2:])
    for name, make_svi in (("nnx.Conv", nnx_svi), ("linen.Conv", linen_svi)):
        svi = make_svi()
        state = svi.init(jax.random.key(0), batches[0])
        runs = {
            "svi.update, one by one": in_loop(svi.update, state, jnp.asarray(batches)),
            "fit": library_epoch(svi, x, batches.shape[1]),
        }
        title = f"fit of a user's own {name} networks, an epoch of {len(x)} images; goal 1.1x"
        report(title, interleave(runs, rounds), "svi.update, one by one")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file with MNIST's x_train; else synthetic images")
    parser.add_argument("--smoke", action="store_true", help="few images: does it run?")
    args = parser.parse_args()
    sizes = TINY if args.smoke else FULL
    batch_size, rounds = sizes["batch_size"], sizes["rounds"]
    train, _ = images.load(args.data, sizes["images"], 0)
    batches = (train > 127).astype(np.float32).reshape(-1, batch_size, 28, 28, 1)
    num_slow = sizes["slow_images"] // batch_size
    compare_by_hand(batches, num_slow, rounds)
    compare_fit(batches[:num_slow], rounds)


if __name__ == "__main__":
    main()
