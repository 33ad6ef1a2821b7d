"""Posteriors of simulated data sets beside exact ones: tasks of a benchmark that is published.

    python benchmarks/sbibm.py [--num-simulations 10000] [--references sbibm_jax/tasks]

Four tasks of Lueckmann et al., *Benchmarking Simulation-Based Inference* (AISTATS 2021), as plain
NumPyro models of one data set. A guide learns from a budget of simulations by `ForwardKL`, and
reads observations in one pass. Its draws are compared with those of the posterior by the classifier
two-sample test, as there: the accuracy, on draws held out, of a classifier that tells the two
apart; 0.5 if it cannot, 1 if it always can.

By default observations are drawn from the model, and references from the exact posterior, which is
not known for `slcp`. ``--references`` reads the published observations and references from a folder
that holds ``<task>/files/num_observation_<i>/``, such as the tasks of the package ``sbibm-jax``.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.infer import SVI
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

from numpyro_vae import (
    AutoAmortizedFlow,
    ForwardKL,
    Posterior,
    Simulations,
    data_sets,
    fit,
)

NOISE = math.sqrt(0.1)  # of the linear tasks, in which it is a variance that is 0.1

# -- the models of one data set --------------------------------------------------------------------


def gaussian_linear(x: jax.Array) -> None:
    theta = numpyro.sample("theta", dist.Normal(0.0, NOISE).expand([10]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, NOISE).to_event(1), obs=x)


def gaussian_linear_uniform(x: jax.Array) -> None:
    theta = numpyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([10]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, NOISE).to_event(1), obs=x)


def slcp(x: jax.Array) -> None:
    theta = jnp.asarray(numpyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1)))
    scale, corr = theta[2:4] ** 2, jnp.tanh(theta[4])
    correlation = jnp.eye(2) + corr * (1.0 - jnp.eye(2))
    covariance = jnp.outer(scale, scale) * correlation + 1e-6 * jnp.eye(2)
    with numpyro.plate("point", 4):
        numpyro.sample("x", dist.MultivariateNormal(theta[:2], covariance), obs=x)


class Crescent(dist.Distribution):
    """Points on half a ring around ``loc``, which is about 0.1 wide and 0.01 thick."""

    support = dist.constraints.real_vector
    pytree_data_fields = ("loc",)

    def __init__(self, loc: Any):
        self.loc = loc
        super().__init__(jnp.shape(loc)[:-1], (2,))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        keys, shape = jax.random.split(key), sample_shape + self.batch_shape
        angle = jax.random.uniform(keys[0], shape, minval=-math.pi / 2, maxval=math.pi / 2)
        radius = 0.1 + 0.01 * jax.random.normal(keys[1], shape)
        return self.loc + radius[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        del intermediates
        offset = value - self.loc
        radius = jnp.linalg.norm(offset, axis=-1)
        log_prob = dist.Normal(0.1, 0.01).log_prob(radius) - jnp.log(math.pi * radius)
        return jnp.where(offset[..., 0] > 0, log_prob, -jnp.inf)


def two_moons(x: jax.Array) -> None:
    theta = jnp.asarray(numpyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1)))
    total, difference = theta.sum() / math.sqrt(2.0), (theta[1] - theta[0]) / math.sqrt(2.0)
    loc = jnp.array([0.25, 0.0]) + jnp.stack([-jnp.abs(total), difference])
    numpyro.sample("x", Crescent(loc), obs=x)


# -- their exact posteriors ------------------------------------------------------------------------

Exact = Callable[[jax.Array, np.ndarray, int], np.ndarray]


def exact_linear(rng_key: jax.Array, x: np.ndarray, num_samples: int) -> np.ndarray:
    noise = jax.random.normal(rng_key, (num_samples, 10))
    return np.asarray(x / 2 + NOISE / math.sqrt(2.0) * noise)


def exact_uniform(rng_key: jax.Array, x: np.ndarray, num_samples: int) -> np.ndarray:
    low, high = (-1.0 - x) / NOISE, (1.0 - x) / NOISE
    noise = jax.random.truncated_normal(rng_key, low, high, (num_samples, 10))
    return np.asarray(x + NOISE * noise)


def exact_moons(rng_key: jax.Array, x: np.ndarray, num_samples: int) -> np.ndarray:
    """Each point of the ring tells theta but for a sign; those outside the prior do not count."""
    ring_key, sign_key = jax.random.split(rng_key)
    ring = Crescent(jnp.array([0.25, 0.0])).sample(ring_key, (20 * num_samples,))
    size, difference = ring[:, 0] - x[0], x[1] - ring[:, 1]
    total = size * jax.random.rademacher(sign_key, size.shape, size.dtype)
    theta = np.stack([total - difference, total + difference], -1) / math.sqrt(2.0)
    inside = (np.abs(theta) <= 1).all(-1) & (np.asarray(size) >= 0)
    return theta[inside][:num_samples]


class Task(NamedTuple):
    """A model, the shape of its data, and draws from its posterior if they are known."""

    model: Callable[..., None]
    shape: tuple[int, ...]
    exact: Exact | None


TASKS = {
    "gaussian_linear": Task(gaussian_linear, (10,), exact_linear),
    "gaussian_linear_uniform": Task(gaussian_linear_uniform, (10,), exact_uniform),
    "two_moons": Task(two_moons, (2,), exact_moons),
    "slcp": Task(slcp, (4, 2), None),
}

# -- how well a guide does -------------------------------------------------------------------------


def train(task: Task, num_simulations: int, num_steps: int) -> Posterior:
    """Learn from a budget of simulations, the same in all epochs."""
    sets = data_sets(task.model)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    guide = AutoAmortizedFlow(sets, num_layers=4, hidden_sizes=(64,))
    svi = SVI(sets, guide, optimizer, ForwardKL())
    like = simulate(task, num_simulations, seed=0)  # on whose scale the encoder is
    simulations = Simulations(num_simulations, like=like, redraw_every=None)
    batch_size = min(256, num_simulations)
    num_epochs = max(1, num_steps // (num_simulations // batch_size))
    options = {"num_epochs": num_epochs, "batch_size": batch_size, "progress_bar": False}
    return Posterior(guide, fit(svi, jax.random.key(0), simulations, **options))


def simulate(task: Task, count: int, seed: int) -> np.ndarray:
    """Draw data sets from the model."""
    with handlers.seed(rng_seed=seed), handlers.trace() as trace, handlers.uncondition():
        data_sets(task.model)(np.zeros((count, *task.shape), np.float32))
    return np.asarray(trace["x"]["value"])


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


def read(path: Path) -> np.ndarray:
    """Read a table of numbers with a line of names."""
    return np.loadtxt(path, np.float32, delimiter=",", skiprows=1, ndmin=2)


def c2st(exact: np.ndarray, found: np.ndarray) -> float:
    """Return the accuracy of the published classifier, on five folds."""
    loc, scale = exact.mean(0), exact.std(0)
    draws = (np.concatenate([exact, found]) - loc) / scale
    labels = np.repeat([0, 1], [len(exact), len(found)])
    width = 10 * draws.shape[1]
    classifier = MLPClassifier((width, width), max_iter=1000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    return cross_val_score(classifier, draws, labels, cv=folds, scoring="accuracy").mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--num-simulations", type=int, default=10_000)
    parser.add_argument("--num-steps", type=int, default=8_000)
    parser.add_argument("--num-observations", type=int, default=10)
    parser.add_argument("--num-samples", type=int, default=10_000, help="draws of each posterior")
    parser.add_argument("--references", type=Path, help="a folder of published ones")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    options = parser.parse_args()
    if options.smoke:
        options.tasks, options.num_simulations, options.num_steps = ["two_moons"], 256, 2
        options.num_observations, options.num_samples = 1, 50
    print(f"{options.num_simulations} simulations, {options.num_steps} steps")
    for name in options.tasks:
        if options.references is None and TASKS[name].exact is None:
            print(f"{name:24} left out: it needs --references")
            continue
        posterior = train(TASKS[name], options.num_simulations, options.num_steps)
        count, num_samples = options.num_observations, options.num_samples
        seen, exact = observations(name, options.references, count, num_samples)
        draws = posterior.sample(jax.random.key(2), seen, num_samples)["theta"]
        scores = [c2st(one, draws[: len(one), i]) for i, one in enumerate(exact)]
        told = " ".join(f"{score:.3f}" for score in scores)
        print(f"{name:24} C2ST {np.mean(scores):.3f}, by observation {told}", flush=True)


if __name__ == "__main__":
    main()
