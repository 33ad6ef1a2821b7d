"""Radon in the counties of eight states, by a network that has seen simulated states only.

Run ``python examples/radon_states.py``. The model is of one state: counties whose levels vary about
a mean, and houses in them, of which those measured on a ground floor have less radon (Gelman and
Hill, *Data Analysis Using Regression and Multilevel/Hierarchical Models*, 2007). A guide learns the
posterior of any state, of 10 to 120 counties with 1 to 30 houses each, from simulations. Then it
reads eight real ones in one pass; a check says of each how good that is, and ``repair`` mends what
is not. All are compared with NUTS, state by state.
A picture and an ArviZ DataTree are written into ``output/``.

``radon_states.npz`` beside this file has the 12,490 houses of the State Residential Radon Survey of
the Environmental Protection Agency (1987 and 1988) of which the floor is known. Of a county with
more than 30 houses, 30 are taken at random.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from matplotlib.figure import Figure
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI
from numpyro.infer.reparam import LocScaleReparam

from numpyro_vae import AutoAmortizedFlow, ForwardKL, Posterior, Simulations, data_sets, fit

COUNTIES, HOUSES = 120, 30  # at most
GLOBALS = ("mu", "tau", "slope", "sigma")
# R5 are the reservations of region 5 of the agency.
STATES = ("AZ", "IN", "MA", "MN", "MO", "ND", "PA", "R5")


def one_state(floor: jax.Array, log_radon: jax.Array) -> None:
    """The model of one state, of arrays ``(counties, houses)``."""
    mu = numpyro.sample("mu", dist.Normal(1.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
    slope = numpyro.sample("slope", dist.Normal(-0.5, 0.5))
    sigma = numpyro.sample("sigma", dist.LogNormal(-0.2, 0.3))
    with numpyro.plate("county", floor.shape[0], dim=-2):
        level = jnp.asarray(numpyro.sample("level", dist.Normal(mu, tau)))
        with numpyro.plate("house", floor.shape[1], dim=-1):
            loc = level + slope * floor
            numpyro.sample("log_radon", dist.Normal(loc, sigma), obs=log_radon)


# The levels as distances from the mean in units of tau, which no funnel is in.
states = data_sets(handlers.reparam(one_state, config={"level": LocScaleReparam(0.0)}))


class Data(NamedTuple):
    """States, padded: the arguments of the model, and how many counties and houses are there."""

    floor: np.ndarray
    log_radon: np.ndarray
    sizes: dict[str, np.ndarray]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model of all states takes."""
        return self._asdict()


def read(path: Path, names: Sequence[str]) -> Data:
    """Return states that were surveyed."""
    rng = np.random.default_rng(0)
    with np.load(path) as file:
        county, floor, activity = (file[name] for name in ("county", "floor", "activity"))
        state_of_county = file["state_of_county"]
    floors, radons = np.zeros((2, len(names), COUNTIES, HOUSES), np.float32)
    sizes = {"county": np.zeros(len(names), int), "house": np.zeros((len(names), COUNTIES), int)}
    for state, name in enumerate(names):
        numbers = np.intersect1d(np.flatnonzero(state_of_county == name), county)
        sizes["county"][state] = len(numbers)
        for place, number in enumerate(numbers):
            houses = rng.permutation(np.flatnonzero(county == number))[:HOUSES]
            sizes["house"][state, place] = len(houses)
            floors[state, place, : len(houses)] = floor[houses]
            # In tenths of a picocurie a litre; less than one tenth counts as one.
            radons[state, place, : len(houses)] = np.log(np.maximum(activity[houses], 1) / 10)
    return Data(floors, radons, sizes)


def imagine(count: int, seed: int = 0) -> Data:
    """Make states up: their sizes and floors, and radon by the model."""
    rng = np.random.default_rng(seed)
    sizes = {"county": rng.integers(10, COUNTIES + 1, size=count)}
    sizes["county"][:2] = 10, COUNTIES  # both are among the few of a quick run
    # Of one state most counties have few houses, of another many.
    typical = np.exp(rng.uniform(np.log(3), np.log(40), size=(count, 1)))
    sizes["house"] = rng.geometric(1 / typical, size=(count, COUNTIES)).clip(1, HOUSES)
    share = rng.beta(1, 1, size=(count, 1, 1))  # of ground floors
    floor = (rng.uniform(size=(count, COUNTIES, HOUSES)) < share).astype(np.float32)
    with handlers.seed(rng_seed=seed), handlers.trace() as trace, handlers.uncondition():
        states(floor, np.zeros_like(floor), sizes=sizes)
    return Data(floor, np.array(trace["log_radon"]["value"]), sizes)


def train(num_steps: int, batch_size: int = 16) -> Posterior:
    """Learn from states that the model makes."""
    guide = AutoAmortizedFlow(states, num_layers=4, hidden_sizes=(64,))
    num_epochs = max(1, num_steps // 250)
    num_data = batch_size * (num_steps // num_epochs)
    simulations = Simulations(num_data, like=imagine(min(num_data, 1024)).arguments)
    schedule = optax.cosine_decay_schedule(3e-3, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    svi = SVI(states, guide, optimizer, ForwardKL())
    result = fit(svi, jax.random.key(0), simulations, num_epochs=num_epochs, batch_size=batch_size)
    return Posterior(guide, result)


Moments = dict[str, np.ndarray]  # by site, means and standard deviations of its values


def moments(draws: dict[str, np.ndarray], num_counties: int) -> Moments:
    """Return means and standard deviations of what is latent in one state, from draws of it."""
    counties = draws["level_decentered"].reshape(len(draws["mu"]), -1)[:, :num_counties]
    level = draws["mu"][:, None] + draws["tau"][:, None] * counties
    found = {name: draws[name].reshape(-1, 1) for name in GLOBALS} | {"level": level}
    return {name: np.stack([x.mean(0), x.std(0)]) for name, x in found.items()}


def of_tree(tree: Any, data: Data) -> list[Moments]:
    """Return the same of each state in a tree."""
    draws = {name: x.values[0] for name, x in tree.posterior.data_vars.items()}
    return [
        moments({name: x[:, place] for name, x in draws.items()}, count)
        for place, count in enumerate(data.sizes["county"])
    ]


def run_nuts(data: Data, num_samples: int) -> list[Moments]:
    """Draw from the posterior of each state."""
    kernel = NUTS(states, target_accept_prob=0.9)
    mcmc = MCMC(
        kernel,
        num_warmup=num_samples // 4,
        num_samples=num_samples,
        jit_model_args=True,
        progress_bar=False,
    )
    found = []
    for place, count in enumerate(data.sizes["county"]):
        one = jax.tree.map(lambda x: x[place : place + 1], data.arguments)  # noqa: B023
        mcmc.run(jax.random.key(4), **one)
        draws = {name: np.asarray(x)[:, 0] for name, x in mcmc.get_samples().items()}
        found.append(moments(draws, count))
    return found


def compare(found: dict[str, list[Moments]], exact: list[Moments]) -> None:
    """Print how far means and standard deviations are from those of NUTS."""
    print("\nbeside NUTS: means off by so many sds at most, and sds")
    for name, by_state in found.items():
        for site in (*GLOBALS, "level"):
            pairs = list(zip(by_state, exact, strict=True))
            off = np.concatenate([np.abs(a[site][0] - b[site][0]) / b[site][1] for a, b in pairs])
            ratio = np.concatenate([a[site][1] / b[site][1] - 1 for a, b in pairs])
            close = np.mean((off < 0.1) & (np.abs(ratio) < 0.1))
            print(
                f"  {name:9} {site:6} median {np.median(off):.3f}, most {off.max():.3f}; "
                f"{ratio.min():+.1%} to {ratio.max():+.1%}; within 0.1 sd and 10%: {close:.0%}"
            )


def draw(found: dict[str, list[Moments]], names: Sequence[str], path: Path) -> None:
    """What each state has outside its counties, and the counties beside NUTS."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic([["mu", "tau", "level"], ["slope", "sigma", "spread"]])
    places = np.arange(len(names))
    for number, (name, by_state) in enumerate(found.items()):
        for site in GLOBALS:
            mean, sd = np.concatenate([of_one[site] for of_one in by_state], axis=1)
            beside = places + 0.2 * (number - 1)
            axes[site].errorbar(beside, mean, sd, fmt="o", markersize=3, label=name)
        if name != "NUTS":
            for place, label in enumerate(("level", "spread")):
                pairs = zip(found["NUTS"], by_state, strict=True)
                x, y = np.concatenate([(a["level"][place], b["level"][place]) for a, b in pairs], 1)
                axes[label].scatter(x, y, s=6, label=name)
    for site in GLOBALS:
        axes[site].set(xticks=places, xticklabels=names, ylabel=f"{site} (mean, sd)")
    for label, what in (("level", "mean"), ("spread", "sd")):
        axes[label].axline((0.3, 0.3), slope=1, color="0.7", zorder=0)
        axes[label].set(xlabel=f"{what} of a county, NUTS", ylabel="by the network")
        axes[label].legend()
    axes["mu"].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, read the states, check and repair, compare with NUTS, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(__file__).parent / "radon_states.npz"
    parser.add_argument("--data", type=Path, default=here, help="another survey in this form")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps, num_samples = (8, 200) if args.quick else (8_000, 4_000)
    names, method = (STATES[:2], "importance") if args.quick else (STATES, "auto")

    data = read(args.data, names)
    given = data.arguments
    posterior = train(num_steps)
    groups = ("posterior", "sample_stats", "observed_data", "constant_data")
    tree = posterior.to_datatree(
        jax.random.key(1), given, num_samples, groups=groups, coords={"data_sets": names}
    )
    report = posterior.check(jax.random.key(2), given, checks="importance")
    print(report)
    start = time.perf_counter()
    better = posterior.repair(
        jax.random.key(3), given, report, method=method, num_samples=num_samples
    )
    print(f"{better}\n{time.perf_counter() - start:.1f} s to repair, compiling included")
    found = {"one pass": of_tree(tree, data)}
    tree = report.add_to(better.add_to(tree))
    found["repaired"] = of_tree(tree, data)
    start = time.perf_counter()
    exact = run_nuts(data, num_samples)
    print(f"{time.perf_counter() - start:.1f} s for NUTS, compiling included")
    compare(found, exact)

    draw(found | {"NUTS": exact}, names, args.output / "radon_states.png")
    path = args.output / "radon_states.nc"
    tree.to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(az.summary(tree.isel(data_sets=[0]), var_names=list(GLOBALS), kind="stats"))


if __name__ == "__main__":
    main()
