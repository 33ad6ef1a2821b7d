"""Topics of news stories: each document is a mixture of a few of them.

Run ``python examples/topics.py --data ap.npz``. This is ProdLDA (Srivastava and Sutton,
*Autoencoding Variational Inference for Topic Models*, ICLR 2017). A document's words are
multinomial, and their logits are a mixture of those of the topics. The mixture is the softmax of a
Normal latent, wide enough to make it sparse: that of the Laplace approximation to a Dirichlet
prior. The encoder reads the shares of the words, on a logarithmic scale.

The data are an ``.npz`` with a sparse matrix of counts, documents by words, in the parts ``data``,
``indices``, ``indptr`` and ``shape``, and the words themselves as ``vocab``.

Of each document held out, half of the words are given and the other half predicted. It prints the
perplexity of these, and how well the foremost words of a topic go together, beside those of
scikit-learn's latent Dirichlet allocation, and writes a picture and an ArviZ DataTree into
``output/``.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from scipy.sparse import csr_matrix
from scipy.special import softmax
from sklearn.decomposition import LatentDirichletAllocation

from numpyro_vae import (
    MLP,
    AutoAmortizedNormal,
    FitResult,
    Importance,
    Posterior,
    Report,
    fit,
    plot_khat,
    plot_training,
)

TOPICS = 20
CONCENTRATION = 0.2  # of the Dirichlet distribution that the prior is like
TEST = 300  # documents held out


class Corpus(NamedTuple):
    """Counts ``(documents, words)``, and the words."""

    counts: np.ndarray
    vocab: np.ndarray


def load(path: Path) -> Corpus:
    """Read the words that occur in at least 30 documents, documents in a fixed random order."""
    with np.load(path) as file:
        parts = (file["data"], file["indices"], file["indptr"])
        counts = csr_matrix(parts, shape=tuple(file["shape"]))
        common = counts.getnnz(0) >= 30
        counts, vocab = counts[:, common].toarray().astype(np.float32), file["vocab"][common]
    return Corpus(np.random.default_rng(0).permutation(counts[counts.sum(1) > 0]), vocab)


def make_model(counts: np.ndarray) -> Callable[[jax.Array], None]:
    """The generative model; each word starts as frequent as it is in all documents."""
    level = np.log((counts.sum(0) + 0.5) / (counts.sum() + 0.5 * counts.shape[1]))
    longest = int(counts.sum(1).max())
    scale = np.sqrt((1 - 1 / TOPICS) / CONCENTRATION)

    def some(rng_key: jax.Array) -> jax.Array:
        return 0.1 * jax.random.normal(rng_key, (TOPICS, len(level)))

    def model(counts: jax.Array) -> None:
        words = jnp.asarray(numpyro.param("words", some))
        common = jnp.asarray(numpyro.param("level", jnp.asarray(level, jnp.float32)))
        with numpyro.plate("document", len(counts)):
            prior = dist.Normal(0.0, scale).expand([TOPICS]).to_event(1)
            z = jnp.asarray(numpyro.sample("z", prior))
            topics = jnp.asarray(numpyro.deterministic("topics", jax.nn.softmax(z)))
            logits, length = common + topics @ words, counts.sum(-1).astype(int)
            likelihood = dist.MultinomialLogits(logits, length, total_count_max=longest)
            numpyro.sample("counts", likelihood, obs=counts)

    return model


def shares_of_words(counts: jax.Array) -> jax.Array:
    """Return what the encoder reads, much the same for a document and for half of it."""
    return jnp.log1p(1000 * counts / counts.sum(-1, keepdims=True))


def halves(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the words of every document at random."""
    given = np.random.default_rng(1).binomial(counts.astype(int), 0.5).astype(np.float32)
    return given, counts - given


def perplexity(probabilities: np.ndarray, counts: np.ndarray) -> float:
    """Return the inverse of the geometric mean of the words' probabilities."""
    return float(np.exp(-(counts * np.log(probabilities)).sum() / counts.sum()))


def predict_words(posterior: Posterior, given: np.ndarray) -> np.ndarray:
    """Return the probability of every word in a document of which some words are given."""
    draws = posterior.sample(jax.random.key(2), given, 50)["z"]
    words = softmax(draws, axis=-1) @ np.asarray(posterior.params["words"])
    return softmax(words + np.asarray(posterior.params["level"]), axis=-1).mean(0)


def coherence(topics: np.ndarray, counts: np.ndarray, size: int = 10) -> float:
    """Return the normalized pointwise mutual information of the foremost words of a topic.

    It is -1 if they never stand in the same document, and 1 if always (Lau, Newman and Baldwin,
    *Machine Reading Tea Leaves*, EACL 2014). The mean over topics.
    """
    seen, found = (counts > 0).astype(float), []
    for words in np.argsort(topics, axis=1)[:, ::-1][:, :size]:
        both = (seen[:, words].T @ seen[:, words] + 1e-2) / len(seen)
        score = np.log(both / np.outer(np.diag(both), np.diag(both))) / -np.log(both)
        found.append(score[np.triu_indices(size, 1)].mean())
    return float(np.mean(found))


def foremost(topic: np.ndarray, vocab: np.ndarray, size: int = 6) -> str:
    """Return the words that a topic raises most."""
    return " ".join(vocab[np.argsort(topic)[::-1][:size]])


def draw(
    topics: np.ndarray,
    shares: np.ndarray,
    vocab: np.ndarray,
    found: Report,
    result: FitResult,
    path: Path,
) -> None:
    """The topics' words and how common they are, a few documents, the k-hats and the training."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplot_mosaic("DS;KT", height_ratios=[1.5, 1])
    order = np.argsort(shares.mean(0))
    axes["S"].barh([foremost(topics[k], vocab) for k in order], shares.mean(0)[order])
    axes["S"].set(title="Topics, and their mean share of a document", xlabel="share")
    axes["D"].imshow(shares[:30][:, order[::-1]], aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes["D"].set(title="Documents held out", xlabel="topic, commonest first", ylabel="document")
    plot_khat(found, ax=axes["K"])
    plot_training(result, ax=axes["T"])
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, compare, check, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an .npz, see the docstring")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    corpus = load(args.data)
    train, test = corpus.counts[TEST:], corpus.counts[:TEST]
    num_epochs, batch_size = 2 if args.quick else 80, 100
    model = make_model(train)
    encoder = partial(MLP, hidden_sizes=(100, 100))
    guide = AutoAmortizedNormal(model, encoder, inputs=shares_of_words)
    steps = num_epochs * -(-len(train) // batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    result = fit(
        svi,
        jax.random.key(0),
        train,
        batch_size=batch_size,
        num_epochs=num_epochs,
        validation=test,
    )

    posterior = Posterior(guide, result)
    num_samples = 100 if args.quick else 500
    found = posterior.check(
        jax.random.key(1), test, checks=(Importance(num_samples=num_samples), "collapse")
    )
    theirs = LatentDirichletAllocation(
        TOPICS, max_iter=2 if args.quick else 30, learning_method="online", random_state=0
    ).fit(train)
    topics = np.asarray(result.params["words"]) + np.asarray(result.params["level"])
    given, rest = halves(test)
    by_lda = theirs.transform(given) @ (
        theirs.components_ / theirs.components_.sum(1, keepdims=True)
    )
    alike = np.broadcast_to((train.sum(0) + 0.5) / (train.sum(0) + 0.5).sum(), test.shape)
    print(f"\nHeld out: {found}\n")
    print("                              perplexity   coherence of topics")
    print(f"every document alike          {perplexity(alike, rest):10.1f}")
    ours = perplexity(predict_words(posterior, given), rest), coherence(topics, test)
    print(f"this model                    {ours[0]:10.1f}   {ours[1]:.3f}")
    lda = perplexity(by_lda, rest), coherence(theirs.components_, test)
    print(f"latent Dirichlet allocation   {lda[0]:10.1f}   {lda[1]:.3f}")

    latents = posterior.sample(jax.random.key(2), test, 100)["z"]
    shares = softmax(latents, axis=-1).mean(0)
    draw(topics, shares, corpus.vocab, found, result, args.output / "topics.png")
    tree = posterior.to_datatree(jax.random.key(3), test[:20], 10)
    path = args.output / "topics.nc"
    found.isel(document=slice(20)).add_to(tree).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")


if __name__ == "__main__":
    main()
