"""A hierarchical Normal of any number of groups of any size, beside its exact posterior.

    python benchmarks/hierarchical.py [--num-steps 12000] [--batch-size 64]

A data set has 3 to 30 groups of 2 to 40 rows; `mu`, `tau` and `sigma` are of the whole, `theta` is
of a group. A guide learns from simulations by `ForwardKL`, and reads new data sets in one pass.
Exact posteriors are sums over a grid of `tau` and `sigma`, given which all else is Normal. Reported
are means and standard deviations beside the exact ones, of draws as they are and with their
importance weights; calibration; k-hats and novelty, also of data sets that the model did not make;
the time of a data set beside that of NUTS, of a step beside one written by hand, and of a
simulation beside `Predictive`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive
from numpyro.infer.reparam import LocScaleReparam

from numpyro_vae import (
    AutoAmortizedFlow,
    Calibration,
    FitResult,
    ForwardKL,
    Importance,
    NestedSetEncoder,
    Novelty,
    Posterior,
    Simulations,
    data_sets,
    fit,
)
from numpyro_vae.families import Flow
from numpyro_vae.guides.blocks import Context
from numpyro_vae.model import simulate as simulating

GROUPS, ROWS = 30, 40  # at most
BATCH = 64
Data = dict[str, Any]


def groups(y: jax.Array) -> None:
    """The model of one data set, ``(groups, rows)``."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("group", y.shape[0], dim=-2):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        with numpyro.plate("row", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


# Distances from mu in units of tau, as a head cannot know mu to the digits that a small tau needs.
model = handlers.reparam(groups, config={"theta": LocScaleReparam(0.0)})
sets = data_sets(model)


def simulate(count: int, seed: int) -> tuple[Data, dict[str, np.ndarray]]:
    """Draw data sets of random sizes, and the latents that they were made with."""
    rng = np.random.default_rng(seed)
    sizes = {
        "group": rng.integers(3, GROUPS + 1, size=count),
        "row": rng.integers(2, ROWS + 1, size=(count, GROUPS)),
    }
    with handlers.seed(rng_seed=seed), handlers.trace() as trace, handlers.uncondition():
        sets(np.zeros((count, GROUPS, ROWS), np.float32), sizes=sizes)
    found = {name: np.asarray(site["value"]) for name, site in trace.items() if "value" in site}
    return {"y": found["y"], "sizes": sizes}, found


def train(num_steps: int, batch_size: int = BATCH) -> tuple[SVI, FitResult]:
    """Learn from data sets that the model makes."""
    guide = AutoAmortizedFlow(sets, num_layers=4, hidden_sizes=(64,))
    schedule = optax.cosine_decay_schedule(3e-3, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    svi = SVI(sets, guide, optimizer, ForwardKL())
    num_epochs = max(1, num_steps // 400)
    count = batch_size * (num_steps // num_epochs)
    simulations = Simulations(count, like=simulate(1024, seed=0)[0])
    options = {"num_epochs": num_epochs, "batch_size": batch_size, "progress_bar": False}
    return svi, fit(svi, jax.random.key(0), simulations, **options)


# -- the exact posterior ---------------------------------------------------------------------------

Moments = dict[str, tuple[np.ndarray, np.ndarray]]  # by site, means and standard deviations


def exact(y: np.ndarray, counts: np.ndarray) -> Moments:
    """Return exact moments of a data set of ``counts`` rows in each group."""
    y, n = y[: len(counts)].astype(np.float64), counts.astype(np.float64)
    there = np.arange(y.shape[1]) < n[:, None]
    means = (y * there).sum(1) / n
    within = (there * (y - means[:, None]) ** 2).sum()
    log_tau, log_sigma = np.meshgrid(
        np.linspace(-9.0, 1.7, 240), np.linspace(-2.2, 2.2, 400), indexing="ij"
    )
    tau2, noise2 = np.exp(2 * log_tau)[..., None], np.exp(2 * log_sigma)[..., None] / n
    variance = tau2 + noise2
    precision = 1 + (1 / variance).sum(-1)
    loc = (means / variance).sum(-1) / precision  # of mu
    log_density = -0.5 * (np.log(variance) + means**2 / variance).sum(-1)
    log_density += 0.5 * (loc**2 * precision - np.log(precision))
    log_density += -(n.sum() - len(n)) * log_sigma - 0.5 * within * np.exp(-2 * log_sigma)
    log_density += log_tau - 0.5 * tau2[..., 0] - 2.0 * log_sigma**2
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()

    def moments(mean: np.ndarray, variance: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Return those of a mixture over the grid."""
        every = np.moveaxis(np.atleast_3d(mean), (0, 1), (-2, -1))
        spread = np.moveaxis(np.atleast_3d(variance + 0 * mean), (0, 1), (-2, -1))
        first = (weight * every).sum((-2, -1))
        return first, np.sqrt((weight * (spread + every**2)).sum((-2, -1)) - first**2)

    pull = noise2 / variance  # of mu on theta
    theta = pull * loc[..., None] + (1 - pull) * means
    spread = tau2 * pull + pull**2 / precision[..., None]
    return {
        "mu": moments(loc, 1 / precision),
        "tau": moments(np.exp(log_tau)),
        "sigma": moments(np.exp(log_sigma)),
        "theta": moments(theta, spread),
    }


def compare(
    posterior: Posterior, data: Data, num_samples: int, *, is_weighted: bool
) -> dict[str, np.ndarray]:
    """Return by site, for each latent, how far the mean is off in sds, and the ratio of sds."""
    draws = posterior.sample(jax.random.key(1), data, num_samples)
    log_weights = np.asarray(posterior.log_weights(jax.random.key(1), data, num_samples))
    weights = np.exp(is_weighted * (log_weights - log_weights.max(0)))
    weights /= weights.sum(0)
    offset = draws["tau"][..., None, None] * draws["theta_decentered"]
    draws["theta"] = draws["mu"][..., None, None] + offset
    found: dict[str, list[np.ndarray]] = {}
    for number, count in enumerate(data["sizes"]["group"]):
        known = exact(data["y"][number], data["sizes"]["row"][number, :count])
        for name, (mean, sd) in known.items():
            x = draws[name][:, number].reshape(num_samples, -1)[:, : len(mean)]
            first = weights[:, number] @ x
            spread = np.sqrt(weights[:, number] @ (x - first) ** 2)
            found.setdefault(name, []).append(np.stack([(first - mean) / sd, spread / sd - 1], -1))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def tell(posterior: Posterior, data: Data, num_samples: int, *, is_weighted: bool) -> None:
    """Print how far draws are from the exact posteriors."""
    print("with importance weights" if is_weighted else "one pass")
    for name, off in compare(posterior, data, num_samples, is_weighted=is_weighted).items():
        shift, ratio = np.abs(off[:, 0]), off[:, 1]
        print(
            f"  {name:6} means off by {np.median(shift):.3f} sd (90% {np.quantile(shift, 0.9):.3f},"
            f" most {shift.max():.3f}); sds {np.median(ratio):+.1%} (10% "
            f"{np.quantile(ratio, 0.1):+.1%}, 90% {np.quantile(ratio, 0.9):+.1%}); within 0.1 sd "
            f"and 10%: {np.mean((shift < 0.1) & (np.abs(ratio) < 0.1)):.0%}",
            flush=True,
        )


# -- time ------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the least time of a run, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def nuts(y: np.ndarray, counts: np.ndarray, num_samples: int) -> float:
    """Return the seconds of NUTS on one data set; each size compiles anew."""

    def of_one(y: jax.Array, there: np.ndarray) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("group", len(y), dim=-2):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with numpyro.plate("row", y.shape[1], dim=-1), handlers.mask(mask=there):
                numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    y = y[: len(counts)]
    mcmc = MCMC(NUTS(of_one), num_warmup=500, num_samples=num_samples, progress_bar=False)
    start = time.perf_counter()
    mcmc.run(jax.random.key(0), y, np.arange(y.shape[1]) < counts[:, None])
    jax.block_until_ready(mcmc.get_samples())
    return time.perf_counter() - start


class ByHand(nnx.Module):
    """The same guide as a module of its own."""

    def __init__(self, inputs: Any, *, rngs: nnx.Rngs):
        family = Flow(4, (64,))
        self.encoder = NestedSetEncoder(inputs, rngs=rngs)
        sizes = {name: x.shape[-1] for name, x in self.encoder(inputs).items()}
        self.whole = family.head(sizes["data_sets"], 3, rngs=rngs)
        self.context = Context(sizes["group"], 3, rngs=rngs)
        self.group = family.head(self.context.size, 1, rngs=rngs)

    def loss(self, inputs: Any, whole: jax.Array, group: jax.Array, there: jax.Array) -> jax.Array:
        features = self.encoder(inputs)
        log_q = self.whole.distribution(self.whole(features["data_sets"])).log_prob(whole).mean()
        read = jnp.broadcast_to(whole[:, None], (*group.shape[:2], 3))
        raw = self.group(self.context(features["group"], read))
        by_group = self.group.distribution(raw).log_prob(group)
        return -log_q - jnp.where(there, by_group, 0).sum(-1).mean()


def steps(svi: SVI, params: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of a training step, and of one by hand."""
    data, found = simulate(BATCH, seed=3)
    latents = {name: found[name] for name in ("mu", "tau", "sigma", "theta_decentered")}
    state = svi.init(jax.random.key(0), **data, init_params=params)

    @jax.jit
    def step(state: Any) -> Any:
        with simulating.simulated(simulating.Latents(latents, {})):
            return svi.update(state, **data)

    graph, weights = nnx.split(ByHand(sets.inputs(**data), rngs=nnx.Rngs(0)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    whole = np.stack([found["mu"], np.log(found["tau"]), np.log(found["sigma"])], -1)
    there = np.arange(GROUPS) < data["sizes"]["group"][:, None]

    @jax.jit
    def step_by_hand(weights: Any, memory: Any) -> Any:
        def loss(weights: Any) -> jax.Array:
            module = nnx.merge(graph, weights)
            return module.loss(sets.inputs(**data), whole, latents["theta_decentered"], there)

        value, gradient = jax.value_and_grad(loss)(weights)
        updates, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(weights, updates), memory, value

    memory = optimizer.init(weights)
    return seconds(lambda: step(state)[1], 20), seconds(
        lambda: step_by_hand(weights, memory)[2], 20
    )


def simulations(count: int = 1024) -> tuple[float, float]:
    """Return the seconds of simulating data sets, and of NumPyro's `Predictive` of one each."""
    data, _ = simulate(count, seed=4)

    @jax.jit
    def ours(rng_key: jax.Array) -> Any:
        _, seen = simulating.simulate(sets, {}, {}, rng_key, (), data)
        return seen["y"]["value"]

    predictive = Predictive(handlers.uncondition(model), num_samples=1)

    @jax.jit
    def theirs(rng_key: jax.Array) -> Any:
        keys = jax.random.split(rng_key, count)
        return jax.vmap(lambda key, y: predictive(key, y)["y"])(keys, data["y"])

    key = jax.random.key(0)
    return seconds(lambda: ours(key)), seconds(lambda: theirs(key))


# -- report ----------------------------------------------------------------------------------------


def contaminated(data: Data) -> Data:
    """Return data sets of another kind: one row in ten is 8 sds off."""
    rng = np.random.default_rng(6)
    y = data["y"] + 8.0 * (rng.uniform(size=data["y"].shape) < 0.1)
    return data | {"y": y.astype(np.float32)}


def tell_checks(posterior: Posterior, data: Data, num_samples: int) -> None:
    """Print what k-hats and novelty say of data sets."""
    checks = [Importance(num_samples=num_samples), Novelty(simulate(400, seed=8)[0])]
    for name, seen in {"simulated": data, "contaminated": contaminated(data)}.items():
        found = posterior.check(jax.random.key(2), seen, checks, progress_bar=False).dataset
        bad, novel = (found["khat"] > 0.7).mean().item(), (found["novelty"] <= 0.01).mean().item()
        print(f"{name:12} data sets: {bad:.0%} with k-hat above 0.7, {novel:.0%} novel", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=12_000)
    parser.add_argument("--batch-size", type=int, default=BATCH, help="data sets in a step")
    parser.add_argument("--num-sets", type=int, default=50)
    parser.add_argument("--num-samples", type=int, default=2_000)
    parser.add_argument("--num-simulations", type=int, default=500, help="of the calibration")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    options = parser.parse_args()
    if options.smoke:
        options.num_steps, options.num_sets, options.num_samples = 2, 2, 100
        options.num_simulations = 4
    start = time.perf_counter()
    svi, result = train(options.num_steps, options.batch_size)
    print(f"{options.num_steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    posterior = Posterior(svi.guide, result)
    data, _ = simulate(options.num_sets, seed=5)
    for is_weighted in (False, True):
        tell(posterior, data, options.num_samples, is_weighted=is_weighted)
    calibration = Calibration(num_simulations=options.num_simulations)
    more, _ = simulate(options.num_simulations, seed=7)
    print(posterior.check(jax.random.key(3), more, calibration, progress_bar=False))
    tell_checks(posterior, data, options.num_samples)
    draw = lambda: posterior.sample(jax.random.key(4), data, 1_000)  # noqa: E731
    ours = 1e3 * seconds(draw, 3) / options.num_sets
    counts = [data["sizes"]["row"][i, : data["sizes"]["group"][i]] for i in range(2)]
    theirs = [nuts(data["y"][i], counts[i], 1_000) for i in range(1 if options.smoke else 2)]
    print(f"1,000 draws of a data set: {ours:.1f} ms; NUTS {np.mean(theirs):.1f} s")
    step, by_hand = steps(svi, result.params)
    print(f"a step: {1e3 * step:.1f} ms, by hand {1e3 * by_hand:.1f} ms ({step / by_hand:.2f})")
    ours, theirs = simulations(8 if options.smoke else 1024)
    print(
        f"simulating: {1e3 * ours:.1f} ms, Predictive {1e3 * theirs:.1f} ms ({ours / theirs:.2f})"
    )


if __name__ == "__main__":
    main()
