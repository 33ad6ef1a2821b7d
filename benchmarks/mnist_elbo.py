"""The held-out ELBO on MNIST of a guide written by no one, and of NumPyro's hand-written one.

    python benchmarks/mnist_elbo.py --data mnist.npz

The model and the guide of NumPyro's example ``vae.py`` (one hidden layer of 400 softplus units, 50
latents, Adam at 1e-3, batch 128, 15 epochs), and AutoAmortizedNormal over the same model with the
same encoder size; the same data, binarized once, the same order of batches, the same objective.
"""

import argparse
from functools import partial

import images
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, fit

HIDDEN, LATENT, PIXELS, BATCH, EVALUATED = 400, 50, 784, 128, 500
dense = partial(stax.Dense, W_init=stax.randn())


def decoder():
    return stax.serial(dense(HIDDEN), stax.Softplus, dense(PIXELS), stax.Sigmoid)


def encoder():
    scale = stax.serial(dense(LATENT), stax.Exp)
    heads = stax.serial(stax.FanOut(2), stax.parallel(dense(LATENT), scale))
    return stax.serial(dense(HIDDEN), stax.Softplus, heads)


def model(x):
    decode = numpyro.module("decoder", decoder(), (len(x), LATENT))
    with numpyro.plate("batch", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENT]).to_event(1))
        numpyro.sample("obs", dist.Bernoulli(decode(z)).to_event(1), obs=x)


def hand_written_guide(x):
    encode = numpyro.module("encoder", encoder(), (len(x), PIXELS))
    loc, scale = encode(x)
    with numpyro.plate("batch", len(x)):
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


def automatic_guide():
    small = partial(
        MLP, hidden_sizes=(HIDDEN,), activation=jax.nn.softplus, standardize=False
    )  # as by hand
    return AutoAmortizedNormal(model, small)


GUIDES = {"by hand": lambda: hand_written_guide, "AutoAmortizedNormal": automatic_guide}


def binarized(path, num_train, num_test):
    """Return binary images drawn once from the grey ones, to train with and to test with."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.random((len(grey), PIXELS)) * 255 < grey.reshape(-1, PIXELS), jnp.float32)
        for grey in images.load(path, num_train, num_test)
    )


def held_out(params, guide, x):
    """Return the ELBO in nats a datum, and the standard error of its Monte Carlo estimate."""
    loss = Trace_ELBO(num_particles=4)
    evaluate = jax.jit(lambda key, batch: loss.loss(key, params, model, guide, batch))
    elbos = [
        -sum(evaluate(key, batch) for batch in x.reshape(-1, EVALUATED, PIXELS)) / len(x)
        for key in jax.random.split(jax.random.key(2), 8)
    ]
    return np.mean(elbos), np.std(elbos, ddof=1) / np.sqrt(len(elbos))


def compare(seed, train, test, epochs):
    """Train both guides and print their held-out ELBOs."""
    found = {}
    for name, make_guide in GUIDES.items():
        svi = SVI(model, make_guide(), optax.adam(1e-3), Trace_ELBO())
        result = fit(
            svi,
            jax.random.key(seed),
            train,
            batch_size=BATCH,
            num_epochs=epochs,
            progress_bar=False,
        )
        found[name], error = held_out(result.params, svi.guide, test)
        print(f"  seed {seed}  {name:<22}{found[name]:10.3f}  (se {error:.3f})", flush=True)
    gain = found["AutoAmortizedNormal"] - found["by hand"]
    print(f"  seed {seed}  gain over by hand     {gain:+10.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    images_from = parser.add_mutually_exclusive_group(required=True)
    images_from.add_argument("--data", help="an .npz with x_train and x_test")
    images_from.add_argument("--smoke", action="store_true", help="few random images: does it run?")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    num_train, num_test = 60_000, 10_000
    if args.smoke:
        num_train, num_test, args.epochs, args.seeds = 2 * BATCH, EVALUATED, 1, 1
    train, test = binarized(args.data, num_train, num_test)
    print(f"\nheld-out ELBO on MNIST after {args.epochs} epochs, nats a datum")
    for seed in range(args.seeds):
        compare(seed, train, test, args.epochs)


if __name__ == "__main__":
    main()
