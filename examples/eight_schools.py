"""Eight schools by a network that has seen simulated schools only, beside NUTS.

Run ``python examples/eight_schools.py``. Eight schools measured what coaching adds to a test's
score, each with its own standard error (Rubin, *Estimation in Parallel Randomized Experiments*,
Journal of Educational Statistics 1981). The model is of one such experiment. Here a guide learns
the posterior of any experiment of eight schools, whatever the standard errors, from simulations of
the model; then it reads the one that took place. One pass of the network gives its posterior, a
check says how good that is, and ``repair`` makes it better.
A picture and an ArviZ DataTree are written into ``output/``.
"""

import argparse
from pathlib import Path
from typing import Any

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

from numpyro_vae import (
    AutoAmortizedFlow,
    ForwardKL,
    Posterior,
    Simulations,
    data_sets,
    fit,
)

EFFECT = np.array([[28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]], np.float32)
ERROR = np.array([[15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]], np.float32)


def schools(effect: jax.Array, error: jax.Array) -> None:
    """The model of one experiment."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


# The distance of each school from the others in units of tau, which no funnel is in.
model = handlers.reparam(schools, config={"theta": LocScaleReparam(0.0)})


def effects(error: np.ndarray) -> np.ndarray:
    """Draw what schools measure, by whose scale the encoder standardizes."""
    with handlers.seed(rng_seed=0), handlers.trace() as trace, handlers.uncondition():
        data_sets(model)(np.zeros_like(error), error)
    return np.asarray(trace["effect"]["value"])


def train(num_data: int, num_epochs: int) -> Posterior:
    """Learn from experiments that the model makes, with standard errors of 5 to 25."""
    rng = np.random.default_rng(0)
    error = np.exp(rng.uniform(np.log(5.0), np.log(25.0), size=(num_data, 8))).astype(np.float32)
    experiments = data_sets(model)

    def inputs(effect: jax.Array, error: jax.Array) -> Any:
        """Effects on a scale on which those that a HalfCauchy spreads widely are not far."""
        return experiments.inputs(jnp.arcsinh(effect / 10.0), jnp.log(error))

    guide = AutoAmortizedFlow(experiments, inputs=inputs)
    num_steps = num_epochs * -(-num_data // 256)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
    svi = SVI(experiments, guide, optimizer, ForwardKL())
    simulations = Simulations(num_data, like=(effects(error), error))
    result = fit(svi, jax.random.key(0), simulations, num_epochs=num_epochs, batch_size=256)
    return Posterior(guide, result)


def run_nuts(num_samples: int) -> dict[str, np.ndarray]:
    """Draw from the posterior of the experiment."""
    kernel = NUTS(model, target_accept_prob=0.95)
    mcmc = MCMC(kernel, num_warmup=1_000, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(3), EFFECT[0], ERROR[0])
    return {name: np.asarray(draws) for name, draws in mcmc.get_samples().items()}


def flat(draws: dict[str, np.ndarray]) -> np.ndarray:
    """What is compared: mu, tau and the effects, a column each."""
    theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["theta_decentered"]
    return np.column_stack([draws["mu"], draws["tau"], theta])


def compare(found: dict[str, np.ndarray]) -> None:
    """Print means and standard deviations beside those of NUTS."""
    names = ["mu", "tau", *(f"theta {letter}" for letter in "ABCDEFGH")]
    print(f"\n{'':10}" + "".join(f"{name:>22}" for name in found))
    for number, name in enumerate(names):
        cells = (f"{x[:, number].mean():13.2f} ({x[:, number].std():5.2f})" for x in found.values())
        print(f"{name:10}" + "".join(f"{cell:>22}" for cell in cells))
    exact = found["NUTS"]
    for name, draws in found.items():
        shift = np.abs(draws.mean(0) - exact.mean(0)) / exact.std(0)
        ratio = draws.std(0) / exact.std(0)
        print(
            f"{name}: means within {shift.max():.3f} sd of those of NUTS, sds "
            f"{ratio.min() - 1:+.1%} to {ratio.max() - 1:+.1%}"
        )


def draw(found: dict[str, np.ndarray], path: Path) -> None:
    """Each school's effect with 80% intervals, and the spread of the schools."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    places = np.arange(8)
    left.errorbar(places - 0.3, EFFECT[0], ERROR[0], fmt="k.", alpha=0.4, label="measured")
    for number, (name, draws) in enumerate(found.items()):
        low, mid, high = np.quantile(draws[:, 2:], [0.1, 0.5, 0.9], axis=0)
        beside, bars = places + 0.15 * number - 0.1, [mid - low, high - mid]
        left.errorbar(beside, mid, bars, fmt="o", label=name)
        right.hist(draws[:, 1], np.linspace(0, 25, 40), density=True, histtype="step", label=name)
    left.set(xticks=places, xticklabels=list("ABCDEFGH"), ylabel="effect of coaching")
    right.set(xlabel="tau", ylabel="density")
    left.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, read the experiment, check and repair, and compare with NUTS."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    num_data, num_epochs, num_samples = (512, 2, 200) if options.quick else (10_000, 200, 4_000)

    posterior, data = train(num_data, num_epochs), (EFFECT, ERROR)
    tree = posterior.to_datatree(jax.random.key(1), data, num_samples)
    report = posterior.check(jax.random.key(2), data, checks="importance")
    print(report)
    better = posterior.repair(jax.random.key(3), data, [0], num_samples=num_samples)
    print(better)
    repaired = better.add_to(tree)
    found = {
        "one pass": flat(draws_of(tree)),
        "repaired": flat(draws_of(repaired)),
        "NUTS": flat(run_nuts(num_samples)),
    }
    compare(found)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(found, options.output / "eight_schools.png")
    repaired.to_netcdf(options.output / "eight_schools.nc")


def draws_of(tree: Any) -> dict[str, np.ndarray]:
    """Return the draws of the one experiment."""
    return {name: x.values[0, :, 0] for name, x in tree.posterior.data_vars.items()}


if __name__ == "__main__":
    main()
