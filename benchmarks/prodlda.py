"""A topic model as NumPyro's example ``prodlda.py`` has it, with its guide written by hand.

A document's shares of topics have a flat Dirichlet prior; its words are multinomial, their logits a
batch-normalized linear map of the shares (Srivastava and Sutton, *Autoencoding Variational
Inference for Topic Models*, ICLR 2017).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from numpyro.contrib.module import flax_module
from scipy.sparse import csr_matrix

DROPOUT = 0.2


class Sizes(NamedTuple):
    topics: int
    hidden: int
    batch_size: int
    num_test: int
    vocabulary: int = 0
    num_words: int = 0  # the most that a document has


AP = Sizes(topics=12, hidden=200, batch_size=32, num_test=246)
TINY = Sizes(topics=3, hidden=8, batch_size=8, num_test=8)


def load(path: str | None, sizes: Sizes) -> tuple[jax.Array, jax.Array, Sizes]:
    """Return counts, documents by words, to train with and to test with, and the sizes of all.

    Words are left out that occur in fewer than 20 documents, or in more than half of them.

    Args:
        path: an .npz with a sparse matrix in the parts ``data``, ``indices``, ``indptr`` and
            ``shape``; None for a few documents of random words.
        sizes: of the model.
    """
    rng = np.random.default_rng(0)
    if path is None:
        counts = rng.poisson(2.0, (4 * sizes.num_test, 30))
    else:
        with np.load(path) as file:
            parts = (file["data"], file["indices"], file["indptr"])
            sparse = csr_matrix(parts, shape=tuple(file["shape"]))
        documents = sparse.getnnz(0)
        sparse = sparse[:, (documents >= 20) & (documents <= 0.5 * sparse.shape[0])]
        counts = sparse.toarray()
    counts = rng.permutation(counts[counts.sum(1) > 0]).astype(np.float32)
    sizes = sizes._replace(vocabulary=counts.shape[1], num_words=int(counts.sum(1).max()))
    test, train = np.split(counts, [sizes.num_test])
    return jnp.asarray(train), jnp.asarray(test), sizes


def normalize(train: bool) -> nn.BatchNorm:
    """A layer that makes the mean of a batch 0 and its variance 1."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, use_bias=False, use_scale=False
    )


class Decoder(nn.Module):
    """From shares of topics to the logits of words."""

    vocabulary: int

    @nn.compact
    def __call__(self, shares: jax.Array, train: bool) -> jax.Array:
        shares = nn.Dropout(DROPOUT, deterministic=not train)(shares)
        return normalize(train)(nn.Dense(self.vocabulary, use_bias=False)(shares))


class Trunk(nn.Module):
    """From counts of words to features: all that the library is handed."""

    hidden: int

    @nn.compact
    def __call__(self, counts: jax.Array, train: bool) -> jax.Array:
        for _ in range(2):
            counts = nn.softplus(nn.Dense(self.hidden)(counts))
        return nn.Dropout(DROPOUT, deterministic=not train)(counts)


class Encoder(nn.Module):
    """From counts of words to the concentration of a Dirichlet distribution."""

    topics: int
    hidden: int

    @nn.compact
    def __call__(self, counts: jax.Array, train: bool) -> jax.Array:
        features = Trunk(self.hidden)(counts, train)
        return jnp.exp(normalize(train)(nn.Dense(self.topics)(features)))


def declare(name: str, module: nn.Module, size: int, train: bool) -> Callable[..., jax.Array]:
    """Declare a linen module with batch statistics, and return it as a function."""
    apply = flax_module(
        name,
        module,
        input_shape=(1, size),
        apply_rng=["dropout"],
        mutable=["batch_stats"],
        train=True,
    )
    return lambda inputs: apply(inputs, train, rngs={"dropout": numpyro.prng_key()})


def make_model(sizes: Sizes) -> Callable[..., None]:
    """The generative model; it subsamples where it is trained."""

    def model(counts, is_training=False):
        decode = declare("decoder", Decoder(sizes.vocabulary), sizes.topics, is_training)
        size = sizes.batch_size if is_training else None
        with numpyro.plate("documents", len(counts), subsample_size=size):
            counts = numpyro.subsample(counts, event_dim=1)
            shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(sizes.topics)))
            length = counts.sum(-1).astype(int)
            words = dist.MultinomialLogits(decode(shares), length, total_count_max=sizes.num_words)
            numpyro.sample("counts", words, obs=counts)

    return model


def make_guide(sizes: Sizes) -> Callable[..., None]:
    """The guide written by hand."""

    def guide(counts, is_training=False):
        module = Encoder(sizes.topics, sizes.hidden)
        encode = declare("encoder", module, sizes.vocabulary, is_training)
        size = sizes.batch_size if is_training else None
        with numpyro.plate("documents", len(counts), subsample_size=size):
            counts = numpyro.subsample(counts, event_dim=1)
            numpyro.sample("shares", dist.Dirichlet(encode(counts)))

    return guide
