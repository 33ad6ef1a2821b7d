"""Models of real data for ``quality.py``, and random data of the same form to see that they run.

A folder holds ``lsat.csv`` (people by five answers), ``ap.npz`` (documents by words, the parts of a
sparse matrix), ``pbmc_5k_protein_v3.npz`` (cells by genes), ``radon_MN.npz`` (a value for each
house, and its county) and ``JSB_Chorales.mat`` (chords by 88 keys of each chorale).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy.io import loadmat
from scipy.sparse import csr_matrix

from numpyro_vae.data.arrays import take_rows

TOPICS, STATE, CELL_STATE = 20, 4, 8


class Case(NamedTuple):
    """A model, rows to train on, and rows held out."""

    model: Callable[..., Any]
    train: Any
    test: Any
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to


def item_response(answers: np.ndarray) -> Case:
    """The ability of each person, and easiness and slope of five questions."""

    def model(x: jax.Array) -> None:
        easiness = numpyro.sample("easiness", dist.Normal(0.0, 3.0).expand([5]).to_event(1))
        slope = numpyro.sample("slope", dist.LogNormal(0.0, 0.5).expand([5]).to_event(1))
        with numpyro.plate("person", len(x)):
            ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
            logits = easiness + slope * ability[:, None]
            numpyro.sample("x", dist.BernoulliLogits(logits).to_event(1), obs=x)

    return split(model, answers.astype(np.float32), 200)


def cells(counts: np.ndarray) -> Case:
    """Counts of genes: a state of each cell, loadings, and the dispersion of each gene."""
    library, number = counts.sum(1), counts.shape[1]
    level = np.log(counts[40:].sum(0) + 0.5)

    def model(x: jax.Array, library: jax.Array) -> None:
        loadings = numpyro.param("loadings", lambda key: 0.05 * jax.random.normal(key, (CELL_STATE, number)))
        start = numpyro.param("level", jnp.asarray(level))
        prior = dist.LogNormal(0.0, 1.5).expand([number]).to_event(1)
        concentration = numpyro.sample("concentration", prior)
        with numpyro.plate("cell", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([CELL_STATE]).to_event(1))
            mean = library[:, None] * jax.nn.softmax(start + z @ loadings)
            counts = dist.NegativeBinomial2(mean, concentration)
            numpyro.sample("x", counts.to_event(1), obs=x)

    return split(model, (counts, library), 40)


def radon(log_radon: np.ndarray, floor: np.ndarray, there: np.ndarray) -> Case:
    """The level of each county, of whose houses there are up to as many as columns."""

    def model(x: jax.Array, floor: jax.Array, there: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        with numpyro.plate("county", len(x)):
            level = numpyro.sample("level", dist.Normal(mu, tau))
            houses = dist.Normal(level[:, None] + slope * floor, sigma).mask(there)
            numpyro.sample("x", houses.to_event(1), obs=x)

    return split(model, (log_radon, floor, there), 25)


def chorales(chords: np.ndarray, lengths: np.ndarray) -> Case:
    """Keys that are down, chord by chord: a state that walks, and a linear emission."""
    keys = chords.shape[-1]
    rates = (chords.sum((0, 1)) + 0.5) / (lengths.sum() + 1)

    def model(x: jax.Array, lengths: jax.Array) -> None:
        bias = numpyro.param("bias", jnp.asarray(np.log(rates / (1 - rates))))
        emission = numpyro.param("emission", lambda key: 0.3 * jax.random.normal(key, (STATE, keys)))
        move = numpyro.param("move", 0.9 * jnp.eye(STATE))

        def step(z: jax.Array, now: tuple) -> tuple[jax.Array, None]:
            time, chord = now
            with numpyro.plate("chorale", len(lengths)), handlers.mask(mask=time < lengths):
                z = numpyro.sample("z", dist.Normal(z @ move, 1.0).to_event(1))
                down = dist.BernoulliLogits(bias + z @ emission).to_event(1)
                numpyro.sample("x", down, obs=chord)
            return z, None

        times = jnp.arange(x.shape[1])
        scan(step, jnp.zeros((len(lengths), STATE)), (times, x.swapaxes(0, 1)))

    return split(model, (chords, lengths), 77)


def split(model: Callable[..., Any], data: Any, number: int, **options: Any) -> Case:
    """Return a case of which the first rows are held out."""
    held_out, train = (take_rows(data, 0, rows) for rows in (slice(number), slice(number, None)))
    return Case(model, train, held_out, options)


def read(folder: Path, rng: np.random.Generator) -> Iterator[Case]:
    with np.load(folder / "pbmc_5k_protein_v3.npz") as file:
        counts = rng.permutation(file["counts"][:, file["hvg"]]).astype(np.float32)
    counts = counts[:, counts[40:].sum(0) > 0]
    yield "cells", cells(counts)
    with np.load(folder / "radon_MN.npz") as file:
        county, floor, y = (file[k] for k in ("county", "floor", "log_radon"))
    sizes = np.bincount(county)
    there = np.arange(sizes.max()) < sizes[:, None]
    x, f = np.zeros(there.shape, np.float32), np.zeros(there.shape, np.float32)
    order = np.argsort(county, kind="stable")
    x[there], f[there] = y[order], floor[order]
    p = rng.permutation(len(x))
    yield "radon", radon(x[p], f[p], there[p])
    file = loadmat(folder / "JSB_Chorales.mat")
    rolls = [*file["testdata"][0], *file["traindata"][0]]
    lengths = np.array([len(r) for r in rolls])
    chords = np.zeros((len(rolls), lengths.max(), 88), np.float32)
    for row, roll in zip(chords, rolls): row[:len(roll)] = roll
    yield "chorales", chorales(chords, lengths)
