"""Should a network learn ``log(scale)``, ``log(scale**2)`` or ``softplus``? Measured.

One small VAE (1,797 handwritten digits of 8x8 pixels, counts out of 16, Binomial likelihood) is
trained with each, from the same initial function, on the same minibatches, with the same noise, by
SGD and by Adam. The step size of all parameters is varied, then that of the scale head alone.

``python examples/parameterizations.py`` writes one figure and one table, and prints the table with
what follows from it. ``docs/parameterizations.md`` has the mathematics.
"""

import argparse
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpyro.distributions import kl_divergence
from scipy.special import binom
from sklearn.datasets import load_digits

from numpyro_vae import LogScale, LogScaleNormal, LogVariance, Softplus
from numpyro_vae.scales import AbstractParameterization

PIXELS, LEVELS, HIDDEN, LATENT, BATCH, NUM_TRAIN = 64, 16, 64, 8, 128, 1408
OPTIMIZERS = {"SGD": optax.sgd, "Adam": optax.adam}
BASE_STEP = {"SGD": 2.0**-9, "Adam": 2.0**-7}
EXPONENTS = np.array([-5, -4, -3, -2, -1, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4])
STEPS = {name: base * 2.0**EXPONENTS for name, base in BASE_STEP.items()}
FACTORS = 2.0 ** np.arange(0, 11)
COLOURS = {"log_scale": "#0072B2", "log_variance": "#D55E00", "softplus": "#009E73"}
PARAMETERIZATIONS = dict(zip(COLOURS, (LogScale, LogVariance, Softplus), strict=True))
MARKERS = {"log_scale": "o", "log_variance": "s", "softplus": "^"}
MATCHING = {"SGD": 4, "Adam": 2}  # by how much a log_variance head is slower than a log_scale one
UNITS = "held-out ELBO (nats per datum)"
TOLERANCE = 10.0  # nats: a run is stable if it ends within this of the best it ever was


class Data(NamedTuple):
    """Pixel counts, and the log of their Binomial coefficients, one row a datum."""

    counts: Array
    log_coefficient: Array


class Sweep(NamedTuple):
    """Held-out ELBO, nats per datum, of every run: (steps or factors, seeds, epochs + 1)."""

    steps: np.ndarray
    factors: np.ndarray


Params = dict[str, dict[str, Array]]


def load() -> tuple[Data, Data]:
    """Digits in a fixed random order, split into training and held-out rows."""
    counts = np.random.default_rng(0).permutation(load_digits().data)
    columns = (counts, np.log(binom(LEVELS, counts)).sum(1))
    x, c = (jnp.asarray(column, jnp.float32) for column in columns)
    return Data(x[:NUM_TRAIN], c[:NUM_TRAIN]), Data(x[NUM_TRAIN:], c[NUM_TRAIN:])


def init(seed: int, parameterization: AbstractParameterization) -> Params:
    """Weights of the VAE. The scale head is 0 but for its bias, so every scale starts alike."""
    rng = np.random.default_rng(seed)

    def dense(num_in: int, num_out: int) -> dict[str, Array]:
        weight = jnp.asarray(rng.normal(size=(num_in, num_out)) / np.sqrt(num_in), jnp.float32)
        return {"weight": weight, "bias": jnp.zeros(num_out)}

    bias = jnp.full(LATENT, parameterization.init_raw)
    return {
        "hidden": dense(PIXELS, HIDDEN),
        "loc": dense(HIDDEN, LATENT),
        "raw": {"weight": jnp.zeros((HIDDEN, LATENT)), "bias": bias},
        "decoder": dense(LATENT, HIDDEN),
        "logits": dense(HIDDEN, PIXELS),
    }


def stack[Tree](trees: Iterable[Tree]) -> Tree:
    """Stacks the leaves of equal trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def apply(params: Params, name: str, x: Array) -> Array:
    """One dense layer."""
    return x @ params[name]["weight"] + params[name]["bias"]


def encode(params: Params, counts: Array) -> tuple[Array, Array]:
    """Location and raw scale of the latents of each datum."""
    features = jnp.tanh(apply(params, "hidden", counts / 8 - 1))
    return apply(params, "loc", features), apply(params, "raw", features)


def elbo(params: Params, data: Data, eps: Array, loc: Array, log_scale: Array) -> Array:
    """Mean evidence lower bound, nats per datum, with one draw a datum and the analytic KL."""
    posterior = LogScaleNormal(loc, log_scale).to_event(1)
    prior = dist.Normal(0.0, 1.0).expand((LATENT,)).to_event(1)
    hidden = jnp.tanh(apply(params, "decoder", loc + posterior.base_dist.scale * eps))
    logits = apply(params, "logits", hidden)
    log_lik = data.counts * logits - LEVELS * jax.nn.softplus(logits)
    return jnp.mean(log_lik.sum(-1) + data.log_coefficient - kl_divergence(posterior, prior))


def vae_elbo(params: Params, data: Data, eps: Array, which: Array) -> Array:
    """`elbo` at the encoder's output, read by the parameterization of number ``which``."""
    loc, raw = encode(params, data.counts)
    meanings = [cls().log_scale for cls in PARAMETERIZATIONS.values()]
    return elbo(params, data, eps, loc, jax.lax.switch(which, meanings, raw))


def minibatches(seed: int, num_epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (epochs, batches, batch), permuted afresh each epoch, and noise for each row."""
    rng = np.random.default_rng([seed, 1])
    rows = np.stack([rng.permutation(NUM_TRAIN) for _ in range(num_epochs)])
    rows = rows.reshape(num_epochs, -1, BATCH)
    return rows, rng.normal(size=(*rows.shape, LATENT)).astype(np.float32)


def train(
    optimizer: str,
    data: tuple[Data, Data],
    step_size: Array,
    head_factor: Array,
    which: Array,
    params: Params,
    batches: tuple[Array, Array],
) -> tuple[Array, Params]:
    """Trains one VAE; ``head_factor`` multiplies the step of the scale head alone.

    Returns the held-out ELBO before training and after each epoch, and the trained weights.
    """
    (training, held_out), optim = data, OPTIMIZERS[optimizer](step_size)
    eps = np.random.default_rng(2).normal(size=(len(held_out.counts), LATENT)).astype(np.float32)

    def test(params: Params) -> Array:
        return vae_elbo(params, held_out, jnp.asarray(eps), which)

    def step(carry: tuple, batch: tuple[Array, Array]) -> tuple[tuple, None]:
        (params, state), (rows, eps) = carry, batch
        minibatch = Data(*(leaf[rows] for leaf in training))
        gradient = jax.grad(lambda p: -vae_elbo(p, minibatch, eps, which))(params)
        updates, state = optim.update(gradient, state)
        factors = {name: head_factor if name == "raw" else 1.0 for name in params}
        updates = jax.tree.map(lambda f, u: {k: f * v for k, v in u.items()}, factors, updates)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: tuple, batches: tuple[Array, Array]) -> tuple[tuple, Array]:
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, test(carry[0])

    (trained, _), curve = jax.lax.scan(epoch, (params, optim.init(params)), batches)
    return jnp.concatenate([test(params)[None], curve]), trained


def sweep(
    optimizer: str, data: tuple[Data, Data], num_seeds: int, num_epochs: int
) -> tuple[dict[str, Sweep], Params]:
    """All runs with one optimizer, in one compiled call.

    Returns the ELBOs by parameterization, and the weights of log_scale at the base step.
    """
    steps, base = STEPS[optimizer], BASE_STEP[optimizer]
    step_sizes = np.concatenate([steps, np.full(len(FACTORS), base)])
    factors = np.concatenate([np.ones(len(steps)), FACTORS])
    starts = stack(
        stack(init(seed, cls()) for seed in range(num_seeds)) for cls in PARAMETERIZATIONS.values()
    )
    batches = stack(minibatches(seed, num_epochs) for seed in range(num_seeds))
    run = partial(train, optimizer, data)
    for axes in ((None, None, None, 0, 0), (0, 0, None, None, None), (None, None, 0, 0, None)):
        run = jax.vmap(run, axes)
    which = jnp.arange(len(PARAMETERIZATIONS))
    curves, trained = jax.jit(run)(step_sizes, factors, which, starts, batches)
    split = [Sweep(*np.split(curve, [len(steps)])) for curve in np.asarray(curves)]
    weights = jax.tree.map(lambda leaf: leaf[0, len(steps), 0], trained)
    return dict(zip(PARAMETERIZATIONS, split, strict=True)), weights


@jax.jit
def raw_gradient(params: Params, data: Data, eps: Array, which: Array) -> Array:
    """Gradient of the loss in a shift of all raw outputs, at the scales log_scale would give."""
    loc, log_scale = encode(params, data.counts)
    choices = [cls() for cls in PARAMETERIZATIONS.values()]
    raw = jax.lax.switch(which, [p.inverse for p in choices], jnp.exp(log_scale))

    def loss(shift: Array) -> Array:
        log_scale = jax.lax.switch(which, [p.log_scale for p in choices], raw + shift)
        return -elbo(params, data, eps, loc, log_scale)

    return jax.grad(loss)(jnp.zeros(LATENT))


def gradient_noise(params: Params, data: Data, num_draws: int) -> dict[str, dict[str, float]]:
    """Statistics of `raw_gradient` over minibatches and noise, the same for each.

    For each parameterization, the medians over latents of ``sd``, and of ``noise``: sd / |mean|.
    """
    rng, found = np.random.default_rng(3), {}
    rows = rng.integers(NUM_TRAIN, size=(num_draws, BATCH))
    eps = rng.normal(size=(num_draws, BATCH, LATENT)).astype(np.float32)
    for which, name in enumerate(PARAMETERIZATIONS):
        batches = (Data(*(leaf[chosen] for leaf in data)) for chosen in rows)
        draws = [raw_gradient(params, *pair, which) for pair in zip(batches, eps, strict=True)]
        sd, mean = np.std(draws, 0), np.mean(draws, 0)
        found[name] = {"sd": float(np.median(sd)), "noise": float(np.median(sd / abs(mean)))}
    return found


def count_stable(curves: np.ndarray) -> int:
    """How many rows come before the first with a seed that ends `TOLERANCE` below its best ELBO."""
    ends_well = curves[..., -1] > curves.max(-1) - TOLERANCE  # never so where the ELBO is NaN
    return int(np.argmin(np.append(ends_well.all(-1), False)))


def largest_stable(values: np.ndarray, curves: np.ndarray) -> float:
    """The largest value, of increasing ones, up to which training is stable."""
    return float(np.append(np.nan, values)[count_stable(curves)])


Results = dict[tuple[str, str], Sweep]
Noise = dict[str, dict[str, dict[str, float]]]


def best(curves: np.ndarray) -> tuple[int, float, float]:
    """The stable row with the best final ELBO, its mean over seeds, and its sd over seeds."""
    final = curves[: max(count_stable(curves), 1), :, -1]
    row = int(np.argmax(final.mean(1)))
    return row, final[row].mean(), final[row].std(ddof=1)


def table(results: Results, noise: Noise) -> list[dict[str, str]]:
    """One row for each optimizer and parameterization."""
    rows = []
    for (optimizer, name), sweep in results.items():
        (row, mean, sd), at_base = best(sweep.steps), sweep.factors[0, :, -1]
        rows.append(
            {
                "optimizer": optimizer,
                "parameterization": name,
                "ELBO at the base step": f"{at_base.mean():.2f} ± {at_base.std(ddof=1):.2f}",
                "best ELBO": f"{mean:.2f} ± {sd:.2f}",
                "best step": f"{STEPS[optimizer][row]:.2g}",
                "largest stable step": f"{largest_stable(STEPS[optimizer], sweep.steps):.2g}",
                "largest stable head factor": f"{largest_stable(FACTORS, sweep.factors):g}",
                **{
                    f"{what}, {point}": f"{statistics[name][key]:.3g}"
                    for point, statistics in noise.items()
                    for key, what in (("sd", "gradient sd"), ("noise", "gradient sd / mean"))
                },
            }
        )
    return rows


def compare(results: Results, optimizer: str) -> list[str]:
    """What one optimizer's runs say."""
    one, two = results[optimizer, "log_scale"], results[optimizer, "log_variance"]
    factor = MATCHING[optimizer]
    plain = abs(two.factors[0] - one.factors[0]).max()
    matched = abs(two.factors[np.argmax(factor == FACTORS)] - one.factors[0]).max()
    tops = np.array([best(results[optimizer, name].steps)[1:] for name in PARAMETERIZATIONS])
    spread, sd = np.ptp(tops[:, 0]), tops[:, 1].max()
    lines = [
        f"log_variance differs from log_scale by at most {plain:.2g} nats during training, and by "
        f"{matched:.2g} once its head's step is multiplied by {factor}.",
        f"with the best step for each, the parameterizations are {spread:.2f} nats apart, "
        f"{'less' if spread < sd else 'more'} than one standard deviation over seeds ({sd:.2f}).",
    ]
    for what, values, index in (("step", STEPS[optimizer], 0), ("head factor", FACTORS, 1)):
        found = [largest_stable(values, results[optimizer, n][index]) for n in PARAMETERIZATIONS]
        text = ", ".join(f"{n} {v:.3g}" for n, v in zip(PARAMETERIZATIONS, found, strict=True))
        lines.append(f"largest stable {what}: {text}; second over first {found[1] / found[0]:.3g}.")
    return [f"{optimizer}: {line}" for line in lines]


def findings(results: Results, noise: Noise) -> list[str]:
    """What the numbers say, computed from them."""
    starts = np.ptp([sweep.factors[0, :, 0] for sweep in results.values()], 0).max()
    lines = [f"All start from one function: their first ELBOs differ by {starts:.1g}."]
    for optimizer in OPTIMIZERS:
        lines += compare(results, optimizer)
    for point, statistics in noise.items():
        sd, ratio = statistics["log_scale"].values()
        parts = (
            f"{name} {found['sd'] / sd:.3f} and {found['noise'] / ratio:.3f}"
            for name, found in statistics.items()
        )
        lines.append(f"Gradient sd, sd / mean over log_scale's, {point}: {', '.join(parts)}.")
    return lines


def draw_curves(axes: Axes, results: Results, optimizer: str) -> None:
    """ELBO by epoch at the base step and, in an inset, its difference from log_scale's."""
    inset = axes.inset_axes((0.36, 0.38, 0.61, 0.4))
    reference = results[optimizer, "log_scale"].factors[0]
    for name, colour in COLOURS.items():
        curves = results[optimizer, name].factors[0]
        axes.plot(curves.mean(0), color=colour, label=name)
        inset.plot((curves - reference).mean(0), color=colour)
    column = int(np.argmax(MATCHING[optimizer] == FACTORS))
    matched, colour = results[optimizer, "log_variance"].factors[column], COLOURS["log_variance"]
    label = f"log_variance, head step x {MATCHING[optimizer]}"
    axes.plot(matched.mean(0), color=colour, ls=":", lw=3, label=label)
    inset.plot((matched - reference).mean(0), color=colour, ls=":", lw=3)
    inset.set_title("minus the ELBO of log_scale", fontsize=8)
    inset.tick_params(labelsize=7)
    step = BASE_STEP[optimizer]
    axes.set(xlabel="epoch", ylabel=UNITS, title=f"{optimizer}: training at step {step:.2g}")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def draw_sweep(
    axes: Axes, values: np.ndarray, results: Results, optimizer: str, index: int
) -> None:
    """Final ELBO against a step size: a line for the mean over seeds, a band for their range."""
    for place, name in enumerate(PARAMETERIZATIONS):
        curves = results[optimizer, name][index]
        final = np.where(np.isfinite(curves[..., -1]), curves[..., -1], -np.inf)
        kept, colour = final.min(1) > final.max() - 200, COLOURS[name]
        mean, low, high = (f(final[kept], 1) for f in (np.mean, np.min, np.max))
        label = f"{name}, stable up to {(limit := largest_stable(values, curves)):.3g}"
        axes.plot(values[kept], mean, color=colour, marker=MARKERS[name], ms=4, label=label)
        axes.fill_between(values[kept], low, high, color=colour, alpha=0.15)
        axes.axvline(limit, color=colour, ls=(4 * place, (4, 8)), lw=1.8)
    bottom, top = axes.get_ylim()
    axes.set(xscale="log", ylabel=UNITS, ylim=(max(bottom, top - 150), top))
    corner = ("lower center", {"SGD": "lower right", "Adam": "lower left"}[optimizer])[index]
    axes.legend(fontsize=8, loc=corner)


def draw_noise(axes: Axes, noise: Noise, key: str) -> None:
    """Bars by parameterization, before and after training."""
    for offset, (point, hatch) in zip((-0.2, 0.2), (("start", "//"), ("trained", "")), strict=True):
        heights = [noise[point][name][key] for name in PARAMETERIZATIONS]
        places = np.arange(len(heights)) + offset
        bars = axes.bar(places, heights, 0.38, color=list(COLOURS.values()), hatch=hatch, ec="w")
        axes.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=8)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(PARAMETERIZATIONS)), list(PARAMETERIZATIONS))


def draw(results: Results, noise: Noise, path: Path) -> None:
    """The figure: a row for each optimizer, and the gradient noise in the last column."""
    figure = Figure(figsize=(17, 7.6), layout="constrained")
    grid = figure.subplots(2, 4)
    for row, optimizer in zip(grid, OPTIMIZERS, strict=True):
        draw_curves(row[0], results, optimizer)
        draw_sweep(row[1], STEPS[optimizer], results, optimizer, 0)
        row[1].set(xlabel="step size of all parameters", title=f"{optimizer}: ELBO after training")
        draw_sweep(row[2], FACTORS, results, optimizer, 1)
        row[2].set(xlabel="step of the scale head / base", title=f"{optimizer}: scale head faster")
    draw_noise(grid[0, 3], noise, "sd")
    title = "Gradient noise at one common point:\nthe start (hatched), trained (plain)"
    grid[0, 3].set(ylabel="sd (nats per unit of raw output)", title=title)
    draw_noise(grid[1, 3], noise, "noise")
    grid[1, 3].set(ylabel="sd / |mean|", title="The same noise, relative to its mean")
    figure.savefig(path, dpi=120)


def to_markdown(rows: list[dict[str, str]]) -> str:
    """The table as text."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    """Runs the sweeps, and writes and prints what they show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    num_seeds, num_epochs, num_draws = (2, 2, 64) if args.quick else (5, 24, 1024)
    args.output.mkdir(parents=True, exist_ok=True)
    start, data, results, weights = time.perf_counter(), load(), {}, {}
    for optimizer in OPTIMIZERS:
        found, weights[optimizer] = sweep(optimizer, data, num_seeds, num_epochs)
        results |= {(optimizer, name): sweeps for name, sweeps in found.items()}
    points = {"start": init(0, PARAMETERIZATIONS["log_scale"]()), "trained": weights["Adam"]}
    noise = {point: gradient_noise(params, data[0], num_draws) for point, params in points.items()}
    text = to_markdown(table(results, noise))
    (args.output / "parameterizations.md").write_text(text, encoding="utf-8")
    print("\n" + text + "\n" + "\n".join(findings(results, noise)))
    draw(results, noise, args.output / "parameterizations.png")
    print(f"{time.perf_counter() - start:.0f} s; see {args.output / 'parameterizations.png'}")


if __name__ == "__main__":
    main()
