"""Seven guides of one model of handwritten digits, side by side, and against NUTS.

Run ``python examples/compare_guides.py``. A decoder is trained on scikit-learn's digits, and then
stays as it is. Guides of images held out are compared: NumPyro's ``AutoNormal``, with parameters of
its own for each image; ``AutoMultivariateNormal``, which draws all images jointly and is compared
by the bound and the k-hat of the whole; a network written by hand; and four amortized guides,
trained on the images or on simulations of the model. It prints how far each bound is below the
best, with the standard error of that difference, which share of the images each verdict has, and
what NUTS says of a few images. A picture is written into ``output/``.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from matplotlib.figure import Figure
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_digits

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ForwardKL,
    Posterior,
    Reference,
    Simulations,
    compare,
    fit,
    plot_comparison,
)

RATES = {AutoNormal: 3e-2, AutoMultivariateNormal: 3e-3}  # guides of the images held out alone
LATENT_SIZE = 4
PIXELS = 64


class Decoder(nnx.Module):
    """From the latents of an image to a logit for each pixel."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.Sequential(
            nnx.Linear(LATENT_SIZE, 64, rngs=rngs), nnx.relu, nnx.Linear(64, PIXELS, rngs=rngs)
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return logits of shape ``(batch, pixels)``."""
        return self.layers(z)


class Encoder(nnx.Module):
    """From an image to the location and the log-scale of its latents, as one writes it by hand."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(PIXELS, 64, rngs=rngs)
        self.loc = nnx.Linear(64, LATENT_SIZE, rngs=rngs)
        self.log_scale = nnx.Linear(64, LATENT_SIZE, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return both, ``(batch, latents)``."""
        hidden = nnx.relu(self.hidden(images / 16))
        return self.loc(hidden), self.log_scale(hidden)


def make_model() -> Callable[[jax.Array], None]:
    """The generative model: latents, decoder, and counts of bits out of 16."""
    decoder = Decoder(rngs=nnx.Rngs(0))

    def model(images: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("image", len(images)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT_SIZE]).to_event(1))
            pixels = dist.Binomial(16, logits=decode(z)).to_event(1)
            numpyro.sample("pixels", pixels, obs=images)

    return model


def by_hand(images: jax.Array) -> None:
    """A guide as one writes it: what `AutoAmortizedNormal` reads off the model."""
    encode = nnx_module("encoder", Encoder(rngs=nnx.Rngs(1)))
    loc, log_scale = encode(images)
    with numpyro.plate("image", len(images)):
        numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


def frozen(model: Callable[..., None], params: Mapping[str, Any]) -> Callable[..., None]:
    """The model with the decoder as it is, so that no guide changes it."""
    given = {name: value for name, value in params.items() if name.startswith("decoder")}
    hide = lambda msg: msg["type"] in ("param", "mutable")  # noqa: E731
    return handlers.block(handlers.substitute(model, data=given), hide_fn=hide)


def train(quick: bool) -> tuple[dict[str, Posterior], np.ndarray, Callable[..., None]]:
    """Return the posteriors by name, the images held out, and the model with its decoder."""
    images = np.random.default_rng(0).permutation(load_digits().data).astype(np.float32)
    known, held_out = images[:1500], images[1500 : 1550 if quick else 1750]
    epochs, steps = (20, 300) if quick else (150, 6000)
    model, key = make_model(), jax.random.key(0)
    encoder = partial(MLP, hidden_sizes=(128, 128))
    adam = partial(optax.adam, optax.cosine_decay_schedule(3e-3, epochs * 12))
    run = partial(fit, batch_size=128, num_epochs=epochs, progress_bar=False)
    guide = AutoAmortizedNormal(model, encoder)
    first = run(SVI(model, guide, adam(), TraceMeanField_ELBO()), key, known)
    fixed = frozen(model, first.params)

    def on_simulations(make: Callable[..., Any]) -> Posterior:
        guide = make(fixed, encoder)
        simulated = Simulations(1500, like=known, redraw_every=1)
        return Posterior(guide, run(SVI(fixed, guide, adam(), ForwardKL()), key, simulated))

    found = {"network": Posterior(guide, first)}
    found["network, on simulations"] = on_simulations(AutoAmortizedNormal)
    found["full rank, on simulations"] = on_simulations(AutoAmortizedMultivariateNormal)
    found["flow, on simulations"] = on_simulations(AutoAmortizedFlow)
    svi = SVI(fixed, by_hand, adam(), Trace_ELBO())
    found["by hand"] = Posterior(by_hand, run(svi, key, known), model=fixed)
    for make, rate in RATES.items():
        own = make(fixed)
        svi = SVI(fixed, own, optax.adam(optax.cosine_decay_schedule(rate, steps)), Trace_ELBO(4))
        result = svi.run(key, steps, held_out, progress_bar=False)
        found[make.__name__] = Posterior(own, result)
    return found, held_out, fixed


def main() -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few epochs and images, for a test")
    parser.add_argument("--output", type=Path, default=Path("output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    posteriors, images, model = train(options.quick)
    found = compare(posteriors, jax.random.key(1), images)
    print(found)

    number = 4 if options.quick else 20
    many = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=500, **many)
    mcmc.run(jax.random.key(2), images[:number])
    print(f"\nAgainst NUTS, {number} images, {LATENT_SIZE} latents each")
    for name, posterior in posteriors.items():
        if name in [make.__name__ for make in RATES]:  # which are of no fewer
            continue
        check = Reference(mcmc)
        report = posterior.check(jax.random.key(3), images[:number], check, progress_bar=False)
        for finding in report.findings:
            print(f"{name}: {finding.text}")

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    plot_comparison(found, ax=figure.add_subplot())
    figure.savefig(options.output / "compare_guides.png", dpi=110)
    print(f"\nWrote {options.output / 'compare_guides.png'}")


if __name__ == "__main__":
    main()
