"""Draws of 50 latents of 10,000 rows, 1,000 each: time and peak memory, against drawing by hand.

    python benchmarks/sampling.py

Each way runs in a process of its own, in turn, and ends with the draws in memory on the host.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

from timing import seconds_of

FULL, TINY = (10_000, 1_000), (200, 20)  # rows, draws
LATENTS, PIXELS = 50, 64


def library(rows, draws):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI, Trace_ELBO

    from numpyro_vae import AutoAmortizedNormal, Posterior

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENTS]).to_event(1))
            pixels = dist.Normal(z.sum(-1, keepdims=True), jnp.ones(PIXELS))
            numpyro.sample("x", pixels.to_event(1), obs=x)

    x = np.random.default_rng(0).normal(size=(rows, PIXELS)).astype(np.float32)
    guide = AutoAmortizedNormal(model)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), jnp.asarray(x[:8])))
    posterior = Posterior(guide, params)
    posterior.sample(jax.random.key(1), x[:200], draws)  # compiles
    return lambda: posterior.sample(jax.random.key(1), x, draws)["z"]


def by_hand(rows, draws):
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    loc, log_scale = rng.normal(size=(2, rows, LATENTS)).astype(np.float32)

    @jax.jit
    def draw(rng_key, loc, log_scale):
        noise = jax.random.normal(rng_key, (draws, *loc.shape))
        return loc + jax.numpy.exp(log_scale) * noise

    draw.lower(jax.random.key(0), loc, log_scale).compile()
    return lambda: np.asarray(draw(jax.random.key(0), loc, log_scale))


def measure(way, rows, draws):
    run = {"library": library, "by_hand": by_hand}[way](rows, draws)
    kept = []  # the draws are in memory when its peak is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = seconds_of(lambda: kept.append(run()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "memory": peak * 1024 / kept[0].nbytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--way", choices=["library", "by_hand"], help="measure it, print JSON")
    args = parser.parse_args()
    rows, draws = TINY if args.smoke else FULL
    if args.way:
        return measure(args.way, rows, draws)
    command = [sys.executable, __file__, *["--smoke"] * args.smoke, "--way"]
    found = {"by_hand": [], "library": []}
    for _ in range(1 if args.smoke else args.repeats):
        for way, results in found.items():
            output = subprocess.check_output([*command, way])
            results.append(json.loads(output.splitlines()[-1]))
    report(f"{rows:,} rows x {draws:,} draws x {LATENTS} latents", found)


def report(title, found):
    print(f"\n{title}")
    medians = {
        way: [statistics.median(r[key] for r in results) for key in ("seconds", "memory")]
        for way, results in found.items()
    }
    for way, (seconds, memory) in medians.items():
        ratio = seconds / medians["by_hand"][0]
        print(f"  {way:<10}{seconds:8.2f} s {ratio:7.3f}x   peak memory {memory:5.2f}x the result")


if __name__ == "__main__":
    main()
