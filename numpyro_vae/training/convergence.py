"""Whether training has ended where it should, as far as the losses say."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from numpyro_vae.model.sites import ModelSites
from numpyro_vae.objectives import ImportanceWeightedELBO

# On the log evidence.
BOUNDS = (
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    ImportanceWeightedELBO,
)
FEWEST = 20  # steps in a tenth of the training that are enough to judge by
LEAST = 0.01  # nats a datum; training ten times as long may gain ten times that, which matters
SURE = 3.0  # standard errors


def warn_of_losses(losses: Float[np.ndarray, "num_steps"], svi: SVI, sites: ModelSites) -> None:
    """Warn if the losses were still falling, or are such as no model of the kind can have.

    Looked at is the last tenth of the steps. A fall counts if it is more than the half of the
    spread of single losses, and certain: three standard errors of the line through them.

    Args:
        losses: the negative ELBO per datum of every step, NaN where one was skipped.
        svi: what was trained.
        sites: what its model holds.
    """
    last = losses[np.isfinite(losses)][-(len(losses) // 10) :].astype(float)
    if len(last) < FEWEST or len(losses) < 10 * FEWEST:
        return
    fall, error, spread = _fall(last)
    if fall > max(SURE * error, spread / 2, LEAST):
        warnings.warn(
            f"The loss was still falling when training ended, by {fall:.2g} nats a datum in the "
            f"last tenth of {len(losses)} steps: the posterior is not what it can be. Train for "
            "more epochs, or at a higher learning rate, best one that falls to zero: "
            "optax.adam(optax.cosine_decay_schedule(1e-2, num_steps)).",
            stacklevel=3,
        )
    elbo = -last.mean()
    if type(svi.loss) in BOUNDS and _is_discrete(sites) and elbo > SURE * error:
        warnings.warn(
            f"The ELBO is {elbo:.2g} nats a datum, though all that the model observes is discrete: "
            "probabilities are at most 1, and their logarithms at most 0. Look for latents that "
            "the model masks or does not score, and for distributions whose probabilities do not "
            "add up to 1. Where it is very large, the correlations of the guide have grown beyond "
            "what its precision can undo: train at a lower learning rate.",
            stacklevel=3,
        )


def warn_of_validation(losses: Float[np.ndarray, "num_epochs"]) -> None:
    """Warn if a validation loss is not finite, which cannot be compared with others."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        warnings.warn(
            f"The validation loss was not finite after {bad.size} of {len(losses)} epochs, first "
            f"after epoch {bad[0]}: early stopping cannot compare these. Look at the validation "
            "data for values that the model or the guide gives no density.",
            stacklevel=3,
        )


def _fall(losses: Float[np.ndarray, "num_steps"]) -> tuple[float, float, float]:
    """Return how far a line through losses falls, its standard error, and the spread around it."""
    time = np.linspace(-0.5, 0.5, len(losses))
    square = np.square(time).sum()
    slope = time @ losses / square
    rest = losses - losses.mean() - slope * time
    spread = np.sqrt(np.square(rest).sum() / (len(losses) - 2))
    return -slope, spread / np.sqrt(square), spread


def _is_discrete(sites: ModelSites) -> bool:
    """Whether all that a model observes is discrete, and all its priors are proper."""
    observed = [site.is_discrete for site in sites.sites.values() if site.is_observed]
    proper = not any(site.is_improper for site in sites.sites.values())
    return bool(observed) and all(observed) and proper
