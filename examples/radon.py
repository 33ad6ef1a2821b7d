"""Varying intercepts for the counties of Minnesota, each read off its own houses, against NUTS.

Run ``python examples/radon.py``. Radon was measured in 919 houses of 85 counties, 1 to 116 houses
in each (Gelman and Hill, *Data Analysis Using Regression and Multilevel/Hierarchical Models*,
2007). A network that reads a set of houses, whatever their number, gives each county's intercept,
given draws of what they share; it is compared with NUTS county by county, and checked.
A picture and an ArviZ DataTree are written into ``output/``.

The data are ArviZ's example ``radon``, which it downloads, with a checksum, when first asked for.
``--data radon.npz`` reads a local file instead, with the arrays ``county`` (a number from 0 for
each house), ``floor`` (0 is the basement), ``log_radon`` and ``county_names``.
"""

import argparse
from collections.abc import Callable
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
from matplotlib.figure import Figure
from numpyro.infer import MCMC, NUTS, SVI, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_vae import (
    AutoAmortizedNormal,
    Importance,
    Posterior,
    Report,
    Segments,
    SetEncoder,
    plot_khat,
)

GLOBALS = ("mu", "tau", "slope", "sigma")


class Data(NamedTuple):
    """The houses, and the names of the counties that they lie in."""

    county: np.ndarray
    floor: np.ndarray
    log_radon: np.ndarray
    names: list[str]

    @property
    def houses(self) -> tuple[np.ndarray, ...]:
        """What the model takes."""
        return self.county, self.floor, self.log_radon


def read(path: Path | None) -> Data:
    """Read a local file, or ArviZ's example."""
    if path is not None:
        with np.load(path) as file:
            county, floor, log_radon = (file[k] for k in ("county", "floor", "log_radon"))
            names = file["county_names"]
    else:
        tree: Any = az.load_arviz_data("radon")
        county, floor = (tree.constant_data[k].values for k in ("county_idx", "floor_idx"))
        log_radon, names = tree.observed_data["y"].values, tree.posterior["County"].values
    houses = county.astype(np.int32), floor.astype(np.float32), log_radon.astype(np.float32)
    return Data(*houses, [str(name).strip().title() for name in names])


def make_model(num_counties: int) -> Callable[..., None]:
    """The counties' intercepts vary; what a ground floor adds is the same everywhere."""

    def model(county: jax.Array, floor: jax.Array, log_radon: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        with numpyro.plate("county", num_counties):
            intercept = jnp.asarray(numpyro.sample("intercept", dist.Normal(mu, tau)))
        with numpyro.plate("house", len(county)):
            loc = intercept[county] + slope * floor
            numpyro.sample("log_radon", dist.Normal(loc, sigma), obs=log_radon)

    return model


def make_guide(model: Callable[..., None], num_counties: int) -> AutoAmortizedNormal:
    """A county is the set of its houses, of which the encoder is told floor and radon."""

    def houses(county: jax.Array, floor: jax.Array, log_radon: jax.Array) -> Segments:
        return Segments({"floor": floor, "log_radon": log_radon}, county, num_counties)

    encoder = partial(
        SetEncoder,
        element_sizes=(16,),
        hidden_sizes=(32,),
        activation=nnx.tanh,
        standardize=True,
    )
    return AutoAmortizedNormal(
        model,
        encoder,
        inputs=houses,
        plate="county",
        segments={"house": lambda county, floor, log_radon: county},
        condition_on=GLOBALS,
        global_guide=AutoMultivariateNormal,
    )


def compare(found: dict[str, np.ndarray], nuts: dict[str, np.ndarray]) -> None:
    """Print how far the guide's draws are from those of NUTS."""
    print(f"\n{'':8}{'mean':>9}{'NUTS':>9}{'sd':>9}{'NUTS':>9}")
    for name in GLOBALS:
        moments = [f(draws[name]) for f in (np.mean, np.std) for draws in (found, nuts)]
        print(f"{name:8}" + "".join(f"{value:9.3f}" for value in moments))
    loc, scale = nuts["intercept"].mean(0), nuts["intercept"].std(0)
    shift = np.abs(found["intercept"].mean(0) - loc) / scale
    ratio = found["intercept"].std(0) / scale
    print(
        f"\nIntercepts of {len(loc)} counties: means {shift.mean():.3f} sd from those of NUTS, "
        f"{shift.max():.3f} at most ({np.mean(shift <= 0.1):.0%} within 0.1); sds "
        f"{ratio.mean() - 1:+.1%}, from {ratio.min() - 1:+.1%} to {ratio.max() - 1:+.1%}"
    )


def draw(
    data: Data, found: dict, nuts: dict, losses: np.ndarray, checked: Report, path: Path
) -> None:
    """Each county next to NUTS, the checks, and training."""
    sizes = np.bincount(data.county, minlength=len(data.names))
    order = np.argsort(sizes, kind="stable")
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplot_mosaic("CCC;SKT", height_ratios=[1.2, 1])
    for number, (name, draws) in enumerate({"NUTS": nuts, "amortized": found}.items()):
        values = draws["intercept"][:, order]
        axes["C"].errorbar(
            np.arange(len(order)) + 0.4 * number,
            values.mean(0),
            values.std(0),
            fmt="o",
            markersize=3,
            label=name,
        )
    axes["C"].set(xlabel="counties, by their number of houses", ylabel="intercept (mean, sd)")
    axes["C"].set_xticks(np.arange(len(order))[::6], sizes[order][::6])
    axes["C"].legend()
    axes["S"].plot([0.05, 0.35], [0.05, 0.35], color="0.7")
    axes["S"].scatter(nuts["intercept"].std(0), found["intercept"].std(0), s=8)
    axes["S"].set(xlabel="sd of the intercept, NUTS", ylabel="amortized")
    plot_khat(checked, ax=axes["K"])
    axes["T"].plot(losses)
    axes["T"].set(xlabel="step", ylabel="negative ELBO", yscale="log")
    figure.savefig(path, dpi=110)


def save(posterior: Posterior, checked: Report, data: Data, num_samples: int, path: Path) -> None:
    """Write what ArviZ reads, with the checks, then open it again and ask ArviZ."""
    tree = posterior.to_datatree(
        jax.random.key(3), data.houses, num_samples, coords={"county": data.names}
    )
    checked.add_to(tree).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")
        print(az.summary(tree, var_names=list(GLOBALS), kind="stats"))


def main() -> None:
    """Train, compare, check, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a local radon.npz; else ArviZ downloads them")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    num_steps, num_samples = (100, 200) if args.quick else (3000, 4000)

    data = read(args.data)
    model = make_model(len(data.names))
    guide = make_guide(model, len(data.names))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO(num_particles=4))
    result = svi.run(jax.random.key(0), num_steps, *data.houses, progress_bar=False)
    posterior = Posterior(guide, result, batch_axes=None)
    found = posterior.sample(jax.random.key(1), data.houses, num_samples)

    mcmc = MCMC(
        NUTS(model), num_warmup=num_samples // 4, num_samples=num_samples, progress_bar=False
    )
    mcmc.run(jax.random.key(0), *data.houses)
    nuts = {name: np.asarray(draws) for name, draws in mcmc.get_samples().items()}
    compare(found, nuts)

    checked = posterior.check(
        jax.random.key(2),
        data.houses,
        checks=(Importance(num_samples=num_samples), "collapse"),
    )
    print(f"\n{checked}")
    draw(data, found, nuts, np.asarray(result.losses), checked, args.output / "radon.png")
    save(posterior, checked, data, min(num_samples, 500), args.output / "radon.nc")


if __name__ == "__main__":
    main()
