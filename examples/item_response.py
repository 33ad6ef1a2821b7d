"""Item response: what answers say about people and questions, next to NUTS.

Run ``python examples/item_response.py --data lsat.csv`` with the Law School Admission Test of Bock
and Lieberman (1970): a header, then a row of zeros and ones for each of 1,000 people, a column for
each of 5 questions. It is in R's package ltm (``write.csv(ltm::LSAT, "lsat.csv", row.names =
FALSE)``), whose licence does not let it come with this library; any such table will do.

A person has an ability, which a network reads off the answers; a question has an intercept and a
slope, which are global. Three guides are compared with NUTS, which needs no guide: the plain one;
the same trained with more particles; and one that knows that abilities and questions, and
questions among each other, depend on each other. It writes a picture and an ArviZ DataTree.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_vae import MLP, AutoAmortizedNormal, Importance, Posterior, Report, plot_khat

SITES = ("ability", "intercept", "slope")
ITEMS = SITES[1:]


class Moments(NamedTuple):
    """The posterior mean and standard deviation of a site, slopes on the scale of logarithms."""

    mean: np.ndarray
    sd: np.ndarray


Found = dict[str, Moments]


def load(path: Path) -> np.ndarray:
    """Read the answers, ``(people, questions)``."""
    correct = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).astype(np.float32)
    if not np.isin(correct, (0, 1)).all():
        raise SystemExit(f"{path} should hold zeros and ones below its header, and nothing else.")
    return correct


def model(correct: jax.Array) -> None:
    """Two parameters for each question, as in a logistic regression on ability."""
    items = correct.shape[1]
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0).expand([items]).to_event(1))
    slope = numpyro.sample("slope", dist.LogNormal(0.0, 0.5).expand([items]).to_event(1))
    with numpyro.plate("person", len(correct)):
        ability: Any = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        logits = intercept + slope * ability[:, None]
        numpyro.sample("correct", dist.BernoulliLogits(logits).to_event(1), obs=correct)


def train(correct: np.ndarray, num_steps: int, particles: int, **options: Any) -> Posterior:
    """Learn from all answers at once, with a learning rate that falls to zero."""
    encoder = partial(MLP, hidden_sizes=(64,), activation=nnx.tanh)
    guide = AutoAmortizedNormal(model, encoder, **options)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=particles))
    return Posterior(guide, svi.run(jax.random.key(0), num_steps, correct, progress_bar=False))


def run_nuts(correct: np.ndarray, num_samples: int) -> dict[str, np.ndarray]:
    """Sample people and questions together."""
    mcmc = MCMC(
        NUTS(model),
        num_warmup=num_samples // 2,
        num_samples=num_samples,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), correct)
    return {name: np.asarray(draws) for name, draws in mcmc.get_samples().items()}


def moments(draws: dict[str, np.ndarray]) -> Found:
    """Return the moments of every site."""
    draws = draws | {"slope": np.log(draws["slope"])}
    return {name: Moments(draws[name].mean(0), draws[name].std(0)) for name in SITES}


def compare(name: str, found: Found, truth: Found, seconds: float) -> None:
    """Print how far the means are from NUTS, in its posterior sds, and how wide the guide is."""
    cells = []
    for site in SITES:
        error = np.abs(found[site].mean - truth[site].mean) / truth[site].sd
        width = (found[site].sd / truth[site].sd).mean()
        cells.append(f"{error.mean():5.2f} {error.max():5.2f} {width:5.2f}")
    print(f"{name:<20}{'   '.join(cells)}   {seconds:5.1f} s")


def draw_abilities(found: Found, truth: Found, correct: np.ndarray, ax: Axes) -> None:
    """Plot each person's ability as the guide and as NUTS have it."""
    score = correct.sum(1)
    points = ax.scatter(truth["ability"].mean, found["ability"].mean, c=score, s=12)
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color="grey", lw=0.8, zorder=0)
    ax.set(title="Abilities, posterior means", xlabel="NUTS", ylabel="read off the answers")
    ax.figure.colorbar(points, ax=ax, label="right answers")


def draw_items(by_guide: dict[str, Found], site: str, ax: Axes) -> None:
    """Plot the mean of each question's parameter, and an interval of two sds either way."""
    for number, (name, found) in enumerate(by_guide.items()):
        mean, sd = found[site]
        x = np.arange(len(mean)) + 0.18 * (number - (len(by_guide) - 1) / 2)
        ax.errorbar(x, mean, 2 * sd, fmt="o", ms=4, capsize=2, label=name)
    title = {"intercept": "Intercepts", "slope": "Slopes, logarithms"}[site]
    ax.set(title=title, xlabel="question", xticks=np.arange(len(mean)))
    ax.set_xticklabels([str(item + 1) for item in range(len(mean))])


def picture(by_guide: dict[str, Found], checked: Report, correct: np.ndarray, path: Path) -> None:
    """One picture of everything."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplot_mosaic("AK;IS")
    draw_abilities(by_guide["plain"], by_guide["NUTS"], correct, axes["A"])
    plot_khat(checked, ax=axes["K"])
    draw_items(by_guide, "intercept", axes["I"])
    draw_items(by_guide, "slope", axes["S"])
    axes["I"].legend()
    figure.savefig(path, dpi=110)


def save(
    posterior: Posterior, checked: Report, correct: np.ndarray, num_samples: int, path: Path
) -> None:
    """Write what ArviZ reads, with the checks, then open it again and ask ArviZ."""
    tree = posterior.to_datatree(jax.random.key(4), correct, num_samples)
    checked.add_to(tree).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")
        print(az.summary(tree, var_names=list(ITEMS), kind="stats"))


def main() -> None:
    """Train, compare, check, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a table of answers; see the head of this file")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.data is None:
        parser.error(
            "--data is required: the answers may not be distributed with this library, and no "
            'lasting address of them is known. In R: write.csv(ltm::LSAT, "lsat.csv", '
            "row.names = FALSE)."
        )
    args.output.mkdir(parents=True, exist_ok=True)
    correct = load(args.data)
    num_steps, num_samples = (50, 100) if args.quick else (8000, 1000)

    start = time.perf_counter()
    by_guide = {"NUTS": moments(run_nuts(correct, num_samples))}
    print(f"{len(correct)} people, {correct.shape[1]} questions; means compared with NUTS")
    print(f"({time.perf_counter() - start:.0f} s) in its posterior sds, and sds as a share of its")
    print(f"\n{'':<20}{'   '.join(f'{site:<17}' for site in SITES)}")
    print(f"{'':<20}{'   '.join(3 * [' mean   max  sds  '])}")
    together = {"condition_on": ITEMS, "global_guide": AutoMultivariateNormal}
    guides: dict[str, tuple[int, dict[str, Any]]] = {
        "plain": (1, {}),
        "16 particles": (16, {}),
        "with dependencies": (4, together),
    }
    posteriors = {}
    for name, (particles, options) in guides.items():
        start = time.perf_counter()
        posteriors[name] = train(correct, num_steps, particles, **options)
        seconds = time.perf_counter() - start
        draws = posteriors[name].sample(jax.random.key(1), correct, 2 * num_samples)
        by_guide[name] = moments(draws)
        compare(name, by_guide[name], by_guide["NUTS"], seconds)

    best = posteriors["with dependencies"]
    checked = best.check(
        jax.random.key(2), correct, checks=(Importance(num_samples=num_samples), "collapse")
    )
    print(f"\n{checked}")
    picture(by_guide, checked, correct, args.output / "item_response.png")
    save(best, checked, correct, num_samples // 2, args.output / "item_response.nc")


if __name__ == "__main__":
    main()
