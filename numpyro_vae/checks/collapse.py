"""Collapse: which latent dimensions say something of the data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array

from numpyro_vae.checks.base import Finding, Findings, Subject
from numpyro_vae.inference.quantities import View, diverge

COLLAPSED = 0.01  # nats of mean divergence from the prior below which a dimension says nothing
NUM_SAMPLES = 32  # enough for a mean; most divergences are known in closed form
MAX_PAIRED = 1024  # data whose guides are compared with one another


def collapse(subject: Subject) -> dict[str, Any]:
    r"""Return how far guides are from the prior, and from each other.

    ``kl_<site>`` is the divergence from the prior by datum and dimension; ``activity_<site>`` the
    share of a dimension's variance that is between data, ``Var_x E_q[z]`` of that and
    ``E_x Var_q[z]`` together, of unconstrained values, above 0.01 for an active unit (Burda et al.,
    2016, take the numerator, as their prior has variance one). The mean divergence is the mutual
    information of data and latents plus the divergence of the aggregate posterior from the prior
    (Hoffman and Johnson, *ELBO surgery*, 2016): ``mutual_information``, which with :math:`M` data
    cannot exceed :math:`\log M`, and ``aggregate_divergence``.
    """
    rowwise, rows, key = subject.rowwise, subject.rows, subject.rng_key
    globals_ = rowwise.draw_globals(key, rows, NUM_SAMPLES)
    sizes = {"num_samples": NUM_SAMPLES, "num_draws": NUM_SAMPLES}
    divergences = rowwise.apply(diverge, rows, key, globals_, **sizes)
    found: dict[str, Any] = {}
    for name, kl in divergences.items():
        found[f"kl_{name}"] = ([subject.plate, *_dims(name, kl)], kl)
    for name, (mean, variance) in rowwise.apply(_moments, rows, key, globals_, **sizes).items():
        between, within = mean.var(0), variance.mean(0)
        found[f"activity_{name}"] = (_dims(name, mean), between / (between + within))
    chosen = rows.choose(subject.choose(MAX_PAIRED))
    given = rowwise.draw_globals(key, rows, 1)
    pair = partial(rowwise.run, _information, key, given)
    information = chosen.collect(pair, MAX_PAIRED).mean()
    total = sum(np.nansum(kl.reshape(len(kl), -1), 1) for kl in divergences.values())
    found["mutual_information"] = ([], float(information))
    found["aggregate_divergence"] = ([], float(np.mean(total) - information))
    return found


def _dims(name: str, rows: np.ndarray) -> list[str]:
    return [f"{name}_dim_{axis}" for axis in range(rows.ndim - 1)]


def _moments(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return by site the means and variances of its unconstrained values, rows in front."""
    packed = view.draw(rng_key, num_samples, globals_)
    plate = view.encoding.run.plate
    moments = [view.encoding.unpack(x) for x in (packed.mean(0), packed.var(0))]
    return {
        site.name: tuple(jnp.moveaxis(x, site.axis(plate), 0) for x in (mean, variance))
        for (site, mean), (_, variance) in zip(*moments, strict=True)
    }


def _information(view: View, rng_key: Array, globals_: dict) -> Array:
    """Return how much likelier each datum's draw is by its own guide than by all of them."""
    encoding = view.encoding.condition(globals_)
    draws = view.draw(rng_key, 1, globals_)[0]

    def one(draw: Array) -> Array:
        return encoding.log_prob(jnp.broadcast_to(draw, (1, *draws.shape)))[0]

    by_guide = jax.lax.map(one, draws, batch_size=32)  # draws, guides
    return jnp.diagonal(by_guide) - logsumexp(by_guide, axis=1) + jnp.log(len(draws))


def mean_divergences(dataset: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every site's divergence from the prior by dimension, averaged over the data.

    Values that the model masks do not count; a dimension that it masks for every datum is NaN.
    """
    for key, kl in dataset.data_vars.items():
        if (name := str(key)).startswith("kl_"):
            there = np.isfinite(kl.values)
            number = there.sum(0)
            mean = np.where(there, kl.values, 0).sum(0) / np.maximum(number, 1)
            yield name[3:], np.where(number, mean, np.nan)


def count_collapsed(dataset: Any) -> dict[str, tuple[int, int]]:
    """Return by site how many latent dimensions say nothing of the data, and of how many."""
    return {
        name: (int((means < COLLAPSED).sum()), int(np.isfinite(means).sum()))
        for name, means in mean_divergences(dataset)
    }


def find(dataset: Any, attrs: dict[str, Any]) -> Findings:
    """Return how many dimensions of each site are inactive."""
    for site, (collapsed, size) in count_collapsed(dataset).items():
        text = f"{collapsed} of {size} dimensions of site {site!r} are inactive"
        advice = "fewer dimensions, or warm up the KL" if collapsed else ""
        yield Finding("collapse", not collapsed, text, advice)
