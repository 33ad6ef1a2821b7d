"""Gap: how much of a datum's bound the network loses, and how much the family."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from scipy.special import logsumexp

from numpyro_vae.checks.base import Finding, Findings, Subject
from numpyro_vae.inference.quantities import View
from numpyro_vae.inference.refine import log_weights, refine, release

NUM_GLOBALS = 64  # draws of the global sites among which particles choose
TOLERANCE = 0.1  # nats on average, below which a gap is nothing to act on


def gap(subject: Subject, *, num_samples: int, max_rows: int) -> dict[str, Any]:
    r"""Split the inference gap of a datum, as Cremer, Li and Duvenaud do.

    .. math::
        \underbrace{\log p(x) - L[q]}_\text{inference}
        = \underbrace{\log p(x) - L[q^*]}_\text{approximation}
        + \underbrace{L[q^*] - L[q]}_\text{amortization}

    where :math:`L` is the ELBO, :math:`q` what the network says, and :math:`q^*` the best of the
    guide's family for this very datum, found by optimizing its own variational parameters. The log
    evidence is estimated from the draws of :math:`q^*`.

    Reference:
        Cremer, Li and Duvenaud, *Inference Suboptimality in Variational Autoencoders*, ICML 2018.
    """
    rowwise, chosen = subject.rowwise, subject.choose(max_rows)
    rows = subject.rows.choose(chosen)
    globals_ = rowwise.draw_globals(subject.rng_key, rows, NUM_GLOBALS)
    sizes = {"num_samples": num_samples, "num_draws": num_samples}
    found = rowwise.apply(_before_and_after, rows, subject.rng_key, globals_, **sizes)
    first, last = (found[name].astype(float) for name in ("first", "last"))
    evidence = logsumexp(last, axis=1) - np.log(num_samples)
    weights = np.exp(last - evidence[:, None])  # of mean one
    gaps = {
        "gap_amortization": last.mean(1) - first.mean(1),
        "gap_approximation": evidence - last.mean(1),
        "gap_inference": evidence - first.mean(1),
        "gap_amortization_mcse": (last - first).std(1, ddof=1) / np.sqrt(num_samples),
        "gap_approximation_mcse": (weights - last).std(1, ddof=1) / np.sqrt(num_samples),
        "refined_converged": found["converged"],
    }
    plate = [subject.plate]
    return {name: (plate, subject.spread(chosen, values)) for name, values in gaps.items()}


def _before_and_after(view: View, rng_key: Array, globals_: dict, *, num_samples: int) -> dict:
    """Return the log weights of draws of what the network says, and of what is best."""
    refine_key, key = jax.random.split(rng_key)
    refined, converged = refine(view, refine_key, globals_)
    first, last = (
        log_weights(seen, key, globals_, num_samples).T for seen in (release(view), refined)
    )
    return {"first": first, "last": last, "converged": converged}


ADVICE = {
    "amortization": "a larger encoder, longer training, or posterior.repair for the rows at stake",
    "approximation": "a richer family: AutoAmortizedMultivariateNormal, AutoAmortizedFlow",
}


def find(dataset: Any, attrs: dict[str, Any]) -> Findings:
    """Return both gaps, averaged over the data that were looked at."""
    for kind, advice in ADVICE.items():
        gaps = dataset[f"gap_{kind}"].values
        looked = np.isfinite(gaps)
        errors = dataset[f"gap_{kind}_mcse"].values[looked]
        mean, error = gaps[looked].mean(), np.sqrt((errors**2).sum()) / looked.sum()
        ok = mean < TOLERANCE + 3 * error
        text = f"the {kind} gap is {mean:.3f} nats a datum (of {looked.sum():,} looked at)"
        yield Finding("gap", bool(ok), text, "" if ok else advice)
    still = np.sum(dataset["refined_converged"].values == 0)
    if still:
        yield Finding(
            "gap",
            False,
            f"{still} rows were still improving when their optimization stopped",
            "their amortization gap is at least what is given",
        )
