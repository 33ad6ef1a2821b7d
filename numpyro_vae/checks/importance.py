"""Importance: what the weights of a datum's draws say of its posterior."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_vae.checks.base import Finding, Findings, Subject
from numpyro_vae.inference.psis import khat_of_tail, require_draws, require_finite, tail_length
from numpyro_vae.inference.quantities import View, weigh

CHUNK = 1000  # draws at once, so that any number of them fits in memory


class Sums(NamedTuple):
    """What is kept of the log weights drawn so far, by row: enough for all that is reported.

    Log weights are counted from a ``reference``, the highest at first, as the log density of an
    image is in the thousands and what matters of it in the hundredths.
    """

    reference: Float[Array, "batch"]
    count: Float[Array, "batch"]
    mean: Float[Array, "batch"]
    squares: Float[Array, "batch"]  # of deviations from the mean
    log_sum: Float[Array, "batch"]  # of the weights
    log_sum_squares: Float[Array, "batch"]
    lowest: Float[Array, "batch"]
    num_bad: Float[Array, "batch"]
    largest: Float[Array, "batch tail"]

    @classmethod
    def start(cls, num_rows: int, tail: int) -> Sums:
        """Return the sums of no draws, with room for ``tail`` of the largest log weights."""
        zeros, low = jnp.zeros(num_rows), jnp.full(num_rows, -jnp.inf)
        largest = jnp.full((num_rows, tail), -jnp.inf)
        return cls(zeros, zeros, zeros, zeros, low, low, -low, zeros, largest)

    def add(self, log_weights: Float[Array, "num_samples batch"]) -> Sums:
        """Return the sums with further draws."""
        log_weights = jnp.asarray(log_weights)
        reference = jnp.where(self.count == 0, log_weights.max(0), self.reference)
        added = (log_weights - reference).T
        count, number = self.count + added.shape[1], added.shape[1]
        shift = added.mean(1) - self.mean
        squares = ((added - added.mean(1, keepdims=True)) ** 2).sum(1)
        both = jnp.concatenate([self.largest, added], axis=1)
        return Sums(
            reference,
            count,
            self.mean + shift * number / count,
            self.squares + squares + shift**2 * self.count * number / count,
            jnp.logaddexp(self.log_sum, jax.nn.logsumexp(added, axis=1)),
            jnp.logaddexp(self.log_sum_squares, jax.nn.logsumexp(2 * added, axis=1)),
            jnp.minimum(self.lowest, added.min(1)),
            self.num_bad + (~jnp.isfinite(log_weights)).sum(0),
            jax.lax.top_k(both, self.largest.shape[1])[0],
        )


def _accumulate(
    view: View, sums: Sums, rng_key: Array, globals_: dict, *, num_samples: int
) -> Sums:
    return sums.add(weigh(view, rng_key, globals_, num_samples=num_samples)["log_weights"])


def importance(subject: Subject, *, num_samples: int) -> dict[str, Any]:
    r"""Return by row what the weights :math:`w_s = p(x, z_s) / q(z_s \mid x)` say.

    The ELBO is the mean of :math:`\log w_s`, the log evidence
    :math:`\log \frac1S \sum_s w_s`, and the effective sample size
    :math:`(\sum_s w_s)^2 / \sum_s w_s^2`. Draws are added up as they come, and of their weights
    only the tail is kept, so that memory does not grow with their number but by its square root.

    Reference:
        Yao, Vehtari, Simpson and Gelman, *Yes, but Did It Work?*, ICML 2018; Burda, Grosse and
        Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016.

    Raises:
        ValueError: if there are too few draws for a k-hat, or a row's weights are not finite.
    """
    require_draws(num_samples)
    rowwise, rows = subject.rowwise, subject.rows
    sizes = [min(CHUNK, num_samples - start) for start in range(0, num_samples, CHUNK)]
    keys = [jax.random.fold_in(subject.rng_key, number) for number in range(len(sizes))]
    chunks = [
        (key, rowwise.draw_globals(key, rows, size), size)
        for key, size in zip(keys, sizes, strict=True)
    ]
    tail = tail_length(num_samples) + 1

    def of_batch(arrays: Any, indices: Array, **how: Any) -> Sums:
        sums = Sums.start(len(indices), tail)
        for key, globals_, size in chunks:
            add = partial(rowwise.run, _accumulate, sums, key, globals_)
            sums = add(arrays, indices, num_samples=size, **how)
        return sums

    found = rows.collect(of_batch, rowwise.rows_at_once(min(CHUNK, num_samples)))
    return {name: ([subject.plate], values) for name, values in summarize(found).items()}


def summarize(sums: Sums) -> dict[str, np.ndarray]:
    """Return what is reported of each row, from the sums over all its draws.

    Raises:
        ValueError: if a row's weights are not finite.
    """
    highest = np.asarray(sums.largest[:, 0], float)
    bad, first = np.asarray(sums.num_bad), np.asarray(sums.reference)
    require_finite(bad, first, np.arange(len(bad)))
    reference = np.asarray(sums.reference, float)
    number = float(np.max(sums.count))
    log_sum, log_squares = (np.asarray(x, float) for x in (sums.log_sum, sums.log_sum_squares))
    ess = np.exp(2 * log_sum - log_squares)
    relative_variance = np.maximum(number / ess - 1, 0) / (number - 1)
    return {
        "elbo": reference + sums.mean,
        "elbo_mcse": np.sqrt(np.asarray(sums.squares, float) / (number - 1) / number),
        "log_evidence": reference + log_sum - np.log(number),
        "log_evidence_mcse": np.sqrt(relative_variance),
        "khat": khat_of_tail(
            np.asarray(sums.largest, float).T, np.asarray(sums.lowest), highest, reference
        ),
        "ess": ess,
    }


def find(dataset: Any, attrs: dict[str, Any]) -> Findings:
    """Return how many rows have a posterior that cannot be trusted."""
    khat, threshold = dataset["khat"].values, attrs["khat_threshold"]
    bad = int((~(khat < threshold)).sum())  # NaN, of a tail of ties, is no good sign
    text = f"{bad:,} of {khat.size:,} rows have k-hat > {threshold:.2f}"
    advice = "repair them: posterior.repair(rng_key, data, report)" if bad else ""
    yield Finding("importance", not bad, text, advice)
