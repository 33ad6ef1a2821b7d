"""What is compared of a posterior whose rows take steps of their own after the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from densities import rows_of, summed
from jax import Array
from program import NUM_DATA
from reference import as_one, is_enumerated, parts_of, rows_in_front, shared_scale
from subject import NUM_SAMPLES, Subject, close

from numpyro_vae import Posterior

NUM_STEPS, NUM_DRAWS = 2, 300
MOST = 256  # latents of a row that takes steps
WIDENED = 0.01  # nats that a Normal is widened by at most,
TAILS = 0.02  # and in sds of the network's log weights what the points may miss in tails


class Rows(NamedTuple):
    """The latents of a draw side by side, rows in front.

    Attributes:
        unconstrained: values without bounds.
        counts: those of them that the model does not mask.
        volume: of the maps to their supports, on the log scale, by row.
    """

    unconstrained: Any
    counts: Any
    volume: Any


class Found(NamedTuple):
    """What the steps of rows came to.

    Attributes:
        loc: the mean of each row.
        tril: the Cholesky factor of its covariance.
        has_it: which rows have this Normal; others keep what the network says.
    """

    loc: np.ndarray
    tril: np.ndarray
    has_it: np.ndarray


def steps(subject: Subject) -> None:
    """After their steps, rows have Normals of their own; or they are told why they take none."""
    posterior = subject.posterior_of(subject.static, natural_steps=NUM_STEPS)
    sites = {name: subject.trace[name] for name in _names(subject)}
    rows_at = as_one(partial(_rows, sites))
    first = rows_at(subject.values(0))
    if reason := _why_refused(subject, first):
        return _refused(subject, posterior, reason)
    found = _found(subject, posterior, subject.case.data)
    given = (subject.key, subject.case.data, NUM_DRAWS)
    draws, weights = posterior.sample(*given), posterior.log_weights(*given)
    for name, value in {**draws, "log weights": weights}.items():
        assert np.isfinite(value).all(), f"{name} is not finite"
    for number in range(NUM_SAMPLES):
        _weights(subject, found, draws, weights, rows_at, number)
    _no_worse(subject, weights)
    what = subject.case.one_of("steps", ("alone", "among others", "said"))
    _alone(subject, posterior, found, alone=what == "alone")
    counts = np.asarray(first.counts)
    if "flow" not in subject.case.features and (what == "said" or not counts.all()):
        _said(subject, posterior, found, counts)


# -- the rows, and whether they can take steps -----------------------------------------------------


def _names(subject: Subject) -> list[str]:
    return [name for name in subject.local if not is_enumerated(subject.trace[name])]


def _rows(sites: dict[str, dict], values: dict[str, Any]) -> Rows:
    by_site = [_rows_of_site(site, values[name]) for name, site in sites.items()]
    unconstrained, counts, volumes = (jnp.concatenate(x, -1) for x in zip(*by_site, strict=True))
    return Rows(unconstrained, counts, volumes.sum(-1))


def _rows_of_site(site: dict, value: Any) -> list[Array]:
    unconstrained, counts, volume = parts_of(site, value)
    event_dim = unconstrained.ndim - len(site["fn"].batch_shape)
    pairs = ((unconstrained, event_dim), (counts, event_dim), (volume, 0))
    return [rows_in_front(x, site, dims).reshape(NUM_DATA, -1) for x, dims in pairs]


def _why_refused(subject: Subject, rows: Rows) -> str:
    """Return a part of the message that says why rows can take no steps; empty if they can."""
    guide = subject.guide
    reasons = {
        "no density by row": not subject.has_density,
        "heads read values": bool(guide.condition_on or guide.dependencies),
        f"above {MOST}": rows.counts.shape[-1] > MOST,
        "by different factors": shared_scale(subject.trace, NUM_DATA) is None,
        "masked latents": "flow" in subject.case.features and not np.all(rows.counts),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _refused(subject: Subject, posterior: Posterior, reason: str) -> None:
    message = "nothing"
    try:
        posterior.sample(subject.key, subject.case.data, NUM_SAMPLES)
    except ValueError as error:
        message = str(error)
    assert reason in message, f"expected a message with {reason!r}, found {message}"


def _found(subject: Subject, posterior: Posterior, data: Any) -> Found:
    runner = posterior._runner
    stepped = runner.steps(runner.read(data))
    assert stepped is not None
    loc, tril = (np.asarray(x, np.float64) for x in stepped.normal)
    if stepped.share is None:
        return Found(loc, tril, np.ones(len(loc), bool))
    return Found(loc, tril, np.asarray(stepped.share) > 0.5)


# -- what is compared ------------------------------------------------------------------------------


def _weights(
    subject: Subject,
    found: Found,
    draws: dict[str, np.ndarray],
    weights: np.ndarray,
    rows_at: Callable[[dict], Rows],
    number: int,
) -> None:
    """Weights are NumPyro's log-densities less those of the Normals, and draws in supports."""
    values = {name: jnp.asarray(draw[number]) for name, draw in draws.items()}
    values, scale = {**subject.params, **values}, shared_scale(subject.trace, NUM_DATA)
    scored, rows = subject.score(values, subject.encoded), rows_at(values)
    for name, inside in scored.inside.items():
        assert np.asarray(inside).all(), f"{name} is out of its support"
    given = zip(*map(np.asarray, rows[:2]), found.loc, found.tril, strict=True)
    log_q = np.array([_normal(*of_row) for of_row in given]) - np.asarray(rows.volume)
    network = rows_of(scored.log_q, scored.guide_trace) / scale
    log_q = np.where(found.has_it, log_q, network)
    expected = summed(subject, values, scale) - log_q
    close(weights[number], expected, f"log weights of draw {number}")


def _normal(at: np.ndarray, counts: np.ndarray, loc: np.ndarray, tril: np.ndarray) -> float:
    """Return the log-density of a Normal, of some of its dimensions alone."""
    tril = np.linalg.cholesky((tril @ tril.T)[np.ix_(counts, counts)])
    noise = np.linalg.solve(tril, (at - loc)[counts])
    log_det = np.log(np.diagonal(tril)).sum()
    return -0.5 * noise @ noise - log_det - 0.5 * len(noise) * np.log(2 * np.pi)


def _no_worse(subject: Subject, weights: np.ndarray) -> None:
    """The ELBO of a row is not below that of the network, but for what widening costs."""
    network = subject.posterior.log_weights(subject.key, subject.case.data, NUM_DRAWS)
    gain = weights - network
    least = gain.mean(0) + WIDENED + TAILS * network.std(0) + 5 * gain.std(0) / NUM_DRAWS**0.5
    assert (least >= 0).all(), f"ELBOs of rows change by {gain.mean(0)}, at most by {least}"


def _alone(subject: Subject, posterior: Posterior, found: Found, *, alone: bool) -> None:
    """Rows have the same Normals whichever others there are; as many as all compile nothing."""
    chosen = np.array([4, 1] if alone else [5, 5, 3, 0, 0, 0])
    again = _found(subject, posterior, subject.rows(chosen))
    for name, some, of_all in zip(Found._fields, again, found, strict=True):
        close(some, of_all[chosen], f"{name} of rows {chosen}")


def _said(subject: Subject, posterior: Posterior, found: Found, counts: np.ndarray) -> None:
    """`encode` says the mean and the scale of the Normals, and scales of what is masked stay."""
    loc, scale = _joined(subject, posterior.encode(subject.case.data))
    close(loc, found.loc, "loc")
    close(scale, np.sqrt(np.square(found.tril).sum(-1)), "scale")
    if subject.is_encoded:
        _, of_network = _joined(subject, subject.encoded)
        close(scale[~counts], of_network[~counts], "scale of masked latents")


def _joined(subject: Subject, encoded: dict[str, Any]) -> list[np.ndarray]:
    """Return ``loc`` and ``scale`` of all sites side by side."""
    parts = zip(*(encoded[name] for name in _names(subject)), strict=True)
    return [np.concatenate([x.reshape(NUM_DATA, -1) for x in part], -1) for part in parts]
