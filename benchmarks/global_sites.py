"""The global latents of an item response model: the check and the repair, next to NUTS.

    python benchmarks/global_sites.py [--people 1000] [--samples 1000]

People of whom each has an ability answer questions, which have an intercept and a slope. A guide in
which abilities and questions are independent is trained; then the guide of the questions is
checked, and their posterior repaired. NUTS samples people and questions together, in four chains of
so many iterations to adapt in and as many draws. Compared are seconds, compiling included, and the
moments of the questions' parameters with those of NUTS.
"""

import argparse
from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from arviz_stats.base import array_stats
from flax import nnx
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from timing import seconds_of

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit

KEY = jax.random.key(1)
ITEMS = ("intercept", "slope")
NUM_ITEMS = 8


def model(correct):
    items = correct.shape[1]
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0).expand([items]).to_event(1))
    slope = numpyro.sample("slope", dist.LogNormal(0.0, 0.5).expand([items]).to_event(1))
    with numpyro.plate("person", len(correct)):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        logits = intercept + slope * ability[:, None]
        numpyro.sample("correct", dist.BernoulliLogits(logits).to_event(1), obs=correct)


def simulate(people):
    rng = np.random.default_rng(0)
    intercept, slope = rng.normal(size=NUM_ITEMS), np.exp(0.4 * rng.normal(size=NUM_ITEMS))
    logits = intercept + slope * rng.normal(size=(people, 1))
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)


def train(correct, steps):
    guide = AutoAmortizedNormal(model, partial(MLP, hidden_sizes=(64,), activation=nnx.tanh))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    size = min(1000, len(correct))
    epochs = max(steps * size // len(correct), 1)
    options = {"batch_size": size, "num_epochs": epochs, "progress_bar": False}
    return Posterior(guide, fit(svi, jax.random.key(0), correct, **options))


def flat(draws):
    """Intercepts and the logarithms of slopes, side by side."""
    return np.concatenate([draws["intercept"], np.log(draws["slope"])], axis=-1).astype(float)


def run_nuts(correct, samples):
    options = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(NUTS(model), num_warmup=samples, num_samples=samples, **options)
    mcmc.run(jax.random.key(0), correct)
    return flat(mcmc.get_samples(group_by_chain=True))


def compare(name, draws, truth):
    shift = np.abs(draws.mean(0) - truth.mean(0)) / truth.std(0)
    ratio = draws.std(0) / truth.std(0)
    print(
        f"  {name:<12} means {shift.max():.2f} sds from those of NUTS at most; "
        f"sds {ratio.min():.2f} to {ratio.max():.2f} of its"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="draws of a NUTS chain, or none")
    parser.add_argument("--smoke", action="store_true", help="few people: does it run?")
    args = parser.parse_args()
    people, steps, samples = (40, 20, 20) if args.smoke else (args.people, 4000, args.samples)
    correct, found = simulate(people), []
    posterior = train(correct, steps)

    def check():
        print(posterior.check(KEY, correct, "globals", progress_bar=False))

    def repair():
        found.append(posterior.repair_globals(KEY, correct, num_samples=2000))

    def sample():
        found.append(run_nuts(correct, samples))

    print(f"{people:,} people, {NUM_ITEMS} questions")
    print(f"  check        {seconds_of(check):9.1f} s")
    print(f"  repair       {seconds_of(repair):9.1f} s\n{found[0]}")
    if not samples:
        return
    print(f"  NUTS         {seconds_of(sample):9.1f} s of {samples} draws after as many")
    chains = found[1]
    ess = array_stats.ess(np.moveaxis(chains, -1, 0), chain_axis=-2, draw_axis=-1)
    rhat = array_stats.rhat(np.moveaxis(chains, -1, 0), chain_axis=-2, draw_axis=-1)
    truth = chains.reshape(-1, chains.shape[-1])
    print(f"    {ess.min():.0f} effective draws or more, r-hat {rhat.max():.3f}")
    guide = posterior.sample(KEY, correct, 2000, var_names=ITEMS)
    compare("guide", flat(guide), truth)
    compare("repaired", flat(found[0].draws), truth)


if __name__ == "__main__":
    main()
