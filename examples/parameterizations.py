"""Should a network learn ``log(scale)``, ``log(scale**2)`` or ``softplus``? Measured.

One small VAE (1,797 handwritten digits of 8x8 pixels, each pixel a count out of 16, so a Binomial
likelihood) is trained under every parameterization of `numpyro_vae`, from the same initial
function, on the same minibatches, with the same noise, by SGD and by Adam, over two sweeps:

- the step size of all parameters, and
- the step size of the scale head alone, the only place where the parameterizations differ.

Run ``python examples/parameterizations.py``. It writes one figure and one table, and prints the
table with what follows from it. ``docs/parameterizations.md`` has the mathematics.
"""

import argparse
import csv
import time
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
from scipy.special import gammaln
from sklearn.datasets import load_digits

from numpyro_vae.distributions import LogScaleNormal
from numpyro_vae.parameterization import PARAMETERIZATIONS, AbstractParameterization

PIXELS, LEVELS, HIDDEN, LATENT, BATCH, NUM_TRAIN = 64, 16, 64, 8, 128, 1408
OPTIMIZERS = {"SGD": optax.sgd, "Adam": optax.adam}
BASE_STEP = {"SGD": 2.0**-9, "Adam": 2.0**-7}
STEPS = {"SGD": 2.0 ** np.arange(-14, -4), "Adam": 2.0 ** np.arange(-11, -1)}
FACTORS = 2.0 ** np.arange(0, 13)
COLOURS = {"log_scale": "#0072B2", "log_variance": "#D55E00", "softplus": "#009E73"}
MARKERS = {"log_scale": "o", "log_variance": "s", "softplus": "^"}
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
    inverse = gammaln(counts + 1) + gammaln(LEVELS - counts + 1) - gammaln(LEVELS + 1)
    x, c = jnp.asarray(counts, jnp.float32), jnp.asarray(-inverse.sum(1), jnp.float32)
    return Data(x[:NUM_TRAIN], c[:NUM_TRAIN]), Data(x[NUM_TRAIN:], c[NUM_TRAIN:])


def init(seed: int, parameterization: AbstractParameterization) -> Params:
    """Weights of the VAE. The scale head is 0 but for its bias, so every scale starts alike."""
    rng = np.random.default_rng(seed)

    def dense(num_in: int, num_out: int) -> dict[str, Array]:
        weight = rng.normal(size=(num_in, num_out)) / np.sqrt(num_in)
        return {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.zeros(num_out)}

    bias = jnp.full(LATENT, parameterization.init_raw)
    return {
        "hidden": dense(PIXELS, HIDDEN),
        "loc": dense(HIDDEN, LATENT),
        "raw": {"weight": jnp.zeros((HIDDEN, LATENT)), "bias": bias},
        "decoder": dense(LATENT, HIDDEN),
        "logits": dense(HIDDEN, PIXELS),
    }


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


def vae_elbo(
    params: Params, data: Data, eps: Array, parameterization: AbstractParameterization
) -> Array:
    """`elbo` at the encoder's output."""
    loc, raw = encode(params, data.counts)
    return elbo(params, data, eps, loc, parameterization.log_scale(raw))


def minibatches(seed: int, num_epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (epochs, batches, batch), permuted afresh each epoch, and noise for each row."""
    rng = np.random.default_rng([seed, 1])
    rows = np.stack([rng.permutation(NUM_TRAIN) for _ in range(num_epochs)])
    rows = rows.reshape(num_epochs, -1, BATCH)
    return rows, rng.normal(size=(*rows.shape, LATENT)).astype(np.float32)


def train(
    parameterization: AbstractParameterization,
    optimizer: str,
    data: tuple[Data, Data],
    step_size: Array,
    head_factor: Array,
    params: Params,
    batches: tuple[Array, Array],
) -> tuple[Array, Params]:
    """Trains one VAE; ``head_factor`` multiplies the step of the scale head alone.

    Returns:
        The held-out ELBO before training and after each epoch, and the trained weights.
    """
    (training, held_out), optim = data, OPTIMIZERS[optimizer](step_size)
    eps = np.random.default_rng(2).normal(size=(len(held_out.counts), LATENT)).astype(np.float32)

    def test(params: Params) -> Array:
        return vae_elbo(params, held_out, jnp.asarray(eps), parameterization)

    def step(carry: tuple, batch: tuple[Array, Array]) -> tuple[tuple, None]:
        (params, state), (rows, eps) = carry, batch
        minibatch = Data(*(leaf[rows] for leaf in training))
        gradient = jax.grad(lambda p: -vae_elbo(p, minibatch, eps, parameterization))(params)
        updates, state = optim.update(gradient, state)
        factors = {name: head_factor if name == "raw" else 1.0 for name in params}
        updates = jax.tree.map(
            lambda f, u: jax.tree.map(partial(jnp.multiply, f), u), factors, updates
        )
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: tuple, batches: tuple[Array, Array]) -> tuple[tuple, Array]:
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, test(carry[0])

    (trained, _), curve = jax.lax.scan(epoch, (params, optim.init(params)), batches)
    return jnp.concatenate([test(params)[None], curve]), trained


def sweep(
    parameterization: AbstractParameterization,
    optimizer: str,
    data: tuple[Data, Data],
    num_seeds: int,
    num_epochs: int,
) -> tuple[Sweep, Params]:
    """All runs of one parameterization and optimizer, in one compiled call.

    Returns:
        The ELBOs, and the weights that the base step gives with the first seed.
    """
    steps, base = STEPS[optimizer], BASE_STEP[optimizer]
    step_sizes = np.concatenate([steps, np.full(len(FACTORS), base)])
    factors = np.concatenate([np.ones(len(steps)), FACTORS])
    starts = [init(seed, parameterization) for seed in range(num_seeds)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    batches = [minibatches(seed, num_epochs) for seed in range(num_seeds)]
    stacked = tuple(jnp.stack(leaves) for leaves in zip(*batches, strict=True))
    run = partial(train, parameterization, optimizer, data)
    run = jax.vmap(jax.vmap(run, (None, None, 0, 0)), (0, 0, None, None))
    curves, trained = jax.jit(run)(step_sizes, factors, params, stacked)
    weights = jax.tree.map(lambda leaf: leaf[len(steps), 0], trained)
    return Sweep(*np.split(np.asarray(curves), [len(steps)])), weights


def gradient_noise(params: Params, data: Data, num_draws: int) -> dict[str, dict[str, float]]:
    """Gradient of the loss in a shift of the raw scale, over minibatches and noise.

    Every parameterization is put at the same point, the scales of ``params`` under ``log_scale``.

    Returns:
        By parameterization, median over latents: ``sd`` and ``noise`` (sd over size of the mean)
        of the gradient, and ``move``, the change of log-scale per unit of raw scale.
    """

    rng = np.random.default_rng(3)
    rows = rng.integers(NUM_TRAIN, size=(num_draws, BATCH))
    noise = rng.normal(size=(num_draws, BATCH, LATENT)).astype(np.float32)

    @partial(jax.jit, static_argnums=0)
    def gradients(parameterization: AbstractParameterization) -> tuple[Array, Array]:
        def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            batch = Data(*(leaf[inputs[0]] for leaf in data))
            loc, log_scale = encode(params, batch.counts)
            raw = parameterization.inverse(jnp.exp(log_scale))

            def loss(shift: Array) -> Array:
                log_scale = parameterization.log_scale(raw + shift)
                return -elbo(params, batch, inputs[1], loc, log_scale)

            slope = jax.grad(lambda r: parameterization.log_scale(r).sum())(raw)
            return jax.grad(loss)(jnp.zeros(LATENT)), slope.mean(0)

        return jax.lax.map(one, (jnp.asarray(rows), jnp.asarray(noise)), batch_size=32)

    found = {}
    for name, cls in PARAMETERIZATIONS.items():
        draws, slopes = gradients(cls())
        sd, mean = draws.std(0), draws.mean(0)
        statistics = {"sd": sd, "noise": sd / abs(mean), "move": slopes.mean(0)}
        found[name] = {key: float(jnp.median(value)) for key, value in statistics.items()}
    return found


def largest_stable(values: np.ndarray, curves: np.ndarray) -> float:
    """The largest value up to which every seed ends within `TOLERANCE` of its best ELBO."""
    ends_well = curves[..., -1] > curves.max(-1) - TOLERANCE  # never so where the ELBO is NaN
    stable = np.append(ends_well.all(-1), False)
    return float(np.append(np.nan, values)[np.argmin(stable)])


Results = dict[tuple[str, str], Sweep]
Noise = dict[str, dict[str, dict[str, float]]]


def best(curves: np.ndarray) -> tuple[int, float, float]:
    """Row with the best final ELBO on average over seeds, that average, and its sd over seeds."""
    final = curves[..., -1]
    row = int(np.nanargmax(np.where(np.isfinite(final).all(1), final.mean(1), np.nan)))
    return row, float(final[row].mean()), float(final[row].std(ddof=1))


def table(results: Results, noise: Noise) -> list[dict[str, str]]:
    """One row for each optimizer and parameterization."""
    rows = []
    for (optimizer, name), sweep in results.items():
        row, mean, sd = best(sweep.steps)
        at_base = sweep.factors[0, :, -1]
        rows.append(
            {
                "optimizer": optimizer,
                "parameterization": name,
                "ELBO at the base step": f"{at_base.mean():.2f} ± {at_base.std(ddof=1):.2f}",
                "best ELBO": f"{mean:.2f} ± {sd:.2f}",
                "best step": f"{STEPS[optimizer][row]:.2g}",
                "largest stable step": f"{largest_stable(STEPS[optimizer], sweep.steps):.2g}",
                "largest stable head factor": f"{largest_stable(FACTORS, sweep.factors):g}",
                "gradient sd at the start": f"{noise['start'][name]['sd']:.3g}",
                "sd / mean at the start": f"{noise['start'][name]['noise']:.3g}",
                "gradient sd when trained": f"{noise['trained'][name]['sd']:.3g}",
                "sd / mean when trained": f"{noise['trained'][name]['noise']:.3g}",
                "log-scale per raw when trained": f"{noise['trained'][name]['move']:.3g}",
            }
        )
    return rows


def findings(results: Results, noise: Noise) -> list[str]:
    """What the numbers say, computed from them."""
    starts = np.stack([sweep.factors[0, :, 0] for sweep in results.values()])
    lines = [
        f"All start from one function: their first ELBOs differ by {np.ptp(starts, 0).max():.1g}."
    ]
    for optimizer, factor in (("SGD", 4), ("Adam", 2)):
        one, two = results[optimizer, "log_scale"], results[optimizer, "log_variance"]
        (column,) = np.flatnonzero(factor == FACTORS)
        plain = abs(two.factors[0] - one.factors[0]).max()
        matched = abs(two.factors[column] - one.factors[0]).max()
        lines.append(
            f"{optimizer}: log_variance differs from log_scale by at most {plain:.2g} nats during "
            f"training, and by {matched:.2g} once its head's step is multiplied by {factor}."
        )
        tops = {name: best(results[optimizer, name].steps)[1:] for name in PARAMETERIZATIONS}
        spread = max(m for m, _ in tops.values()) - min(m for m, _ in tops.values())
        sd = max(sd for _, sd in tops.values())
        verdict = "less" if spread < sd else "more"
        lines.append(
            f"{optimizer}: with the best step for each, the parameterizations are {spread:.2f} nats "
            f"apart, {verdict} than one standard deviation over seeds ({sd:.2f})."
        )
        for what, values, index in (("step", STEPS[optimizer], 0), ("head factor", FACTORS, 1)):
            found = {n: largest_stable(values, results[optimizer, n][index]) for n in tops}
            text = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            lines.append(f"{optimizer}: largest stable {what}: {text}.")
    for point, statistics in noise.items():
        base = statistics["log_scale"]
        text = ", ".join(
            f"{name} {s['sd'] / base['sd']:.3f} and {s['noise'] / base['noise']:.3f}"
            for name, s in statistics.items()
        )
        lines.append(f"Gradient sd and sd / mean relative to log_scale, {point}: {text}.")
    return lines


def draw_sweep(
    axes: Axes, values: np.ndarray, results: Results, optimizer: str, index: int
) -> None:
    """Final ELBO against a step size: a line for the mean over seeds, a band for their range."""
    for name in PARAMETERIZATIONS:
        final = results[optimizer, name][index][..., -1]
        final = np.where(np.isfinite(final), final, -np.inf)
        kept = final.min(1) > -600
        mean, colour, marker = final.mean(1)[kept], COLOURS[name], MARKERS[name]
        axes.plot(values[kept], mean, color=colour, marker=marker, ms=4, label=name)
        axes.fill_between(
            values[kept], final.min(1)[kept], final.max(1)[kept], color=COLOURS[name], alpha=0.15
        )
        limit = largest_stable(values, results[optimizer, name][index])
        axes.axvline(limit, color=COLOURS[name], ls=":", lw=1.2)
    axes.set(xscale="log", ylabel="held-out ELBO (nats per datum)")


def draw_noise(axes: Axes, noise: Noise, key: str) -> None:
    """Bars by parameterization, before and after training."""
    for offset, (point, hatch) in zip((-0.2, 0.2), (("start", "//"), ("trained", "")), strict=True):
        heights = [noise[point][name][key] for name in PARAMETERIZATIONS]
        places = np.arange(len(heights)) + offset
        bars = axes.bar(places, heights, 0.38, color=list(COLOURS.values()), alpha=0.75)
        for bar in bars:
            bar.set(hatch=hatch, edgecolor="white")
        axes.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=8)
    axes.set_xticks(range(len(PARAMETERIZATIONS)), list(PARAMETERIZATIONS))


def draw(results: Results, noise: Noise, path: Path) -> None:
    """The figure: a row for each optimizer, and the gradient noise in the last column."""
    figure = Figure(figsize=(17, 7.6), layout="constrained")
    grid = figure.subplots(2, 4)
    for row, optimizer in zip(grid, OPTIMIZERS, strict=True):
        for name in PARAMETERIZATIONS:
            mean = results[optimizer, name].factors[0].mean(0)
            row[0].plot(mean, color=COLOURS[name], marker=MARKERS[name], ms=3, label=name)
        title = f"{optimizer}: training at step {BASE_STEP[optimizer]:.2g}"
        row[0].set(xlabel="epoch", ylabel="held-out ELBO (nats per datum)", title=title)
        draw_sweep(row[1], STEPS[optimizer], results, optimizer, 0)
        row[1].set(xlabel="step size of all parameters", title=f"{optimizer}: after training")
        draw_sweep(row[2], FACTORS, results, optimizer, 1)
        title = f"{optimizer}: after training, scale head alone faster"
        row[2].set(xlabel="step of the scale head / base step", title=title)
        row[0].legend(frameon=False)
    draw_noise(grid[0, 3], noise, "sd")
    title = "Gradient noise at one common point\n(hatched: at the start, plain: trained)"
    grid[0, 3].set(ylabel="sd (nats per unit of raw output)", title=title)
    draw_noise(grid[1, 3], noise, "noise")
    grid[1, 3].set(ylabel="sd / |mean|", title="The same, relative to its mean")
    figure.savefig(path, dpi=110)


def write(rows: list[dict[str, str]], folder: Path) -> str:
    """Writes the table as CSV and Markdown; returns the Markdown."""
    with (folder / "parameterizations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (folder / "parameterizations.md").write_text(text)
    return text


def main() -> None:
    """Runs the sweeps, and writes and prints what they show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    num_seeds, num_epochs, num_draws = (3, 3, 64) if args.quick else (4, 40, 1024)
    args.output.mkdir(parents=True, exist_ok=True)
    start, data, results, weights = time.perf_counter(), load(), {}, {}
    for optimizer in OPTIMIZERS:
        for name, cls in PARAMETERIZATIONS.items():
            found = sweep(cls(), optimizer, data, num_seeds, num_epochs)
            results[optimizer, name], weights[optimizer, name] = found
            print(f"{optimizer} {name}: {time.perf_counter() - start:.0f} s", flush=True)
    points = {
        "start": init(0, PARAMETERIZATIONS["log_scale"]()),
        "trained": weights["Adam", "log_scale"],
    }
    noise = {point: gradient_noise(params, data[0], num_draws) for point, params in points.items()}
    print("\n" + write(table(results, noise), args.output))
    print("\n".join(findings(results, noise)))
    draw(results, noise, args.output / "parameterizations.png")
    print(f"{time.perf_counter() - start:.0f} s; see {args.output / 'parameterizations.png'}")


if __name__ == "__main__":
    main()
