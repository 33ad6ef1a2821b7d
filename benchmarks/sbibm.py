"""Posteriors of simulated data sets beside exact ones: tasks of a benchmark that is published.

    python benchmarks/sbibm.py [--num-simulations 10000] [--references sbibm_jax/tasks] [--repair]
        [--seed 0]

Eight tasks of Lueckmann et al., *Benchmarking Simulation-Based Inference* (AISTATS 2021), as plain
NumPyro models of one data set. A guide learns from a budget of simulations by `ForwardKL`, with one
set of options for all tasks, and reads observations in one pass. Its draws are compared with those
of the posterior by the classifier two-sample test, as there: the accuracy, on draws held out, of a
classifier that tells the two apart; 0.5 if it cannot, 1 if it always can. The figure of the paper's
neural posterior estimation (NPE) stands beside it.

By default observations are drawn from the model, and references from the exact posterior where it
is known. ``--references`` reads the published observations and references from a folder that
holds ``<task>/files/num_observation_<i>/``, such as the tasks of the package ``sbibm-jax``.
``--repair`` repairs each posterior with the model's density, which the figures of the paper do not
use, and times NUTS on the same data sets.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, init_to_sample
from sbibm_tasks import TASKS, Task, read
from two_sample import c2st

from numpyro_vae import AutoAmortizedFlow, ForwardKL, Posterior, Simulations, data_sets, fit
from numpyro_vae.encoders import ResidualMLP
from numpyro_vae.scales.parameterization import LogScale

BUDGETS = (1_000, 10_000, 100_000)  # of the published figures
DECAYS = (0.0, 100.0)  # of weights, at 1,000 simulations; each that there are more counts for less
ROUND = 1_000  # draws of a repair, of 10,000 proposals, so that few are drawn twice


def simulate(task: Task, count: int, seed: int) -> np.ndarray:
    """Draw data sets from the model."""
    with handlers.seed(rng_seed=seed), handlers.trace() as trace, handlers.uncondition():
        data_sets(task.model)(np.zeros((count, *task.shape), np.float32))
    return np.asarray(trace["x"]["value"], np.float32)


def steps_of(budget: int) -> int:
    """Return how many steps to train: 40 times the root of the budget, or some 40 epochs."""
    return round(max(40 * math.sqrt(budget), 0.38 * budget))


def train(task: Task, budget: int, num_steps: int, seed: int = 0) -> Posterior:
    """Learn from a budget of simulations, the same in all epochs.

    A twentieth of them tells the encoder the scale of data, and a tenth when to stop, and which
    decay of the weights to keep: some posteriors are nearly linear in the data, others are not.
    """
    sets = data_sets(task.model)
    for_scale, for_stopping = max(budget // 20, 1), max(budget // 10, 1)
    seen = simulate(task, for_scale, seed=2 * seed)  # odd seeds are of observations
    count = budget - for_scale - for_stopping
    batch_size = min(100, count)
    like = np.resize(seen, (max(batch_size, for_scale), *task.shape))
    num_epochs = max(1, num_steps // -(-count // batch_size))
    encoder = (
        partial(ResidualMLP, hidden_size=64, activation=nnx.silu) if len(task.shape) == 1 else None
    )
    options = {} if task.reads is None else {"inputs": task.reads}
    guide = AutoAmortizedFlow(sets, encoder, scale=LogScale(init_scale=1.0), **options)
    rate = optax.cosine_decay_schedule(1e-2, num_steps)
    results = []
    for decay in DECAYS:
        adam = optax.adamw(rate, weight_decay=decay * 1_000 / budget, mask=is_not_linear)
        optimizer = optax.chain(optax.clip_by_global_norm(5.0), adam)
        result = fit(
            SVI(sets, guide, optimizer, ForwardKL()),
            jax.random.key(seed),
            Simulations(count, like=like, redraw_every=None),
            batch_size=batch_size,
            num_epochs=num_epochs,
            validation=np.resize(seen, (for_stopping, *task.shape)),  # drawn anew for the loss
            patience=num_epochs,  # the rate falls to zero at the end only; the best is kept
            progress_bar=False,
        )
        results.append(result)
    return Posterior(guide, min(results, key=lambda found: found.history["validation_loss"].min()))


def is_not_linear(params: Any) -> Any:
    """Say which weights decay: not those of the map from data to means, which may be linear."""

    def decays(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return "'kernel'" in name and "'linear'" not in name and "'loc'" not in name

    return jax.tree_util.tree_map_with_path(decays, params)


def observations(
    name: str, references: Path | None, count: int, num_samples: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return observations, and draws from the posterior of each."""
    task = TASKS[name]
    if references is not None:
        folders = [references / name / "files" / f"num_observation_{i + 1}" for i in range(count)]
        seen = [read(folder / "observation.csv").reshape(task.shape) for folder in folders]
        files = [folder / "reference_posterior_samples.csv.bz2" for folder in folders]
        return np.stack(seen), [read(file)[:num_samples] for file in files]
    seen = simulate(task, count, seed=1)
    return seen, [
        task.exact(jax.random.key(number), x, num_samples) for number, x in enumerate(seen)
    ]


def score(exact: list[np.ndarray], draws: np.ndarray) -> str:
    """Return the mean score, and that of each observation, as text."""
    scores = [c2st(one, draws[: len(one), i]) for i, one in enumerate(exact)]
    return f"C2ST {np.mean(scores):.3f}, by observation " + " ".join(f"{x:.3f}" for x in scores)


def repaired(posterior: Posterior, seen: np.ndarray, num_samples: int) -> tuple[np.ndarray, Any]:
    """Return repaired draws, of several calls where they are weighed, and what was measured."""
    repair = partial(posterior.repair, data=seen)
    first = repair(jax.random.key(3), rows=np.arange(len(seen)), num_samples=num_samples)
    draws = np.array(first.groups["posterior"]["theta"])
    weighed = np.flatnonzero(first.dataset["method"].values != "nuts")
    if weighed.size:
        keys = jax.random.split(jax.random.key(4), -(-num_samples // ROUND))
        rounds = [repair(key, rows=weighed, num_samples=ROUND) for key in keys]
        every = np.concatenate([found.groups["posterior"]["theta"] for found in rounds])
        draws[:, weighed] = every[:num_samples]
    return draws, first.dataset


def nuts(task: Task, x: np.ndarray, num_samples: int) -> float:
    """Return the seconds that NUTS takes for the draws of one observation."""
    started = time.perf_counter()
    kernel = NUTS(task.model, init_strategy=init_to_sample)
    MCMC(kernel, num_warmup=500, num_samples=num_samples, progress_bar=False).run(
        jax.random.key(0), x
    )
    return time.perf_counter() - started


def run(name: str, options: argparse.Namespace) -> None:
    """Print the scores of a task."""
    task, count, num_samples = TASKS[name], options.num_observations, options.num_samples
    if options.references is None and task.exact is None:
        print(f"{name:24} left out: it needs --references")
        return
    started = time.perf_counter()
    posterior = train(task, options.num_simulations, options.num_steps, options.seed)
    seconds = time.perf_counter() - started
    seen, exact = observations(name, options.references, count, num_samples)
    draws = posterior.sample(jax.random.key(2), seen, num_samples)["theta"]
    published = dict(zip(BUDGETS, task.published, strict=True)).get(options.num_simulations)
    print(f"{name:24} {score(exact, draws)} (NPE: {published}; {seconds:.0f} s)", flush=True)
    if options.repair:
        started = time.perf_counter()
        draws, measured = repaired(posterior, seen, num_samples)
        seconds = time.perf_counter() - started
        khats = " ".join(f"{khat:.2f}" for khat in measured["khat"].values)
        methods = " ".join(measured["method"].values)
        print(f"{'after repair':24} {score(exact, draws)} ({seconds:.0f} s)")
        print(f"{'':24} k-hat {khats}; by {methods}")
        one = nuts(task, seen[0], num_samples)
        print(f"{'':24} NUTS takes {one:.0f} s for the first observation", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--num-simulations", type=int, default=10_000)
    parser.add_argument("--num-steps", type=int, help="by default by the budget; see steps_of")
    parser.add_argument("--num-observations", type=int, default=10)
    parser.add_argument("--num-samples", type=int, default=10_000, help="draws of each posterior")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--references", type=Path, help="a folder of published ones")
    parser.add_argument("--repair", action="store_true", help="also repair, and time NUTS")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    options = parser.parse_args()
    if options.smoke:
        options.tasks, options.num_simulations, options.num_steps = ["two_moons"], 256, 2
        options.num_observations, options.num_samples = 1, 50
    options.num_steps = options.num_steps or steps_of(options.num_simulations)
    print(f"{options.num_simulations} simulations, {options.num_steps} steps")
    for name in options.tasks:
        run(name, options)


if __name__ == "__main__":
    main()
