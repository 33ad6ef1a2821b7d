"""How good the posteriors of `amortize` are, on models that it was not tuned for.

    python benchmarks/quality.py [--folder data] [--models growth,mixture] [--seed 0]
    python benchmarks/quality.py --smoke

Every model is trained with all defaults, with and without the phases on simulations, and judged on
rows held out: nats a datum between the bound and the evidence (importance sampling, 1,000 draws),
the shares of rows with a k-hat below its threshold, usable as they are, and not to be trusted, and
the time of training. With ``--folder`` the models of real data in ``quality_models.py`` are among
them; those whose rows take long to simulate are trained with fewer steps, as is said there.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import TraceEnum_ELBO
from quality_models import REAL, Case, read, split, tiny
from sklearn.datasets import load_digits

from numpyro_vae import Importance, amortize
from numpyro_vae.data.arrays import take_rows

NOISE = 0.5


def digits(rng: np.random.Generator) -> Case:
    """The demo's model of 8x8 images, counts out of 16."""
    images = load_digits().data.astype(np.float32)
    images = images[rng.permutation(len(images))]
    decoder = nnx.Sequential(
        nnx.Linear(8, 128, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(128, 128, rngs=nnx.Rngs(1)),
        nnx.relu,
        nnx.Linear(128, 64, rngs=nnx.Rngs(2)),
    )

    def model(x: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        log_concentration = numpyro.param("log_concentration", jnp.full(64, 2.0))
        concentration = jnp.exp(jnp.asarray(log_concentration))
        with numpyro.plate("image", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
            probs = nnx.sigmoid(9 * jnp.tanh(decode(z) / 9))
            counts = dist.BetaBinomial(concentration * probs, concentration * (1 - probs), 16)
            numpyro.sample("x", counts.to_event(1), obs=x)

    return Case(model, images[:1437], images[1437:])


def growth(rng: np.random.Generator) -> Case:
    """A line for each plant, with a noise of its own."""
    weeks = np.arange(8) - 3.5
    level, slope = rng.normal(0, 2, (1000, 1)), rng.normal(1, 0.5, (1000, 1))
    noise = rng.lognormal(-1, 0.3, (1000, 1)) * rng.normal(size=(1000, 8))

    def model(x: jax.Array) -> None:
        trend = numpyro.sample("trend", dist.Normal(0.0, 1.0))
        with numpyro.plate("plant", len(x)):
            level = numpyro.sample("level", dist.Normal(0.0, 2.0))
            slope = numpyro.sample("slope", dist.Normal(trend, 0.5))
            noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.3))
            mean = level[:, None] + slope[:, None] * weeks
            numpyro.sample("x", dist.Normal(mean, noise[:, None]).to_event(1), obs=x)

    return _split(model, level + slope * weeks + noise)


def gamma_poisson(rng: np.random.Generator) -> Case:
    """Five counts at a rate of each datum's own, and one parameter for all rates."""
    rate = rng.gamma(2.0, 5.0, (1000, 1))

    def model(x: jax.Array) -> None:
        b = numpyro.sample("b", dist.Normal(0.0, 3.0))
        with numpyro.plate("data", len(x)):
            rate = numpyro.sample("rate", dist.Gamma(2.0, jnp.exp(-b)))
            counts = dist.Poisson(jnp.broadcast_to(rate[:, None], x.shape))
            numpyro.sample("x", counts.to_event(1), obs=x)

    return _split(model, rng.poisson(rate, (1000, 5)))


def factor_analysis(rng: np.random.Generator) -> Case:
    """Four factors behind ten values, with known loadings."""
    loadings = rng.normal(size=(4, 10)).astype(np.float32)
    x = rng.normal(size=(1000, 4)) @ loadings + NOISE * rng.normal(size=(1000, 10))

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ loadings, NOISE).to_event(1), obs=x)

    return _split(model, x)


def product(rng: np.random.Generator) -> Case:
    """A product of two latents, whose posterior has two modes."""
    x = rng.normal(size=(1000,)) * rng.normal(size=(1000,)) + 0.1 * rng.normal(size=(1000,))

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(a * b, 0.1), obs=x)

    return _split(model, x)


def mixture(rng: np.random.Generator) -> Case:
    """Three clusters, summed over, of latents seen through noise."""
    centres = np.array([-3.0, 0.0, 3.0], np.float32)
    z = centres[rng.integers(3, size=1000)] + rng.normal(size=1000)

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            which = numpyro.sample(
                "which", dist.Categorical(jnp.ones(3) / 3), infer={"enumerate": "parallel"}
            )
            z = numpyro.sample("z", dist.Normal(jnp.asarray(centres)[which], 1.0))
            numpyro.sample("x", dist.Normal(z, NOISE), obs=x)

    return _split(model, z + NOISE * rng.normal(size=1000), loss=TraceEnum_ELBO())


def sequences(rng: np.random.Generator) -> Case:
    """A random walk of twelve steps seen through noise, as one latent vector."""
    walk = rng.normal(size=(1000, 12)).cumsum(-1)

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.GaussianRandomWalk(1.0, num_steps=12))
            numpyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    return _split(model, walk + NOISE * rng.normal(size=walk.shape))


def _split(model: Callable[..., Any], x: np.ndarray, **options: Any) -> Case:
    return split(model, x.astype(np.float32), 200, **options)


CASES = {
    case.__name__: case
    for case in (digits, growth, gamma_poisson, factor_analysis, product, mixture, sequences)
}


def judge(name: str, case: Case, seed: int, *, smoke: bool) -> None:
    """Print a row of the table before the simulations, and one after them."""
    # A few steps on simulations widen the shares of topics until they underflow.
    on_simulations = 0 if name == "topics" else 10
    few = {"num_steps": 20, "num_simulation_steps": on_simulations, "natural_steps": 0}
    sizes = case.options | (few if smoke else {})
    phases = {"before": sizes | {"num_simulation_steps": 0}, "after": sizes}
    for phase, options in phases.items() if not smoke else [("after", sizes)]:
        start = time.perf_counter()
        key = jax.random.key(seed)
        posterior = amortize(case.model, key, case.train, progress_bar=False, **options)
        seconds = time.perf_counter() - start
        rows = take_rows(case.test, 0, slice(20)) if smoke else case.test
        checks = (Importance(num_samples=100 if smoke else 1000),)
        report = posterior.check(jax.random.key(1), rows, checks, progress_bar=False)
        elbo, evidence = (float(report.dataset[k].mean()) for k in ("elbo", "log_evidence"))
        share = np.bincount(report.verdict, minlength=4) / len(report.verdict)
        print(
            f"{name:16s} {phase:7s} {elbo:9.3f} {evidence - elbo:8.3f} {share[:2].sum():9.1%} "
            f"{share[0]:8.1%} {share[3]:9.1%} {seconds:6.0f}",
            flush=True,
        )
        if case.say is not None:
            print(case.say(posterior, report), flush=True)


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Yield the cases that are asked for, by name."""
    rng = partial(np.random.default_rng, args.seed)
    if args.smoke:
        yield "growth", growth(rng())
        yield from ((name, tiny(name, rng())) for name in ("topics", "radon"))
        return
    known = (*CASES, *(REAL if args.folder else ()))
    for name in args.models.split(",") if args.models else known:
        yield name, CASES[name](rng()) if name in CASES else read(name, args.folder, rng())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, help="with real data")
    parser.add_argument("--models", help="names, with commas; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    columns = f"{'ELBO':>9s} {'gap':>8s} {'k-hat<':>9s} {'usable':>8s} {'no trust':>9s} {'s':>6s}"
    print(f"{'model':24s} {columns}")
    for name, case in cases(args):
        judge(name, case, args.seed, smoke=args.smoke)


if __name__ == "__main__":
    main()
