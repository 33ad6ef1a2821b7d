"""Predictive: whether the model, with its latents learned, would produce such data."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.stats import binom

from numpyro_vae.checks.base import Finding, Findings, Subject
from numpyro_vae.inference.quantities import View
from numpyro_vae.model.densities import observed_densities

NUM_SAMPLES = 500
LEVEL = 0.01  # the share of p-values, at both ends together, that is flagged


def predictive(subject: Subject, *, max_rows: int) -> dict[str, Any]:
    r"""Return each datum's posterior predictive p-value of its log-likelihood.

    .. math:: \Pr\bigl(\log p(x^\text{rep} \mid z) \le \log p(x \mid z)\bigr),
        \quad z \sim q(z \mid x),\; x^\text{rep} \sim p(x^\text{rep} \mid z)

    Near 0 for data that are stranger than the model would produce, near 1 for data that are too
    ordinary. Over data from the model, at most twice a share :math:`\alpha` of them lie below
    :math:`\alpha` (Meng, *Posterior Predictive p-Values*, Annals of Statistics, 1994).

    Reference:
        Gelman, Meng and Stern, *Posterior Predictive Assessment of Model Fitness via Realized
        Discrepancies*, Statistica Sinica, 1996.
    """
    rowwise, chosen = subject.rowwise, subject.choose(max_rows)
    rows = subject.rows.choose(chosen)
    globals_ = rowwise.draw_globals(subject.rng_key, rows, NUM_SAMPLES)
    sizes = {"num_samples": NUM_SAMPLES, "num_draws": NUM_SAMPLES}
    found = rowwise.apply(_compare, rows, subject.rng_key, globals_, **sizes)
    return {"predictive_p": ([subject.plate], subject.spread(chosen, found))}


def _compare(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> Array:
    """Return how often a datum is no likelier than the data are; of a tie a half."""
    densities = partial(observed_densities, run=view.encoding.run)

    def one(packed: Array, globals_: dict, key: Array) -> Array:
        latent = view.complete(packed, globals_, key)
        seen = densities(view.trace(latent, key))
        again = densities(view.trace(latent, jax.random.fold_in(key, 1), observed=False))
        return (again < seen) + (again == seen) / 2

    packed = view.draw(rng_key, num_samples, globals_)
    keys = jax.random.split(jax.random.fold_in(rng_key, view.indices[0]), num_samples)
    return jnp.mean(view.over_draws(one, packed, globals_, keys), axis=0)


def find(dataset: Any, attrs: dict[str, Any]) -> Findings:
    """Return how many data the model would hardly have produced."""
    found = dataset["predictive_p"].values
    found = found[np.isfinite(found)]
    bad = int((np.minimum(found, 1 - found) < LEVEL / 2).sum())
    ok = binom.sf(bad - 1, found.size, 2 * LEVEL) > 0.001
    text = f"{bad:,} of {found.size:,} rows are strange, or too ordinary, for what the model makes"
    yield Finding("predictive", bool(ok), text, "" if ok else "another likelihood")
