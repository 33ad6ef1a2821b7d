"""Fits and posteriors on one device and on a mesh of eight, for `test_devices.py`.

A script, as the number of devices is settled when JAX starts: it prints a JSON of what was found.
"""

import json
import os
import tempfile
import warnings
from functools import cache, partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from jax.sharding import Mesh
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedNormal,
    Posterior,
    Simulations,
    fit,
)
from numpyro_vae.layers.convolution import Conv
from numpyro_vae.objectives import ForwardKL, ImportanceWeightedELBO

MESH = jax.make_mesh((8,), ("rows",))
X = np.random.default_rng(0).normal(size=(44, 4)).astype(np.float32)
SMALL = partial(MLP, hidden_sizes=(8,))


def with_global(x):
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).to_event(1), obs=x)


def subsampling(x):
    with numpyro.plate("data", len(x), subsample_size=16) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).to_event(1), obs=x[rows])


def plain(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).to_event(1), obs=x)


class Net(nnx.Module):
    """An encoder with a convolution, batch statistics and dropout."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = Conv(1, 3, (2,), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.conv(x[..., None])))
        return self.drop(h.reshape(len(x), -1))


def make_net(x, *, rngs):
    return Net(rngs=rngs)


@cache
def svi_of(model, encoder=SMALL, loss=TraceMeanField_ELBO):
    """The same for one device and eight, which compiles less."""
    return SVI(model, AutoAmortizedNormal(model, encoder), optax.adam(1e-2), loss())


def train(model, mesh, data=X, encoder=SMALL, loss=TraceMeanField_ELBO, **options):
    svi = svi_of(model, encoder, loss)
    given = {"num_epochs": 2, "batch_size": 16, "progress_bar": False} | options
    result = fit(svi, jax.random.key(0), data, mesh=mesh, **given)
    return svi, result


def losses(*args, **options):
    _, result = train(*args, **options)
    return np.concatenate([result.losses, *result.history.values()])


def network(mesh):
    """Validation, early stopping, and on the mesh a fit that began on one device."""
    options = {"encoder": make_net, "validation": X[:11], "patience": 3}
    with tempfile.TemporaryDirectory() as folder:
        if mesh is not None:
            options["checkpoint"] = folder
            train(plain, None, **options, num_epochs=1)
        return losses(plain, mesh, **options)


def stored(mesh):
    with tempfile.TemporaryDirectory() as folder:
        x = np.memmap(f"{folder}/x", np.float32, "w+", shape=X.shape)
        x[:] = X
        return losses(plain, mesh, x)


def iterable(mesh):
    """Of four batches, the second of which makes a step that fails; the last one is shorter."""
    broken = np.where(np.arange(16)[:, None] == 7, np.float32(1e30), X[16:32])
    found = losses(plain, mesh, [X[:16], broken, X[:16], X[32:]], batch_size=None, num_data=60)
    return np.where(np.isnan(found), -1.0, found)


def simulated(mesh):
    data = Simulations(32, like=X)
    return losses(plain, mesh, data, loss=ForwardKL, freeze=("model", "globals"))


FITS = {
    "a network with convolution, batch statistics, dropout": network,
    "global latents, rows weighed by importance": lambda mesh: losses(
        with_global, mesh, loss=ImportanceWeightedELBO
    ),
    "a plate that subsamples": lambda mesh: losses(subsampling, mesh, loss=Trace_ELBO),
    "an array on disk": stored,
    "an iterable of batches, steps that are skipped": iterable,
    "simulations": simulated,
}


def posteriors() -> dict:
    """By method what differs the most between one device and eight, of 37 rows."""
    svi, result = train(with_global, MESH, loss=ImportanceWeightedELBO)
    key, one = jax.random.key(1), Posterior(svi.guide, result)
    with tempfile.TemporaryDirectory() as folder:
        one.save(f"{folder}/saved")
        many = Posterior.load(f"{folder}/saved", with_global, mesh=MESH)
    x = X[:37]
    runs = {
        "sample": lambda p: p.sample(key, x, 5),
        "log_weights": lambda p: p.log_weights(key, x, 5),
    }
    return {name: largest(run(one), run(many)) for name, run in runs.items()}


def largest(one, other) -> float:
    found = jax.tree.map(lambda a, b: float(np.abs(a - b).max(initial=0)), one, other)
    return max(jax.tree.leaves(found))


def errors() -> dict:
    devices = np.array(jax.devices())
    wrong = {
        "two axes": lambda: train(plain, Mesh(devices.reshape(4, 2), ("a", "b"))),
        "not divided": lambda: train(plain, MESH, batch_size=20),
        "default not divided": lambda: train(plain, MESH, batch_size=None),
        "iterable not divided": lambda: train(
            plain, MESH, [X[:20]], batch_size=None, num_data=len(X)
        ),
        "no rows": lambda: train(plain, MESH, batch_size=None, batch_axes=None),
    }
    return {name: message(run) for name, run in wrong.items()}


def message(run) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return "no error"


def main() -> None:
    warnings.simplefilter("ignore")
    fits = {name: [run(None).tolist(), run(MESH).tolist()] for name, run in FITS.items()}
    print(json.dumps({"fits": fits, "posteriors": posteriors(), "errors": errors()}))


if __name__ == "__main__":
    main()
