"""Posteriors to export, and how their programs are loaded."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from jax import export
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedNormal,
    ConvNet,
    Masked,
    Posterior,
)

X = np.random.default_rng(0).lognormal(size=(400, 2)).astype(np.float32)
FEW = X[:2]  # as many as `export` compares, so that less is compiled
KEY, NUM_SAMPLES = jax.random.key(3), 100
SMALL = partial(MLP, hidden_sizes=(4,))


def make(of, guide, data, elbo=Trace_ELBO, **options):
    """A posterior with parameters as they start, which differ from row to row all the same."""
    svi = SVI(of, guide, optax.adam(1e-2), elbo())
    state = jax.jit(svi.init)(jax.random.key(0), *(data if isinstance(data, tuple) else (data,)))
    params = {**svi.get_params(state), **(state.mutable_state or {})}
    return Posterior(guide, params, **options)


def load(folder, name):
    """A program of a folder, and the arrays."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / manifest["artifacts"][name]["file"]).read_bytes()
    arrays = dict(np.load(folder / manifest["arrays"]))
    return jax.jit(export.deserialize(bytearray(data)).call), arrays


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def hierarchical(x):
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def over_time(x, t):
    """The rows are the second axis, of the data and of a latent."""
    with numpyro.plate("data", x.shape[1], dim=-1), numpyro.plate("time", 3, dim=-2):
        z = numpyro.sample("z", dist.Normal(t[:, None], 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def mixture(x):
    """A discrete latent, and values that are missing."""
    with numpyro.plate("data", len(x.values)):
        kind = numpyro.sample(
            "kind", dist.Categorical(jnp.full(2, 0.5)), infer={"enumerate": "parallel"}
        )
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        fn = dist.Normal(z + 2.0 * kind[..., None], 0.5).mask(x.mask).to_event(1)
        numpyro.sample("x", fn, obs=x.filled())


def of_images(x):
    """A plate that subsamples."""
    with numpyro.plate("data", len(x), subsample_size=1) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None, None], 1.0).to_event(2), obs=x[rows])


def by_hand(x):
    weight = numpyro.param("weight", 0.3)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.LogNormal(x * weight, 0.5).to_event(1))


class Own(nnx.Module):
    """Batch statistics, dropout, layers with integer names, and parameters that NumPy lacks."""

    def __init__(self, example_inputs, *, rngs):
        first = nnx.Linear(2, 4, param_dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.List([first, nnx.Linear(4, 4, rngs=rngs)])
        self.norm, self.dropout = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        for layer in self.layers:
            inputs = nnx.tanh(layer(inputs))
        return self.dropout(self.norm(inputs))


@dataclass(frozen=True)
class Case:
    """A posterior, the rows that it is asked for, these as inputs, and what it has."""

    model: Any
    guide: Any
    data: Any
    inputs: dict[str, Any]
    artifacts: tuple[str, ...] = ("importance",)
    options: dict[str, Any] | None = None
    platforms: tuple[str, ...] = ("cpu",)

    def posterior(self):
        """The posterior."""
        return make(self.model, self.guide, self.data, **(self.options or {}))


def case(model, guide, *args, **kwargs):
    """A case of rows of two values."""
    return Case(model, guide, FEW, {"x": FEW}, *args, **kwargs)


def global_sites():
    guide = AutoAmortizedLowRankMultivariateNormal(hierarchical, Own, rank=1, condition_on=["loc"])
    return case(hierarchical, guide, ("encode", "importance"))


def images():
    x = np.random.default_rng(1).normal(size=(2, 8, 8)).astype(np.float32)
    guide = AutoAmortizedNormal(of_images, partial(ConvNet, channels=(2,), features=4))
    return Case(of_images, guide, x, {"x": x}, platforms=("cpu", "cuda", "tpu"))


def mixture_with_missing_values():
    known = np.array([[True, True], [True, False]])
    given = {"x.values": FEW, "x.mask": known}
    guide = AutoAmortizedNormal(mixture, SMALL)
    return Case(mixture, guide, Masked(FEW, known), given, options={"elbo": TraceEnum_ELBO})


def rows_in_the_second_axis():
    x, t = X[:3, :2].copy(), np.arange(3, dtype=np.float32)
    guide = AutoAmortizedNormal(over_time, SMALL, inputs=lambda x, t: x.T, plate="data")
    given = {"x": x, "t": t}
    return Case(over_time, guide, (x, t), given, options={"batch_axes": (1, None)})


CASES = {
    "global sites, state and dropout": global_sites,
    "flow": lambda: case(model, AutoAmortizedFlow(model, SMALL, hidden_sizes=(4, 4), num_layers=2)),
    "missing values and discrete latents": mixture_with_missing_values,
    "rows in the second axis": rows_in_the_second_axis,
    "images, subsampled": images,
    "by hand": lambda: case(model, by_hand, options={"model": model}),
}
