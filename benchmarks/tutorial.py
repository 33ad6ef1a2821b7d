"""TensorFlow's CVAE tutorial whole, in TensorFlow and here, with each scale parameterization.

    python benchmarks/tutorial.py --data mnist.npz [--scales log_variance,log_scale,softplus]
        [--seeds 0,1,2] [--epochs 10] [--no-tensorflow]

All is as in the tutorial, with the networks of `examples/tutorial_cvae.py`: 60,000 images, batches
of 32, Adam at 1e-4, one draw of two latents. An epoch of TensorFlow and one of each fit take turns,
the test ELBO is that of one draw for each of 10,000 images, and each epoch is a line. The first
epoch of each is compiled in it, so that the last lines give the median of the others.
"""

import argparse
import importlib.util
import pathlib
import runpy
import statistics
import time

import images
import jax
import numpy as np
import optax
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, fit

EXAMPLE = runpy.run_path(
    str(pathlib.Path(__file__).parent.parent / "examples" / "tutorial_cvae.py")
)
RATE, BATCH_SIZE = EXAMPLE["LEARNING_RATE"], EXAMPLE["BATCH_SIZE"]


class Log:
    """Prints each epoch of a run, and keeps its test ELBO and seconds."""

    def __init__(self, name, epochs):
        self.name, self.elbos, self.seconds = name, [], []
        epochs[name] = self

    def __call__(self, elbo, seconds):
        self.elbos.append(float(elbo))
        self.seconds.append(seconds)
        number = len(self.elbos)
        line = f"{self.name:<24}epoch {number:2d}  test ELBO {elbo:9.3f}  {seconds:6.1f} s"
        print(line, flush=True)


def tensorflow_run(train, test, seed, log):
    """Return a function that trains for an epoch in TensorFlow and logs it."""
    import tensorflow as tf
    from tensorflow_vae import dataset, tensorflow_vae

    tf.keras.utils.set_random_seed(seed)
    batches = dataset(train).shuffle(len(train)).batch(BATCH_SIZE)
    epoch, elbo = tensorflow_vae(batches, dataset(test).batch(BATCH_SIZE), RATE)

    def run():
        start = time.perf_counter()
        epoch()
        log(elbo(), time.perf_counter() - start)

    return run


def train(scale, seed, x, test, num_epochs, log, others):
    """Train here, and let others take their turn after each epoch."""
    rngs = nnx.Rngs(seed)
    decoder, encoder = EXAMPLE["Decoder"](rngs=rngs), EXAMPLE["Encoder"](rngs=rngs)
    model = EXAMPLE["make_model"](decoder)
    guide = AutoAmortizedNormal(model, encoder, scale=scale)
    start = time.perf_counter()

    def watch(epoch, state, metrics):
        nonlocal start
        log(-metrics["validation_loss"], time.perf_counter() - start)
        for other in others:
            other()
        start = time.perf_counter()

    fit(
        SVI(model, guide, optax.adam(RATE), Trace_ELBO()),
        jax.random.key(seed),
        x,
        batch_size=BATCH_SIZE,
        num_epochs=num_epochs,
        validation=test,
        callbacks=[watch],
        progress_bar=False,
    )


def print_summary(logs):
    """Print the last test ELBO of each run, and the median seconds of its epochs but the first."""
    print()
    for name, log in logs.items():
        seconds = statistics.median(log.seconds[1:] or log.seconds)
        print(f"{name:<24}test ELBO {log.elbos[-1]:9.3f}  {seconds:6.1f} s an epoch")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file with MNIST's x_train and x_test")
    parser.add_argument("--scales", default="log_variance,log_scale,softplus")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tensorflow", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--smoke", action="store_true", help="few images: does it run?")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.epochs, args.scales, args.seeds = None, 2, "softplus", "0"
    grey = images.load(args.data, *((64, 32) if args.smoke else (60_000, 10_000)))
    x, test = ((image / 255 >= 0.5).astype(np.float32) for image in grey)
    with_tensorflow = args.tensorflow and importlib.util.find_spec("tensorflow") is not None
    if not with_tensorflow:
        print("without TensorFlow")
    logs = {}
    for seed in map(int, args.seeds.split(",")):
        others = []
        if with_tensorflow:
            others = [tensorflow_run(x, test, seed, Log(f"TensorFlow, seed {seed}", logs))]
        for scale in args.scales.split(","):
            train(scale, seed, x, test, args.epochs, Log(f"{scale}, seed {seed}", logs), others)
            others = []
    print_summary(logs)


if __name__ == "__main__":
    main()
