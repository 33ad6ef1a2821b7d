"""Models of real data for ``quality.py``, and random data of the same form to see that they run.

A folder holds ``lsat.csv`` (people by five answers), ``ap.npz`` (documents by words, the parts of
a sparse matrix), ``pbmc_5k_protein_v3.npz`` (cells by genes), ``radon_MN.npz`` (a value for each
house, and its county) and ``JSB_Chorales.mat`` (chords by 88 keys of each chorale).
"""

from collections.abc import Callable
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
from scipy.special import digamma, gammaln, logsumexp
from sklearn.decomposition import LatentDirichletAllocation

from numpyro_vae import Posterior, Report
from numpyro_vae.data.arrays import take_rows

TOPICS, CONCENTRATION = 20, 0.2  # of the Dirichlet prior of a document's shares of topics
LEAST = 30  # documents that a word is in; others are left out
IDLE = 0.005  # of the words; a topic of fewer is idle
CELL_STATE, CHORALE_STATE = 8, 4
MOST_CHORDS = 32  # of a chorale; what is beyond is cut off


class Case(NamedTuple):
    """A model, rows to train on, and rows held out.

    ``options`` are those of `amortize`, and ``say`` prints more of what was found.
    """

    model: Callable[..., Any]
    train: Any
    test: Any
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    say: Callable[[Posterior, Report], str] | None = None


def split(model: Callable[..., Any], data: Any, number: int, **options: Any) -> Case:
    """Return a case of which the first rows are held out."""
    test, train = (take_rows(data, 0, rows) for rows in (slice(number), slice(number, None)))
    return Case(model, train, test, options)


def item_response(answers: np.ndarray) -> Case:
    """The ability of each person, and easiness and slope of five questions."""

    def model(x: jax.Array) -> None:
        easiness = numpyro.sample("easiness", dist.Normal(0.0, 3.0).expand([5]).to_event(1))
        slope = numpyro.sample("slope", dist.LogNormal(0.0, 0.5).expand([5]).to_event(1))
        with numpyro.plate("person", len(x)):
            ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
            logits = easiness + slope * ability[:, None]
            numpyro.sample("x", dist.BernoulliLogits(logits).to_event(1), obs=x)

    return split(model, answers, len(answers) // 5)


def radon(log_radon: np.ndarray, floor: np.ndarray, there: np.ndarray) -> Case:
    """The level of each county, given all of its houses; counties padded to the largest."""

    def model(x: jax.Array, floor: jax.Array, there: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        with numpyro.plate("county", len(x)):
            level = numpyro.sample("level", dist.Normal(mu, tau))
            houses = dist.Normal(level[:, None] + slope * floor, sigma)
            numpyro.sample("x", houses.mask(there).to_event(1), obs=x)

    return split(model, (log_radon, floor, there), len(log_radon) // 4)


def cells(counts: np.ndarray) -> Case:
    """Eight factors of each cell behind its counts; loadings and scatter of genes are learned.

    As parameters: were the scatter of each gene a global site, a cell's weights would vary with
    its thousands of values.
    """
    library, number = counts.sum(1), len(counts) // 5
    start = np.log(counts[number:].sum(0) + 0.5)
    shape = CELL_STATE, counts.shape[1]

    def model(x: jax.Array, library: jax.Array) -> None:
        level = jnp.asarray(numpyro.param("level", jnp.asarray(start)))
        loadings = numpyro.param("loadings", lambda key: 0.05 * jax.random.normal(key, shape))
        log_concentration = numpyro.param("log_concentration", jnp.zeros(shape[1]))
        concentration = jnp.exp(jnp.asarray(log_concentration))
        with numpyro.plate("cell", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([CELL_STATE]).to_event(1))
            log_mean = jnp.log(library)[:, None] + jax.nn.log_softmax(level + z @ loadings)
            logits = log_mean - jnp.log(concentration)
            counts = dist.NegativeBinomialLogits(concentration, logits)
            numpyro.sample("x", counts.to_event(1), obs=x)

    # To simulate 40,000 cells of 3,471 genes takes minutes on two cores, so there are few steps.
    return split(model, (counts, library), number, num_simulation_steps=1200)


def chorales(chords: np.ndarray, lengths: np.ndarray) -> Case:
    """A state that walks from chord to chord, and what it says of each key."""
    shape = CHORALE_STATE, chords.shape[-1]
    down = (chords.sum((0, 1)) + 0.5) / (lengths.sum() + 1)

    def model(x: jax.Array, lengths: jax.Array) -> None:
        level = jnp.asarray(numpyro.param("level", jnp.asarray(np.log(down / (1 - down)))))
        loadings = numpyro.param("loadings", lambda key: 0.3 * jax.random.normal(key, shape))
        move = jnp.asarray(numpyro.param("move", 0.9 * jnp.eye(CHORALE_STATE)))

        def step(z: jax.Array, now: tuple) -> tuple[jax.Array, None]:
            time, chord = now
            with numpyro.plate("chorale", len(lengths)), handlers.mask(mask=time < lengths):
                z = jnp.asarray(numpyro.sample("z", dist.Normal(z @ move, 1.0).to_event(1)))
                keys = dist.BernoulliLogits(level + z @ loadings).to_event(1)
                numpyro.sample("x", keys, obs=chord)
            return z, None

        start = jnp.zeros((len(lengths), CHORALE_STATE))
        scan(step, start, (jnp.arange(x.shape[1]), x.swapaxes(0, 1)))

    # A step takes a tenth of a second.
    options = {"num_steps": 1000, "num_simulation_steps": 300}
    return split(model, (chords, lengths), len(lengths) // 4, **options)


def topics(counts: np.ndarray) -> Case:
    """Latent Dirichlet allocation: the shares of topics in each document."""
    number = len(counts) // 10
    seen = counts[number:].sum(0) + 0.05
    start, shape = np.log(seen / seen.sum()), (TOPICS, counts.shape[1])
    longest = int(counts.sum(1).max())

    def model(x: jax.Array) -> None:
        words = numpyro.param("words", lambda key: 0.05 * jax.random.normal(key, shape))
        # In units of ten, as a step of Adam is one of 0.002.
        of_topics = jax.nn.softmax(start + 10 * jnp.asarray(words))
        with numpyro.plate("document", len(x)):
            prior = dist.Dirichlet(jnp.full(TOPICS, CONCENTRATION))
            shares = numpyro.sample("shares", prior)
            lengths = x.sum(-1).astype(int)
            words = dist.Multinomial(lengths, shares @ of_topics, total_count_max=longest)
            numpyro.sample("x", words, obs=x)

    # Simulations take as long as the steps, on two cores five minutes in all.
    case = split(model, counts, number, num_simulation_steps=9000)

    def say(posterior: Posterior, report: Report) -> str:
        x = case.test[: len(report.verdict)]
        orders = gammaln(x.sum(1) + 1) - gammaln(x + 1).sum(1)  # of a document's words
        ours = perplexity(report.dataset["elbo"].values - orders, x)
        best = perplexity(report.dataset["log_evidence"].values - orders, x)
        shares = posterior.sample(jax.random.key(2), x, 100)["shares"].mean(0)
        theirs = LatentDirichletAllocation(TOPICS, max_iter=50, random_state=0).fit(case.train)
        found = theirs.transform(x)
        return (
            f"  perplexity {ours:.0f} by the ELBO, {best:.0f} by the evidence, {idle(shares, x)} "
            f"idle topics; scikit-learn {perplexity(bound(theirs, x), x):.0f} by its bound, "
            f"{idle(found, x)} idle topics"
        )

    return case._replace(say=say)


def perplexity(log_probs: np.ndarray, counts: np.ndarray) -> float:
    """Return the inverse of the geometric mean of the words' probabilities."""
    return float(np.exp(-log_probs.sum() / counts.sum()))


def idle(shares: np.ndarray, counts: np.ndarray) -> int:
    """Return how many topics few of the words belong to."""
    lengths = counts.sum(1)
    return int((lengths @ shares / lengths.sum() < IDLE).sum())


def bound(lda: LatentDirichletAllocation, counts: np.ndarray) -> np.ndarray:
    """Return the ELBO of each document, its words in order, given the mean of the topics."""
    words = np.log(lda.components_ / lda.components_.sum(1, keepdims=True))
    prior = lda.doc_topic_prior_
    gamma = lda.transform(counts, normalize=False)
    total = gamma.sum(1)
    log_shares = digamma(gamma) - digamma(total)[:, None]
    found = ((prior - gamma) * log_shares + gammaln(gamma) - gammaln(prior)).sum(1)
    found += gammaln(prior * TOPICS) - gammaln(total)
    for row, x in enumerate(counts):
        seen = np.flatnonzero(x)
        found[row] += x[seen] @ logsumexp(log_shares[row, :, None] + words[:, seen], axis=0)
    return found


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return arrays of unequal lengths as one, zeros behind, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    found = np.zeros((len(rows), lengths.max(), *rows[0].shape[1:]), np.float32)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = row
    return found, lengths


def read(name: str, folder: Path, rng: np.random.Generator) -> Case:
    """Return a case of `REAL`, rows in a random order."""
    make, data, _ = REAL[name]
    found = data(folder)
    order = rng.permutation(len(found[0]))
    return make(*(array[order] for array in found))


def tiny(name: str, rng: np.random.Generator) -> Case:
    """Return a case of `REAL` with a few random data."""
    make, _, data = REAL[name]
    return make(*data(rng))


def _answers(folder: Path) -> tuple[np.ndarray, ...]:
    answers = np.loadtxt(folder / "lsat.csv", delimiter=",", skiprows=1)[:, -5:]
    return (answers.astype(np.float32),)


def _documents(folder: Path) -> tuple[np.ndarray, ...]:
    with np.load(folder / "ap.npz") as file:
        parts = (file["data"], file["indices"], file["indptr"])
        counts = csr_matrix(parts, shape=tuple(file["shape"]))
    counts = counts[:, counts.getnnz(0) >= LEAST]
    return (counts[counts.getnnz(1) > 0].toarray().astype(np.float32),)


def _cells(folder: Path) -> tuple[np.ndarray, ...]:
    with np.load(folder / "pbmc_5k_protein_v3.npz") as file:
        counts = file["counts"][:, file["hvg"]]
    return (counts[:, counts.sum(0) > 0].astype(np.float32),)


def _counties(folder: Path) -> tuple[np.ndarray, ...]:
    with np.load(folder / "radon_MN.npz") as file:
        county, houses = file["county"], np.stack([file["log_radon"], file["floor"]], 1)
    x, sizes = padded([houses[county == number] for number in np.unique(county)])
    return x[..., 0], x[..., 1], np.arange(x.shape[1]) < sizes[:, None]


def _chords(folder: Path) -> tuple[np.ndarray, ...]:
    file = loadmat(folder / "JSB_Chorales.mat")
    rolls = [roll for part in ("train", "valid", "test") for roll in file[f"{part}data"][0]]
    return padded([roll[:MOST_CHORDS] for roll in rolls])


def _tiny_houses(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    x = rng.normal(size=(40, 6, 2)).astype(np.float32)
    return x[..., 0], x[..., 1], rng.random((40, 6)) < 0.7


def _tiny_counts(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    counts = rng.poisson(2.0, (40, 12)) + 1.0  # as no row is to be empty
    return (counts.astype(np.float32),)


def _tiny_chords(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    chords = rng.integers(0, 2, (40, 5, 4)).astype(np.float32)
    return padded([chord[: 2 + number % 4] for number, chord in enumerate(chords)])


Data = tuple[np.ndarray, ...]
# By name how to make a case of data, to read these, and to make up a few.
REAL: dict[
    str,
    tuple[Callable[..., Case], Callable[[Path], Data], Callable[[np.random.Generator], Data]],
] = {
    "item_response": (item_response, _answers, lambda rng: (rng.integers(0, 2, (40, 5)),)),
    "topics": (topics, _documents, _tiny_counts),
    "cells": (cells, _cells, _tiny_counts),
    "radon": (radon, _counties, _tiny_houses),
    "chorales": (chorales, _chords, _tiny_chords),
}
