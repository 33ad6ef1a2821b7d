"""What the answers of a class say of its pupils and of the questions, for classes of any size.

    python benchmarks/item_response_classes.py [--num-steps 8000]

A class of 20 to 200 pupils answers five questions like those of the Law School Admission Test
(Bock and Lieberman, *Fitting a response model for n dichotomously scored items*, Psychometrika
1970). The mean and the spread of abilities are of the class; the difficulties of the questions are
known from other classes but for 0.5, and are latent too; each pupil has an ability. One guide
learns from simulated classes of all sizes by `ForwardKL`, and reads new ones in one pass. Reported
are how well it finds what new classes were simulated with, and the coverage of its intervals, of
draws as they are and with their importance weights; k-hats; and, for some classes, means and
standard deviations beside those of NUTS, also after `repair`, and the time of each.
"""

import argparse
import time
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI
from numpyro.infer.reparam import LocScaleReparam
from scipy.special import softmax

from numpyro_vae import AutoAmortizedFlow, ForwardKL, Posterior, Simulations, data_sets, fit
from numpyro_vae.inference.psis import pareto_khat

FEWEST, MOST = 20, 200  # pupils
BATCH, EPOCH = 16, 200  # classes in a step, and steps in an epoch
DIFFICULTY = np.array([-2.5, -1.0, -0.25, -1.25, -2.0], np.float32)  # of each question elsewhere
SITES = ("level", "spread", "difficulty", "ability")
INTERVALS = (0.5, 0.9)
BY_NUTS = (20, 60, 120, 200)  # sizes of the classes that NUTS samples too

Arrays = dict[str, np.ndarray]
Data = dict[str, Any]


def answers(correct: jax.Array) -> None:
    """The model of one class, ``(pupils, questions)``."""
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    difficulty = numpyro.sample("difficulty", dist.Normal(DIFFICULTY, 0.5).to_event(1))
    with numpyro.plate("pupil", len(correct)):
        ability: Any = numpyro.sample("ability", dist.Normal(level, spread))
        given = dist.BernoulliLogits(ability[..., None] - difficulty)
        numpyro.sample("correct", given.to_event(1), obs=correct)


# Distances from the class in units of its spread, as no funnel is in these.
model = handlers.reparam(answers, config={"ability": LocScaleReparam(0.0)})
sets = data_sets(model)


def simulate(sizes: np.ndarray, seed: int) -> tuple[Data, Arrays]:
    """Draw classes of some sizes, and the latents that they were made with."""
    empty, counts = np.zeros((len(sizes), MOST, len(DIFFICULTY)), np.float32), {"pupil": sizes}
    with handlers.seed(rng_seed=seed), handlers.trace() as trace, handlers.uncondition():
        sets(empty, sizes=counts)
    found = {name: np.asarray(trace[name]["value"]) for name in (*SITES, "correct")}
    return {"correct": found.pop("correct"), "sizes": counts}, found


def sizes(count: int, seed: int) -> np.ndarray:
    """Draw sizes of classes, both ends among them."""
    drawn = np.random.default_rng(seed).integers(FEWEST, MOST + 1, size=count)
    drawn[:2] = FEWEST, MOST
    return drawn


def train(num_steps: int) -> Posterior:
    """Learn from classes that the model makes."""
    guide = AutoAmortizedFlow(sets, num_layers=4, hidden_sizes=(64,))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
    )
    num_epochs = max(1, num_steps // EPOCH)
    simulations = Simulations(
        BATCH * (num_steps // num_epochs), like=simulate(sizes(512, seed=0), seed=0)[0]
    )
    options = {"num_epochs": num_epochs, "batch_size": BATCH, "progress_bar": False}
    svi = SVI(sets, guide, optimizer, ForwardKL())
    return Posterior(guide, fit(svi, jax.random.key(0), simulations, **options))


# -- recovery and coverage -------------------------------------------------------------------------


def abilities(draws: Arrays) -> Arrays:
    """Return draws, ``(draws, classes, ...)``, with abilities for their distances."""
    of_class = [np.asarray(draws[name])[..., None] for name in ("level", "spread")]
    ability = of_class[0] + of_class[1] * np.asarray(draws["ability_decentered"])
    return {name: np.asarray(draws[name]) for name in SITES[:-1]} | {"ability": ability}


def moments(draws: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations of draws ``(draws, values)``."""
    mean = weights @ draws
    return mean, np.sqrt(weights @ (draws - mean) ** 2)


def judge(posterior: Posterior, counts: np.ndarray, num_samples: int) -> None:
    """Print what is found of new classes, and the k-hats of their draws."""
    (data, truth), key = simulate(counts, seed=1), jax.random.key(2)
    draws = abilities(posterior.sample(key, data, num_samples))
    log_weights = posterior.log_weights(key, data, num_samples)
    for name, share in {"one pass": 0.0, "with importance weights": 1.0}.items():
        print(name)
        weights = softmax(share * log_weights, axis=0)
        for site in SITES:
            print(f"  {site:10} {recovery(site, draws[site], weights, truth[site], counts)}")
    khat = pareto_khat(log_weights)
    print(
        f"k-hats: {np.mean(khat > 0.7):.1%} above 0.7, median {np.median(khat):.2f}, 90% "
        f"{np.quantile(khat, 0.9):.2f}",
        flush=True,
    )


def recovery(
    name: str, draws: np.ndarray, weights: np.ndarray, truth: np.ndarray, counts: np.ndarray
) -> str:
    """Return how near means are to the truth, and how often intervals have it, as text.

    Args:
        name: of the site.
        draws: of it, ``(draws, classes, ...)``.
        weights: of draws, ``(draws, classes)``.
        truth: what classes were simulated with.
        counts: how many pupils each has.
    """
    found = []
    for number, count in enumerate(counts):
        x = draws[:, number].reshape(len(weights), -1)[:, :count]
        known = truth[number].reshape(-1)[:count]
        mean, sd = moments(x, weights[:, number])
        below = weights[:, number] @ (x < known)
        usual = DIFFICULTY if name == "difficulty" else 0.0  # which is known without answers
        found.append(np.stack([mean - usual, known - usual, (mean - known) / sd, below]))
    mean, known, error, _ = np.concatenate(found, axis=1)
    cells = [coverage([below for *_, below in found], level) for level in INTERVALS]
    return (
        f"correlation {np.corrcoef(mean, known)[0, 1]:.3f}, RMSE "
        f"{np.sqrt(np.mean(error**2)):.2f} sd; coverage {', '.join(cells)}"
    )


def coverage(below: list[np.ndarray], level: float) -> str:
    """Return the share of intervals that have the truth, with its standard error, as text.

    Args:
        below: of each class, the posterior probabilities of values below the truth.
        level: the probability of an interval, with as much on either side.
    """
    # The values of a class are no independent trials, so that the error is that of their mean.
    inside = [np.mean(np.abs(x - 0.5) < level / 2) for x in below]
    counts = np.array([len(x) for x in below])
    share = np.average(inside, weights=counts)
    error = np.sqrt(np.sum((counts * (inside - share)) ** 2)) / counts.sum()
    return f"{level:.0%}: {share:.1%} ± {error:.1%}"


# -- beside NUTS -----------------------------------------------------------------------------------


def nuts(correct: np.ndarray, num_samples: int) -> tuple[Arrays, float]:
    """Return the draws of NUTS for one class, and the seconds; each size compiles anew."""
    mcmc = MCMC(NUTS(model), num_warmup=1_000, num_samples=num_samples, progress_bar=False)
    start = time.perf_counter()
    mcmc.run(jax.random.key(0), correct)
    draws = abilities(mcmc.get_samples())
    return draws, time.perf_counter() - start


def beside_nuts(posterior: Posterior, counts: np.ndarray, num_samples: int, method: str) -> None:
    """Print for some classes how far draws are from those of NUTS, and what each takes."""
    data, _ = simulate(counts, seed=3)
    key, took = jax.random.key(4), {}
    posterior.sample(key, data, num_samples)  # compiles
    start = time.perf_counter()
    draws = abilities(posterior.sample(key, data, num_samples))
    took["one pass"] = time.perf_counter() - start
    every = np.full((num_samples, len(counts)), 1 / num_samples)
    found = {
        "one pass": (draws, every),
        "weighted": (draws, softmax(posterior.log_weights(key, data, num_samples), axis=0)),
    }
    start = time.perf_counter()
    rows = np.arange(len(counts))
    better = posterior.repair(key, data, rows, method=method, num_samples=num_samples)
    took["repaired"] = time.perf_counter() - start
    found["repaired"] = abilities(better.groups["posterior"]), every
    print(f"repaired by {', '.join(better.dataset['method'].values)}", flush=True)
    for number, count in enumerate(counts):
        exact, seconds = nuts(data["correct"][number, :count], num_samples)
        print(f"a class of {count}, NUTS {seconds:.0f} s", flush=True)
        for name, (draws, weights) in found.items():
            print(f"  {name:9}{_beside(draws, weights[:, number], exact, number, count)}")
    print("; ".join(f"{name}: {x / len(counts):.2f} s a class" for name, x in took.items()))


def _beside(draws: Arrays, weights: np.ndarray, exact: Arrays, number: int, count: int) -> str:
    """Return how far means and standard deviations of a class are off, as text."""
    cells = []
    for name in SITES:
        x = draws[name][:, number].reshape(len(weights), -1)[:, :count]
        known = exact[name].reshape(len(exact[name]), -1)
        mean, sd = moments(x, weights)
        shift = np.abs(mean - known.mean(0)) / known.std(0)
        ratio = sd / known.std(0) - 1
        cells.append(f"{name} {shift.max():.2f} sd, {ratio.min():+.0%} to {ratio.max():+.0%}")
    return "; ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=8_000)
    parser.add_argument("--num-classes", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=1_000)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    options = parser.parse_args()
    if options.smoke:
        options.num_steps, options.num_classes, options.num_samples = 2, 4, 100
    start = time.perf_counter()
    posterior = train(options.num_steps)
    print(f"{options.num_steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    judge(posterior, sizes(options.num_classes, seed=1), options.num_samples)
    by_nuts = BY_NUTS[:1] if options.smoke else BY_NUTS
    method = "importance" if options.smoke else "auto"
    beside_nuts(posterior, np.array(by_nuts), 4 * options.num_samples, method)


if __name__ == "__main__":
    main()
