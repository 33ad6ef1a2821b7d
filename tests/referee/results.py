"""What is compared of results: a function each, which raises AssertionError if answers differ."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from kinds import OBSERVED
from numpyro import handlers
from numpyro.infer import Predictive
from program import DATA, NUM_DATA, Data
from reference import is_local, rows_in_front
from subject import NUM_SAMPLES, Subject, close

ROWS = 4  # of which subsets of the data are

# -- rows ------------------------------------------------------------------------------------------


def rows(subject: Subject) -> None:
    """What is said of a row depends on no other row, and not on the batches."""
    data = subject.case.data
    whole, trace = _by_row(subject, data), subject.log_p[0][1]
    for name in subject.local:
        value = rows_in_front(subject.draws[name], trace[name], trace[name]["fn"].event_dim)
        close(whole[f"{name} of posterior"], value, f"{name} in the DataTree")
    others = np.array([*range(ROWS), *range(NUM_DATA - 1, ROWS - 1, -1)])
    _same_rows(_by_row(subject, subject.rows(others)), whole, "other rows permuted")
    _same_rows(_by_row(subject, subject.rows(np.arange(ROWS))), whole, "other rows left out")
    with mock.patch("numpyro_vae.inference.runner.ROWS", ROWS):
        _same_rows(_by_row(subject, data), whole, "in small batches", NUM_DATA)


def _by_row(subject: Subject, data: Any) -> dict[str, np.ndarray]:
    """Return by name arrays with the rows in front."""
    posterior, groups = subject.posterior, ("posterior", "sample_stats")
    tree = posterior.to_datatree(
        subject.key, data, NUM_SAMPLES, groups=groups, var_names=subject.local
    )
    found = {
        f"{name} of {group}": np.moveaxis(value.values[0], 1, 0)
        for group in groups
        if group in tree
        for name, value in tree[group].data_vars.items()
    }
    if subject.is_factorized and not subject.guide.dependencies:
        for name, parts in posterior.encode(data).items():
            found |= {f"{part} of {name}": x for part, x in parts._asdict().items()}
    return found


def _same_rows(found: dict, expected: dict, what: str, number: int = ROWS) -> None:
    for name, value in expected.items():
        close(found[name][:number], value[:number], f"{name}, {what}")


# -- deterministic sites and predictions ---------------------------------------------------------


def deterministic(subject: Subject) -> None:
    """Deterministic sites are those of NumPyro's `Predictive`, given the draws and the data."""
    trace = subject.log_p[0][1]
    names = [name for name, site in trace.items() if site["type"] == "deterministic"]
    if not names:
        return
    if not subject.case.is_enumerated:
        _of_the_guide(subject, names)
    tree = subject.posterior.to_datatree(
        subject.key, subject.case.data, NUM_SAMPLES, groups=("posterior",)
    )["posterior"]
    found = {}
    for name in names:
        assert name in tree, f"{name} is not in the DataTree"
        found[name] = tree[name].values[0]
        if is_local(trace[name]) and np.ndim(trace[name]["value"]):  # rows come first there
            dim = _dim(trace[name]) - _event_dim(trace[name])
            found[name] = np.moveaxis(found[name], 1, dim)
    _same_deterministic(subject, names, subject.draws, found, "DataTree")


def _of_the_guide(subject: Subject, names: list[str]) -> None:
    def sample(key: Array, params: dict[str, Any]) -> dict[str, Array]:
        shape, guide = (NUM_SAMPLES,), subject.guide
        return guide.sample_posterior(
            key, params, *subject.args, sample_shape=shape, **subject.kwargs
        )

    draws = jax.jit(sample)(subject.key, subject.params)
    _same_deterministic(subject, names, draws, draws, "sample_posterior")


def _same_deterministic(
    subject: Subject, names: list[str], draws: dict, found: dict, what: str
) -> None:
    latent = {name: jnp.asarray(draws[name]) for name in subject.draws}
    predictive = Predictive(subject.full, latent, params=subject.params, return_sites=names)
    predict = partial(predictive, **subject.kwargs)
    expected = jax.jit(lambda key: predict(key, *subject.args))(jax.random.key(0))
    for name in names:
        close(found[name], expected[name], f"{name} in {what}")


def _dim(site: dict) -> int:
    return next(frame.dim for frame in site["cond_indep_stack"] if frame.name == DATA)


def _event_dim(site: dict) -> int:
    """Return how many axes of a deterministic site are of no plate."""
    depth = max(-frame.dim for frame in site["cond_indep_stack"])
    return max(np.ndim(site["value"]) - depth, 0)


def predictions(subject: Subject) -> None:
    """Predictions are in their supports and of the right shapes; without noise they are known."""
    posterior = subject._posterior({**subject.static, "noise": 1e-5})
    found = posterior.predict(subject.key, subject.case.data, NUM_SAMPLES)
    model = handlers.uncondition(subject.full)
    draws = subject.draws
    if subject.case.is_enumerated:  # discrete latents depend on the noise
        draws = posterior.sample(subject.key, subject.case.data, NUM_SAMPLES)
    latent = {name: jnp.asarray(value) for name, value in draws.items()}
    predictive = Predictive(model, latent, params=subject.params)
    predict = partial(predictive, **{**subject.kwargs, "noise": 1e-5})
    expected = jax.jit(lambda key: predict(key, *subject.args))(subject.key)
    trace = subject.log_p[0][1]
    for step in subject.case.program.steps:
        if isinstance(step, Data) and DATA in step.plates:
            name = f"{step.name}_observed" if step.obs_mask else step.name
            site, kind = trace[name], OBSERVED[step.kind]
            assert name in found, f"{name} is not predicted"
            rows = rows_in_front(expected[name], site, site["fn"].event_dim)
            rows = np.moveaxis(np.asarray(rows), 0, 1)
            if kind.event is not None:  # NumPyro draws one value for all that it broadcasts it to
                rows = np.broadcast_to(rows, rows.shape[: -len(kind.event)] + kind.event)
            assert found[name].shape == rows.shape, f"{name}: {found[name].shape}, {rows.shape}"
            if kind.is_noisy:
                close(found[name], rows, f"prediction of {name}", 3.0)
            inside = site["fn"].support.check(jnp.asarray(found[name]))
            assert np.asarray(inside).all(), f"prediction of {name} is out of its support"
