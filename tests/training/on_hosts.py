"""One of two processes of four devices each, that train together; for `test_devices.py`.

    python on_hosts.py NUMBER PORT FOLDER data|simulations

It prints a JSON of what was found, training on data or on simulations.
"""

import json
import os
import sys
import warnings
from dataclasses import replace
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, ForwardKL, Posterior, Simulations, fit
from numpyro_vae.training.simulations import SimulationSource
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import trainer_of

NUMBER, PORT, FOLDER, WHAT = int(sys.argv[1]), *sys.argv[2:]
X = np.random.default_rng(0).normal(size=(56, 4)).astype(np.float32)
OWN = X[:28] if NUMBER == 0 else X[28:]

FROZEN = ("model", "globals")


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).to_event(1), obs=x)


def with_covariate(x, t):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(t, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).expand([len(x), 4]).to_event(1), obs=x)


def svi_of(model, loss):
    encoder = partial(MLP, hidden_sizes=(8,))
    return SVI(model, AutoAmortizedNormal(model, encoder), optax.adam(1e-2), loss)


def train(svi, mesh, data=OWN, **options):
    given = {"num_epochs": 2, "batch_size": 16, "progress_bar": False} | options
    return fit(svi, jax.random.key(0), data, mesh=mesh, **given)


def by_hand(svi) -> list[float]:
    """The losses of one process with all data, whose order is that of the two."""
    trainer, key = trainer_of(svi), jax.random.key(0)
    source = ArraySource(trainer, trainer.read(X, 0), 16, None)
    chosen = np.random.default_rng(0).choice(28, 8, replace=False)
    batch = source.first().at(np.concatenate([chosen, chosen + 28]))
    init_key, order_key, _ = jax.random.split(key, 3)
    state, losses = trainer.init(init_key, batch, None), []
    for epoch in range(2):
        parts = [order_of(order_key, host, epoch) + 28 * host for host in range(2)]
        state, found, _ = trainer.scan(state, batch, np.concatenate(parts, axis=1))
        losses += np.asarray(found).tolist()
    return losses


def simulations(svi, mesh, real_fraction=0.0) -> dict[str, list[float]]:
    """The losses of both processes on simulations, and those of one with all data."""
    rows = {"x": OWN, "t": OWN[:, 0]}
    data = Simulations(48, like=rows, real_fraction=real_fraction)
    options = {"freeze": FROZEN, "checkpoint": f"{FOLDER}/simulations-{real_fraction}"}
    losses = train(svi, mesh, data, **options).losses
    trainer, key = trainer_of(svi, FROZEN), jax.random.key(0)
    source = ArraySource(trainer, trainer.read({"x": X, "t": X[:, 0]}, 0), 16, None)
    chosen = np.random.default_rng(0).choice(28, 8, replace=False)
    source._first = source.first().at(np.concatenate([chosen, chosen + 28]))
    init_key, order_key, _ = jax.random.split(key, 3)
    state = trainer.init(init_key, source.first(), None)
    one = SimulationSource(trainer, source, data)
    one._order = covariates
    one.plan = replace(one.plan, num_real=round(8 * real_fraction), num_parts=2)
    by_hand = []
    for epoch in range(2):
        state, found = one.run(state, order_key, epoch)
        by_hand += np.asarray(found).tolist()
    return {"two": losses.tolist(), "one": by_hand}


def covariates(rng_key):
    """The rows of each host whose covariates simulations have: it shuffles its own."""
    parts = []
    for host in range(2):
        (key,) = jax.random.split(jax.random.fold_in(rng_key, host), 1)
        parts.append(jax.random.permutation(key, 28)[:24].reshape(3, 8) + 28 * host)
    return np.concatenate(parts, axis=1)


def order_of(rng_key, host: int, epoch: int) -> np.ndarray:
    """The rows of a host in each step: it shuffles its own."""
    key = jax.random.fold_in(rng_key, host)
    orders = [jax.random.permutation(jax.random.fold_in(key, e), 28) for e in (epoch, epoch + 1)]
    return np.concatenate(orders)[:32].reshape(4, 8)


def main() -> None:
    warnings.simplefilter("ignore")
    jax.distributed.initialize(f"localhost:{PORT}", 2, NUMBER)
    mesh = jax.make_mesh((8,), ("rows",))
    print(json.dumps({"data": on_data, "simulations": on_simulations}[WHAT](mesh)))


def on_data(mesh) -> dict:
    svi = svi_of(model, TraceMeanField_ELBO())
    options = {"validation": OWN[:11], "checkpoint": f"{FOLDER}/checkpoints"}
    result = train(svi, mesh, **options)
    again = train(svi, mesh, **options, callbacks=[stop])  # which is never called
    draws = Posterior(svi.guide, result, mesh=mesh).sample(jax.random.key(1), OWN[:11], 3)["z"]
    one = Posterior(svi.guide, result).sample(jax.random.key(1), OWN[:11], 3)["z"]
    stored = np.memmap(f"{FOLDER}/{NUMBER}", np.float32, "w+", shape=OWN.shape)
    stored[:] = OWN
    broken = np.where(np.arange(28)[:, None] == 7, np.float32(1e30), OWN)
    found = {
        "losses": result.losses.tolist(),
        "validation": result.history["validation_loss"].tolist(),
        "again": again.losses.tolist(),
        "on disk": train(svi, mesh, stored).losses.tolist(),
        "iterable": train(svi, mesh, [OWN[:8], OWN[8:16]], batch_size=None, num_data=32).losses,
        "skipped": np.isnan(train(svi, mesh, broken).losses).tolist(),
        "by hand": by_hand(svi),
        "draws": float(np.abs(draws - one).max()),
        "error": error(lambda: train(svi, mesh, OWN[: 20 + NUMBER])),
        "refused": refusals(svi, mesh),
    }
    found["iterable"] = found["iterable"].tolist()
    return found


def on_simulations(mesh) -> dict:
    bad = OWN if NUMBER == 0 else np.where(OWN > 1, np.nan, OWN)
    svi, options = svi_of(with_covariate, ForwardKL()), {"freeze": FROZEN}
    wrong = Simulations(16, like={"x": bad, "t": OWN[:, 0]})
    return {
        "simulations": simulations(svi, mesh),
        "real ones among them": simulations(svi_of(with_covariate, Trace_ELBO()), mesh, 0.25),
        "refused": error(lambda: train(svi, mesh, wrong, **options)),
    }


def refusals(svi, mesh) -> list[str]:
    """What is wrong with the data of the second host alone is said on both."""
    bad = OWN if NUMBER == 0 else np.where(OWN > 1, np.nan, OWN)
    text, mine = OWN.astype(str), NUMBER == 1
    runs = [
        lambda: train(svi, mesh, bad),
        lambda: train(svi, mesh, text if mine else OWN),
        lambda: train(svi, mesh, [bad[:8]], batch_size=None, num_data=32),
        lambda: train(svi, mesh, validation=bad[:11]),
        lambda: train(svi, mesh, validation=(OWN[:11], OWN[:11]) if mine else OWN[:11]),
    ]
    return list(map(error, runs))


def stop(*_) -> bool:
    raise AssertionError("a fit that is done goes on")


def error(run) -> str:
    try:
        run()
    except (TypeError, ValueError) as found:
        return str(found)
    return "no error"


if __name__ == "__main__":
    main()
