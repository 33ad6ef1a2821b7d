"""What is compared of densities: a function each, which raises AssertionError if answers differ."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from program import BATCH, DATA, NUM_DATA
from reference import (
    by_row,
    density,
    is_enumerated,
    is_latent,
    is_local,
    scale_of_enumerated,
    shared_scale,
    total,
)
from subject import NUM_SAMPLES, Subject, close

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.batch import Batch
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import Trainer

# -- the objective ------------------------------------------------------------------------------


def sites(subject: Subject) -> None:
    """The guide has the model's latent sites, of the same shapes, plates, scales and masks."""
    guide_trace, model_trace, *_ = subject.objective
    latent = {name: site for name, site in model_trace.items() if is_latent(site)}
    latent = {name: site for name, site in latent.items() if not is_enumerated(site)}
    ours = {
        name: site
        for name, site in guide_trace.items()
        if is_latent(site) and not site["infer"].get("is_auxiliary")
    }
    assert set(ours) == set(latent), f"guide has {sorted(ours)}, the model {sorted(latent)}"
    for name, site in latent.items():
        shape, expected = ours[name]["fn"].shape(), site["fn"].shape()
        assert shape == expected, f"{name}: guide {shape}, model {expected}"
        one = {_scale(site), _scale(ours[name])}
        assert len(one) == 1, f"{name}: scales of model and guide {one}"


def _scale(site: dict) -> Any:
    scale = site["scale"]
    return 1.0 if scale is None else tuple(np.ravel(np.asarray(scale, np.float32)).round(5))


def elbo(subject: Subject) -> None:
    """The loss is the guide's log-density less the model's, at the values that the key gives."""
    if subject.objective.loss is not None:
        close(subject.objective.loss, subject.objective.expected, "loss")


# -- weights ------------------------------------------------------------------------------------


def weights(subject: Subject) -> None:
    """The weights of a row are the sums of its terms of NumPyro's log-densities.

    They are divided by the factor that the model scales all latents of the row with.
    """
    scale = shared_scale(subject.trace, NUM_DATA)
    if not subject.has_density or scale is None:
        return
    found = _log_weights(subject)
    for number in range(NUM_SAMPLES):
        log_p = summed(subject, subject.values(number), scale)
        scored = subject.scored[number]
        log_q = rows_of(scored.log_q, scored.guide_trace) / scale
        expected = log_p - log_q
        # Of a value that has rounded to its bound NumPyro, which inverts the map, knows nothing.
        known = ~np.isnan(expected)
        close(found[number][known], expected[known], f"log weights of draw {number}")


def _log_weights(subject: Subject) -> np.ndarray:
    if subject.case.one_of("weights", ("alone", "tree")) == "tree":
        return subject.tree["sample_stats"]["log_weights"].values[0]
    return subject.posterior.log_weights(subject.key, subject.case.data, NUM_SAMPLES)


def summed(subject: Subject, values: dict[str, Any], scale: np.ndarray) -> np.ndarray:
    """Return a row's log-density over the scale, summed over the values of discrete latents.

    Where the model scales what is summed over, the sum has the factor, as in TraceEnum_ELBO.
    """
    power = scale_of_enumerated(subject.trace, NUM_DATA)
    discrete = [name for name in subject.local if is_enumerated(subject.trace[name])]
    found = []
    for combination in product(range(2), repeat=len(discrete)):
        chosen = zip(discrete, combination, strict=True)
        given = {name: jnp.full_like(values[name], value) for name, value in chosen}
        scored = subject.score({**values, **given}, subject.encoded)
        found.append(rows_of(scored.log_p, scored.trace) / power)
    return np.logaddexp.reduce(found) * power / scale


def rows_of(log_probs: dict[str, Array], trace: dict) -> np.ndarray:
    """Add up what the sites of the local plate have of each row."""
    local = [name for name in log_probs if is_local(trace[name])]
    return np.sum([by_row(log_probs[name], trace[name], NUM_DATA) for name in local], axis=0)


def jacobians(subject: Subject) -> None:
    """A Normal guide's log-density is that of its loc and scale, with volumes by autodiff."""
    for scored in subject.scored:
        for name, terms in scored.normal.items():
            found = by_row(scored.log_q[name], scored.guide_trace[name], NUM_DATA)
            expected = by_row(terms, scored.trace[name], NUM_DATA)
            close(found, expected, f"log q of {name}")


def supports(subject: Subject) -> None:
    """Draws lie in their supports, and have the shapes of their sites."""
    for number, scored in enumerate(subject.scored):
        for name, site in scored.trace.items():
            if is_latent(site):
                value = subject.draws[name][number]
                assert value.shape == site["fn"].shape(), f"{name}: shape {value.shape}"
                assert np.asarray(scored.inside[name]).all(), f"{name} is out of its support"


# -- minibatches -----------------------------------------------------------------------------------


def minibatches(subject: Subject) -> None:
    """The ELBOs of the batches of a partition, as the trainer has them, average to that of all.

    With values of the discrete latents, if there are any.
    """
    case = subject.case
    trainer = Trainer(subject.svi)
    source = ArraySource(trainer, ArrayData.read(case.data, case.batch_axes), BATCH, DATA)

    def elbo_of(batch: Batch, held: dict[str, Array]) -> Array:
        svi = trainer._bind(batch, {}, evaluate=True)
        args, kwargs = batch.arguments()
        inner = {name: rows for name, rows in held.items() if name != DATA}
        return _elbo_of_rows(subject, svi.model, svi.guide, args, kwargs, held, inner)

    compiled = jax.jit(elbo_of)
    found = [compiled(source.first().at(held[DATA]), held) for held in _partition(subject)]
    close(np.mean(found), _elbo_of_all(subject), "mean ELBO of minibatches")


def subsamples(subject: Subject) -> None:
    """The ELBOs of a model that subsamples average to that of all rows, by NumPyro alone."""
    if not subject.case.subsampled:
        return
    model, guide = subject.model, subject.guide.eval()
    of_rows = partial(_elbo_of_rows, subject, model, guide, subject.args, subject.kwargs)
    compiled = jax.jit(lambda held: of_rows(held, held))
    found = [compiled(held) for held in _partition(subject)]
    close(np.mean(found), _elbo_of_all(subject), "mean ELBO of subsamples")


def _partition(subject: Subject) -> list[dict[str, Array]]:
    """Return by plate the rows of each batch; those of other plates are left out."""
    parts = {DATA: jax.random.permutation(subject.key, NUM_DATA).reshape(-1, BATCH)}
    for name, spec in subject.case.subsampled.items():
        if name != DATA:
            parts[name] = jnp.arange(spec.size).reshape(-1, spec.subsample)
    return [dict(zip(parts, rows, strict=True)) for rows in product(*parts.values())]


def _elbo_of_all(subject: Subject) -> Array:
    first = subject.scored[0]
    return total(first.log_p) - _log_q(subject, first.log_q, first.guide_trace)


def _log_q(subject: Subject, log_probs: dict[str, Array], trace: dict) -> Array:
    """Add up a guide's log-densities; a point's is one of none, and depends on rounding."""
    if not subject.has_density:
        log_probs = {name: x for name, x in log_probs.items() if not is_local(trace[name])}
    return total(log_probs)


def _elbo_of_rows(
    subject: Subject,
    model: Any,
    guide: Any,
    args: tuple,
    kwargs: dict,
    held: dict[str, Array],
    given: dict[str, Array],
) -> Array:
    """Return the ELBO at the first draw, of the rows that plates hold."""
    kwargs = {**kwargs, **subject.static}
    values = {**_cut(subject, held), **given}
    log_p, trace = density(model, args, kwargs, values)
    given = {**subject.params, **given}
    log_q = subject.guide_density(guide, args, kwargs, values, trace, given)
    return total(log_p) - _log_q(subject, *log_q)


def _cut(subject: Subject, held: dict[str, Array]) -> dict[str, Any]:
    """Return the parameters, and the rows of the first draw that plates hold."""
    trace, found = subject.trace, subject.values(0)
    for name in subject.draws:
        for frame in trace[name]["cond_indep_stack"]:
            if frame.name in held:
                axis = frame.dim - trace[name]["fn"].event_dim
                found[name] = jnp.take(found[name], held[frame.name], axis=axis)
    return found
