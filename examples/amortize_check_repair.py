"""Amortize, check, repair: intercepts, slopes and noise of Minnesota's counties, next to NUTS.

Run ``python examples/amortize_check_repair.py``. Radon was measured in 919 houses of 85 counties
(Gelman and Hill, *Data Analysis Using Regression and Multilevel/Hierarchical Models*, 2007). A
county has an intercept, a slope (what a ground floor adds) and a noise level, of which most have
too few houses to tell much; intercepts and slopes come from a Student t.

The guide is a plain one, on purpose: a Normal in which the three are independent, though the
houses of a county tie its slope to its intercept, and posteriors of few houses have heavy tails.
Every county is checked; those whose draws are not usable as they are, for a high k-hat or for their
distance from the posterior, are repaired, or if there are none those with the largest gap. What
comes out is compared with NUTS on the whole model. A repair holds the
global sites at 32 draws of the guide's posterior of them, and no more can be expected of it than
these allow: latents that hang on the globals, as slopes do, come no nearer to NUTS than they were.

Counties are padded to the size of the largest, so that each is a row, computed without the others.
In ``observed_data`` and ``posterior_predictive``, what stands in the padding means nothing.

The data are ArviZ's example ``radon``, which it downloads, with a checksum, when first asked for.
``--data radon.npz`` reads a local file instead, with the arrays ``county`` (a number from 0 for
each house), ``floor`` (0 is the basement), ``log_radon`` and ``county_names``.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.reparam import LocScaleReparam, Reparam

from numpyro_vae import (
    AutoAmortizedNormal,
    Calibration,
    Masked,
    Posterior,
    Repair,
    Report,
    SetEncoder,
    plot_khat,
)

GLOBALS = ("level", "level_spread", "effect", "effect_spread", "scale", "scale_spread")
SITES = ("intercept", "slope", "noise")
COLOURS = {"guide": "#E69F00", "repaired": "#0072B2", "NUTS": "black"}

Draws = dict[str, np.ndarray]


class Data(NamedTuple):
    """A row for each county, a column for each of its houses, and the counties' names."""

    log_radon: np.ndarray
    floor: np.ndarray
    present: np.ndarray
    names: list[str]

    @property
    def houses(self) -> tuple[np.ndarray, ...]:
        """What the model takes."""
        return self.log_radon, self.floor, self.present


def read(path: Path | None) -> Data:
    """Read a local file, or ArviZ's example, and pad the counties."""
    if path is not None:
        with np.load(path) as file:
            county, floor, log_radon = (file[k] for k in ("county", "floor", "log_radon"))
            names = file["county_names"]
    else:
        tree: Any = az.load_arviz_data("radon")
        county, floor = (tree.constant_data[k].values for k in ("county_idx", "floor_idx"))
        log_radon, names = tree.observed_data["y"].values, tree.posterior["County"].values
    sizes = np.bincount(county, minlength=len(names))
    present = np.arange(sizes.max()) < sizes[:, None]
    order = np.argsort(county, kind="stable")
    padded = np.zeros((2, *present.shape), np.float32)
    padded[:, present] = log_radon[order], floor[order]
    return Data(*padded, present, [str(name).strip().title() for name in names])


def model(log_radon: jax.Array, floor: jax.Array, present: jax.Array) -> None:
    """Intercept, slope and noise vary by county; how much, the counties tell together."""
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    level_spread = numpyro.sample("level_spread", dist.HalfNormal(1.0))
    effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
    effect_spread = numpyro.sample("effect_spread", dist.HalfNormal(1.0))
    scale = numpyro.sample("scale", dist.Normal(0.0, 1.0))
    scale_spread = numpyro.sample("scale_spread", dist.HalfNormal(0.5))
    with numpyro.plate("county", len(log_radon)):
        intercept: Any = numpyro.sample("intercept", dist.StudentT(4.0, level, level_spread))
        slope: Any = numpyro.sample("slope", dist.StudentT(4.0, effect, effect_spread))
        noise: Any = numpyro.sample("noise", dist.LogNormal(scale, scale_spread))
        house = dist.Normal(intercept[:, None] + slope[:, None] * floor, noise[:, None])
        numpyro.sample("log_radon", house.mask(present).to_event(1), obs=log_radon)


def train(data: Data, num_steps: int) -> Posterior:
    """Learn from all counties at once; a network reads the set of a county's houses."""

    def houses(log_radon: jax.Array, floor: jax.Array, present: jax.Array) -> Masked:
        return Masked(jnp.stack([log_radon, floor], axis=-1), present)

    encoder = partial(
        SetEncoder,
        element_sizes=(16,),
        hidden_sizes=(32,),
        activation=nnx.tanh,
        standardize=True,
    )
    guide = AutoAmortizedNormal(
        model,
        encoder,
        inputs=houses,
        condition_on=GLOBALS,
        global_guide=AutoMultivariateNormal,
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=4))
    result = svi.run(jax.random.key(0), num_steps, *data.houses, progress_bar=False)
    return Posterior(guide, result)


def run_nuts(data: Data, num_samples: int) -> Draws:
    """Sample the whole model: counties and what they share."""
    free: dict[str, Reparam] = {
        name: LocScaleReparam(0.0, shape_params=("df",)) for name in ("intercept", "slope")
    }
    mcmc = MCMC(
        NUTS(handlers.reparam(model, config=free)),
        num_warmup=num_samples // 2,
        num_samples=num_samples,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(4), *data.houses, extra_fields=("diverging",))
    by_chain = mcmc.get_samples(group_by_chain=True)
    rhat = max(numpyro.diagnostics.split_gelman_rubin(np.asarray(by_chain[s])).max() for s in SITES)
    diverging = int(mcmc.get_extra_fields()["diverging"].sum())
    print(f"\nNUTS, of the whole model: r-hat at most {rhat:.3f}, {diverging} divergences")
    return {name: np.asarray(draws) for name, draws in mcmc.get_samples().items()}


def correlation(draws: Draws) -> np.ndarray:
    """Return the correlation of each county's intercept and slope."""
    first, second = ((x - x.mean(0)) / x.std(0) for x in (draws["intercept"], draws["slope"]))
    return (first * second).mean(0)


def row(label: str, found: Draws, truth: Draws) -> None:
    """Print how far draws of some counties are from the truth, site by site."""
    cells = []
    for site in SITES:
        mean, sd = truth[site].mean(0), truth[site].std(0)
        error, ratio = np.abs(found[site].mean(0) - mean) / sd, found[site].std(0) / sd
        cells.append(f"{error.mean():5.2f}{error.max():6.2f}{ratio.mean():6.2f}")
    error = np.abs(correlation(found) - correlation(truth))
    print(f"{label:<26}{'  '.join(cells)}  {error.mean():6.2f}{error.max():6.2f}")


def compare(guide: Draws, repaired: Draws, nuts: Draws, rows: np.ndarray) -> None:
    """Print how far the guide and the repair are from NUTS, in its posterior sds."""
    others = np.setdiff1d(np.arange(nuts["intercept"].shape[1]), rows)
    some = {name: nuts[name][:, rows] for name in SITES}
    print("\nErrors of means, in sds of NUTS, and ratios of sds; last, errors of the correlation")
    print("of intercept and slope")
    print(f"\n{'':26}{'  '.join(f'{site:<17}' for site in SITES)}  correlation")
    print(f"{'':26}{'  '.join(3 * [' mean   max   sds'])}    mean   max")
    if len(others):
        rest = ({name: x[name][:, others] for name in SITES} for x in (guide, nuts))
        row(f"{len(others)} others, guide", *rest)
    row(f"{len(rows)} chosen, guide", {name: guide[name][:, rows] for name in SITES}, some)
    row(f"{len(rows)} chosen, repaired", repaired, some)
    number = len(repaired["slope"])
    print(f"By chance alone, means of {number} draws are off by {1 / np.sqrt(number):.2f} or so.")


def draw_gaps(checked: Report, rows: np.ndarray, ax: Axes) -> None:
    """Plot what each county's bound loses to the network, and to the family."""
    network, family = (
        checked.dataset[f"gap_{kind}"].values.clip(0) for kind in ("amortization", "approximation")
    )
    order = np.argsort(-(network + family))
    places = np.arange(len(order))
    ax.bar(places, family[order], width=1.0, label="approximation", color="#0072B2")
    ax.bar(
        places,
        network[order],
        width=1.0,
        bottom=family[order],
        label="amortization",
        color="#D55E00",
    )
    chosen = np.flatnonzero(np.isin(order, rows))
    tops = (network + family)[order][chosen]
    ax.plot(chosen, tops + 0.02 * tops.max(), "v", ms=4, color="black", label="repaired")
    ax.set(title="What each county's bound loses", xlabel="county, sorted", ylabel="gap (nats)")
    ax.legend(frameon=False)


def draw_ranks(checked: Report, ax: Axes) -> None:
    """Plot how far the ECDF of the ranks of simulated latents is from the uniform one."""
    for name, colour in zip(SITES, ("#0072B2", "#E69F00", "#009E73"), strict=True):
        ranks = np.sort(checked.dataset[f"pit_{name}"].values)
        ecdf = np.arange(1, len(ranks) + 1) / len(ranks)
        ax.plot(ranks, ecdf - ranks, label=name, color=colour)
    grid = np.linspace(0, 1, 200)
    band = 1.96 * np.sqrt(grid * (1 - grid) / checked.dataset.sizes["simulation"])
    top = max(ax.get_ylim()[1], band.max())
    ax.fill_between(grid, -band, band, color="0.88", zorder=0, label="95%, pointwise")
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(title="Calibration", xlabel="rank (PIT)", ylabel="ECDF, less the uniform")
    ax.set_ylim(top=1.5 * top)
    ax.legend(frameon=False, ncols=2, loc="upper right")


def draw_counties(by_kind: dict[str, Draws], site: str, names: list[str], ax: Axes) -> None:
    """Plot the mean of the counties that were repaired, and an interval of two sds either way."""
    places = np.arange(len(names))
    for number, (kind, draws) in enumerate(by_kind.items()):
        mean, sd = draws[site].mean(0), draws[site].std(0)
        y = places + 0.25 * (number - 1)
        ax.errorbar(mean, y, xerr=2 * sd, fmt="o", ms=3.5, lw=1.2, label=kind, color=COLOURS[kind])
    ax.set(title=f"Repaired counties, {site}", xlabel=f"{site} (mean, 2 sd)")
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()


def draw_correlations(by_kind: dict[str, Draws], ax: Axes) -> None:
    """Plot the correlation of intercept and slope of all that were repaired."""
    truth = correlation(by_kind["NUTS"])
    for kind in ("guide", "repaired"):
        ax.scatter(truth, correlation(by_kind[kind]), s=22, label=kind, color=COLOURS[kind])
    low, high = min(truth.min(), -0.1), max(truth.max(), 0.1)
    ax.plot([low, high], [low, high], color="grey", lw=0.8, zorder=0)
    ax.set(title="Correlation of intercept and slope", xlabel="NUTS", ylabel="found")
    ax.legend(frameon=False)


def picture(
    checked: Report, by_kind: dict[str, Draws], rows: np.ndarray, names: list[str], path: Path
) -> None:
    """One picture of the checks above, and of the repair below."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplot_mosaic("KGR;ISC")
    plot_khat(checked, ax=axes["K"])
    draw_gaps(checked, rows, axes["G"])
    draw_ranks(checked, axes["R"])
    worst = np.argsort(-checked.dataset["khat"].values[rows])
    shown = {
        kind: {site: draws[site][:, worst[:12]] for site in SITES}
        for kind, draws in by_kind.items()
    }
    some = [names[place] for place in rows[worst[:12]]]
    draw_counties(shown, "intercept", some, axes["I"])
    draw_counties(shown, "slope", some, axes["S"])
    axes["I"].legend(frameon=False)
    draw_correlations(by_kind, axes["C"])
    figure.savefig(path, dpi=110)


def save(
    posterior: Posterior, checked: Report, repair: Repair, data: Data, num_samples: int, path: Path
) -> None:
    """Write the repaired posterior, the checks and the repair, then open them again with ArviZ."""
    tree = posterior.to_datatree(
        jax.random.key(5), data.houses, num_samples, coords={"county": data.names}
    )
    repair.add_to(checked.add_to(tree)).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")
        print(az.summary(tree, var_names=list(GLOBALS), kind="stats"))


def main() -> None:
    """Train, check, repair, compare, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a local radon.npz; else ArviZ downloads them")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps, num_samples = (50, 100) if args.quick else (3000, 800)
    data = read(args.data)

    start = time.perf_counter()
    posterior = train(data, num_steps)
    print(f"Amortized: {len(data.names)} counties, {time.perf_counter() - start:.0f} s")

    start = time.perf_counter()
    calibration = Calibration(num_simulations=100 if args.quick else 500)
    checks = ("importance", "gap", calibration, "collapse", "predictive")
    checked = posterior.check(jax.random.key(1), data.houses, checks, coords={"county": data.names})
    print(f"\nChecked, {time.perf_counter() - start:.0f} s: {checked}")

    start = time.perf_counter()
    largest = np.argsort(-checked.dataset["gap_inference"].values)[:10]
    both = np.isin(largest, checked.flagged).sum()
    print(f"\nOf the ten counties with the largest gaps, {both} are flagged.")
    chosen: Any = checked
    if args.quick or not checked.flagged.size:
        chosen = largest[:4]
        print("The four with the largest gaps are repaired.")
    method = "importance" if args.quick else "auto"
    repair = posterior.repair(
        jax.random.key(2), data.houses, chosen, method=method, num_samples=num_samples
    )
    print(f"\nRepaired, {time.perf_counter() - start:.0f} s: {repair}")

    nuts = run_nuts(data, num_samples)
    guide = posterior.sample(jax.random.key(3), data.houses, 4000)
    repaired = repair.groups["posterior"]
    compare(guide, repaired, nuts, repair.rows)

    before, truth = ({site: x[site][:, repair.rows] for site in SITES} for x in (guide, nuts))
    by_kind = {"guide": before, "repaired": repaired, "NUTS": truth}
    name = "amortize_check_repair"
    picture(checked, by_kind, repair.rows, data.names, args.output / f"{name}.png")
    save(posterior, checked, repair, data, num_samples, args.output / f"{name}.nc")


if __name__ == "__main__":
    main()
