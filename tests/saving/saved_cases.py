"""Posteriors of every kind that can be saved; run as a script, it loads them in a new process."""

import pathlib
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen, nnx
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

from numpyro_vae import (
    MLP,
    AmortizedGuide,
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Fusion,
    LogVariance,
    Posterior,
    fit,
)
from numpyro_vae.families import LowRankNormal

X = np.random.default_rng(0).normal(1.0, 1.0, (24, 3)).astype(np.float32)
SMALL = partial(MLP, hidden_sizes=(4,))


class Own(nnx.Module):
    """Batch statistics, dropout, and a list of layers, whose parameters have integer names."""

    def __init__(self, example_inputs, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        for layer in self.layers:
            inputs = nnx.tanh(layer(inputs))
        return self.dropout(self.norm(inputs))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, inputs, *, train):
        hidden = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(inputs))
        return linen.Dropout(0.5, deterministic=not train)(hidden)


def init(rng_key, inputs):
    return [{"w": jax.random.normal(rng_key, (inputs.shape[-1], 4))}, (jnp.zeros(4),)]


def apply(params, inputs):
    return jnp.tanh(inputs @ params[0]["w"] + params[1][0])


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.LogNormal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def hierarchical(x):
    loc = numpyro.sample("loc", dist.Uniform(-4.0, 4.0).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.Gamma(2.0, 2.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, scale).to_event(1))
        numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def hand_written(model):
    def guide(*args, **kwargs):
        for name, size in (("loc", (3,)), ("scale", ())):
            at = numpyro.param(f"{name}_at", jnp.full(size, 0.5))
            numpyro.sample(name, dist.Delta(at, event_dim=len(size)))

    return guide


def with_networks(x):
    """A network with batch statistics of flax, and one of linen."""
    first = flax_module("first", linen.Dense(3), input_shape=(1, 3))
    second = nnx_module("second", nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(second(first(z)), 0.5).to_event(1), obs=x)


def with_options(x, t, *, noise, weights, link):
    with numpyro.plate("data", x.shape[1]):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        mean = link(z[:, None] + weights["slope"] * t)
        numpyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x.T)


def own_inputs(x, t, **kwargs):
    return {"mean": x.mean(0), "all": x.T}


def grouped(x, group):
    """Asks for the values of an argument, and so can be read on data alone."""
    with numpyro.plate("group", len(np.unique(group))):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(z[group], 0.5), obs=x[:, 0])


def group_means(x, group):
    return jax.ops.segment_sum(x, group, 4) / 6


@dataclass(frozen=True)
class Case:
    """A guide to train and save, and what is passed again when it is loaded."""

    model: Any
    make: Any
    data: Any = field(default_factory=lambda: X)
    again: dict[str, Any] = field(default_factory=dict)
    static_kwargs: dict[str, Any] = field(default_factory=dict)
    batch_axes: Any = 0

    def train(self) -> Posterior:
        """The posterior, after two steps."""
        guide = self.make(self.model)
        svi = SVI(self.model, guide, optax.adam(1e-2), Trace_ELBO(), **self.static_kwargs)
        options = {} if self.batch_axes is None else {"batch_size": 12}
        options |= {"num_epochs": 1, "batch_axes": self.batch_axes, "progress_bar": False}
        return Posterior(guide, fit(svi, jax.random.key(0), self.data, **options))

    def draw(self, posterior: Posterior) -> dict[str, np.ndarray]:
        """Draws of latents and of data."""
        found = posterior.sample(jax.random.key(1), self.data, 3)
        return found | posterior.predict(jax.random.key(1), self.data, 3)


def equinox_mlp():
    return eqx.nn.MLP(3, 4, 8, 1, key=jax.random.key(0))


STATIC = {"noise": 0.5, "weights": {"slope": 2.0, "levels": (1, None)}, "link": jnp.tanh}
CASES = {
    "default": Case(model, partial(AutoAmortizedNormal, scale=LogVariance(bounds=(1e-3, 10.0)))),
    "state and dropout": Case(
        model, partial(AutoAmortizedMultivariateNormal, encoder=Own), again={"encoder": Own}
    ),
    "linen": Case(model, partial(AutoAmortizedNormal, encoder=Linen()), again={"encoder": Linen()}),
    "Equinox": Case(
        model,
        partial(AutoAmortizedDelta, encoder=equinox_mlp()),
        again={"encoder": equinox_mlp()},
    ),
    "functions": Case(
        model, partial(AutoAmortizedFlow, encoder=(init, apply)), again={"encoder": (init, apply)}
    ),
    "global sites": Case(
        hierarchical,
        partial(
            AutoAmortizedLowRankMultivariateNormal,
            encoder=SMALL,
            rank=2,
            condition_on=["loc"],
            global_guide=AutoMultivariateNormal,
        ),
    ),
    "points for global sites": Case(
        hierarchical,
        partial(AutoAmortizedNormal, global_guide=partial(AutoDelta, prefix="point")),
    ),
    "global guide of one's own": Case(
        hierarchical,
        partial(AutoAmortizedNormal, encoder=SMALL, global_guide=hand_written),
        again={"global_guide": hand_written},
    ),
    "networks in the model": Case(
        with_networks,
        partial(
            AmortizedGuide,
            encoder=partial(MLP, hidden_sizes=(4, 4), activation=nnx.gelu, standardize=False),
            family=LowRankNormal(1),
            prefix="other",
        ),
    ),
    "options": Case(
        with_options,
        partial(
            AutoAmortizedNormal,
            inputs=own_inputs,
            encoder=partial(Fusion, encoders={"mean": SMALL, "all": SMALL}),
        ),
        data=(X.T.copy(), np.arange(3.0, dtype=np.float32)),
        again={"inputs": own_inputs, "static_kwargs": {"link": jnp.tanh}},
        static_kwargs=STATIC,
        batch_axes=(1, None),
    ),
    "values": Case(
        grouped,
        partial(
            AutoAmortizedNormal,
            encoder=SMALL,
            inputs=group_means,
            segments={"data": lambda x, group: group},
        ),
        data=(X, np.repeat(np.arange(4), 6)),
        again={"inputs": group_means, "segments": {"data": lambda x, group: group}},
        batch_axes=None,
    ),
}


def load_all(folder: pathlib.Path) -> None:
    """Load every case that was saved in a folder, and write its draws beside it."""
    for path in sorted(folder.iterdir()):
        case = CASES[path.name]
        posterior = Posterior.load(path, case.model, **case.again)
        np.savez(f"{path}.npz", **case.draw(posterior))


if __name__ == "__main__":
    load_all(pathlib.Path(sys.argv[1]))
