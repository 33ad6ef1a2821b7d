"""Guides of one hierarchical model of radon side by side, also those of all counties at once.

Run ``python examples/compare_radon.py``. The model is that of ``radon.py``: an intercept for each
of 85 counties, and four latents that all of them share. Compared are NumPyro's ``AutoNormal``,
``AutoMultivariateNormal`` and ``AutoIAFNormal``; a guide written by hand, which has the counties'
exact posterior given what they share, as all is Normal; and two amortized ones, which read a
county's houses. The full-rank and the flow guide of NumPyro's draw all counties jointly, so that no
county has a posterior of its own: they are compared by the bound and the k-hat of the whole. It
prints the table, and what NUTS says of each guide's means and standard deviations. A picture is
written into ``output/``.

The data are ArviZ's example ``radon``, which it downloads, with a checksum, when first asked for;
``--data radon.npz`` reads a local file instead, as ``radon.py`` does.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from matplotlib.figure import Figure
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from radon import GLOBALS, Data, make_model, read

from numpyro_vae import (
    AutoAmortizedFlow,
    AutoAmortizedNormal,
    Posterior,
    Reference,
    Segments,
    SetEncoder,
    compare,
    plot_comparison,
)

Model = Callable[..., None]
POSITIVE = dist.constraints.positive


def make_by_hand(num_counties: int) -> Model:
    """Return a guide with the counties' exact posterior given what they share."""

    def shared(name: str, fn: Callable[..., Any]) -> jax.Array:
        loc = numpyro.param(f"{name}_loc", 0.0)
        scale = numpyro.param(f"{name}_scale", 0.1, constraint=POSITIVE)
        return jnp.asarray(numpyro.sample(name, fn(loc, scale)))

    def guide(county: jax.Array, floor: jax.Array, log_radon: jax.Array) -> None:
        mu, slope = shared("mu", dist.Normal), shared("slope", dist.Normal)
        tau, sigma = shared("tau", dist.LogNormal), shared("sigma", dist.LogNormal)
        total = partial(jax.ops.segment_sum, segment_ids=county, num_segments=num_counties)
        precision = tau**-2 + total(jnp.ones_like(floor)) / sigma**2
        loc = (mu / tau**2 + total(log_radon - slope * floor) / sigma**2) / precision
        with numpyro.plate("county", num_counties):
            numpyro.sample("intercept", dist.Normal(loc, precision**-0.5))

    return guide


def make_amortized(family: type, model: Model, num_counties: int) -> Any:
    """Return a guide that reads a county's houses and what counties share."""

    def houses(county: jax.Array, floor: jax.Array, log_radon: jax.Array) -> Segments:
        return Segments({"floor": floor, "log_radon": log_radon}, county, num_counties)

    sizes: dict[str, Any] = {"element_sizes": (16,), "hidden_sizes": (32,)}
    return family(
        model,
        partial(SetEncoder, **sizes, activation=nnx.tanh, standardize=True),
        inputs=houses,
        plate="county",
        segments={"house": lambda county, floor, log_radon: county},
        condition_on=GLOBALS,
        global_guide=AutoMultivariateNormal,
    )


def train(data: Data, model: Model, num_steps: int) -> dict[str, Posterior]:
    """Train every guide with the same steps, and return the posteriors by name."""
    number = len(data.names)
    guides: dict[str, Any] = {
        "AutoNormal": AutoNormal(model),
        "AutoMultivariateNormal": AutoMultivariateNormal(model, init_scale=0.1),
        "AutoIAFNormal": AutoIAFNormal(model, num_flows=1),
        "by hand": make_by_hand(number),
        "amortized Normal": make_amortized(AutoAmortizedNormal, model, number),
        "amortized flow": make_amortized(AutoAmortizedFlow, model, number),
    }
    found = {}
    for name, guide in guides.items():
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
        svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=4))
        result = svi.run(jax.random.key(0), num_steps, *data.houses, progress_bar=False)
        of_counties: dict[str, Any] = {}
        if not name.startswith("amortized"):  # whose guides know it
            county_of = {"house": lambda county, floor, log_radon: county}
            of_counties = {"model": model, "plate": "county", "segments": county_of}
        found[name] = Posterior(guide, result, batch_axes=None, **of_counties)
    return found


def main() -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a local radon.npz; else ArviZ downloads them")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps, num_samples = (100, 200) if args.quick else (6000, 2000)

    data = read(args.data)
    model = make_model(len(data.names))
    posteriors = train(data, model, num_steps)
    found = compare(posteriors, jax.random.key(1), data.houses)
    print(found)

    chains = {"num_chains": 2, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(NUTS(model), num_warmup=num_samples // 2, num_samples=num_samples, **chains)
    mcmc.run(jax.random.key(2), *data.houses)
    print(f"\nAgainst NUTS, {len(data.names)} counties")
    for name, posterior in posteriors.items():
        check = Reference(mcmc, num_samples=num_samples)
        report = posterior.check(jax.random.key(3), data.houses, check, progress_bar=False)
        for finding in report.findings:
            print(f"{name}: {finding.text}")

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    plot_comparison(found, ax=figure.add_subplot())
    figure.savefig(args.output / "compare_radon.png", dpi=110)
    print(f"\nWrote {args.output / 'compare_radon.png'}")


if __name__ == "__main__":
    main()
