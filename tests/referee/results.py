"""What is compared of results: a function each, which raises AssertionError if answers differ."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from kinds import OBSERVED, Observed
from program import DATA, NUM_DATA, Data
from reference import is_local, rows_in_front
from subject import NUM_SAMPLES, Subject, close
from trees import variable_of

ROWS = 4  # of which subsets of the data are
GROUPS = ("posterior", "sample_stats")

# -- rows ------------------------------------------------------------------------------------------


def rows(subject: Subject) -> None:
    """What is said of a row depends on no other row, and not on the batches."""
    data, trace = subject.case.data, subject.trace
    whole = _by_row(subject, subject.tree, subject.encoded)
    for name in subject.local:
        value = rows_in_front(subject.draws[name], trace[name], trace[name]["fn"].event_dim)
        close(whole[f"{variable_of(name)} of posterior"], value, f"{name} in the DataTree")
    what = subject.case.one_of("rows", ("permuted", "left out", "in batches"))
    if what == "in batches":
        with mock.patch("numpyro_vae.inference.runner.ROWS", ROWS):
            return _same_rows(_of(subject, data), whole, "in small batches", NUM_DATA)
    others = [] if what == "left out" else range(NUM_DATA - 1, ROWS - 1, -1)
    chosen = np.array([*range(ROWS), *others])
    return _same_rows(_of(subject, subject.rows(chosen)), whole, f"other rows {what}")


def _of(subject: Subject, data: Any) -> dict[str, np.ndarray]:
    posterior = subject.posterior
    tree = posterior.to_datatree(
        subject.key, data, NUM_SAMPLES, groups=GROUPS, var_names=subject.local
    )
    return _by_row(subject, tree, posterior.encode(data) if subject.is_encoded else {})


def _by_row(subject: Subject, tree: xr.DataTree, encoded: dict) -> dict[str, np.ndarray]:
    """Return by name arrays with the rows in front."""
    local = [variable_of(name) for name in subject.local]
    found = {
        f"{name} of {group}": np.moveaxis(value.values[0], 1, 0)
        for group in GROUPS
        if group in tree
        for name, value in tree[group].data_vars.items()
        if group == "sample_stats" or name in local
    }
    for name, parts in encoded.items():
        found |= {f"{part} of {name}": x for part, x in parts._asdict().items()}
    return found


def _same_rows(found: dict, expected: dict, what: str, number: int = ROWS) -> None:
    for name, value in expected.items():
        close(found[name][:number], value[:number], f"{name}, {what}")


# -- deterministic sites and predictions ---------------------------------------------------------


def deterministic(subject: Subject) -> None:
    """Deterministic sites are those of NumPyro's model, given the draws and the data."""
    trace = subject.trace
    names = [name for name, site in trace.items() if site["type"] == "deterministic"]
    if not names:
        return
    if not subject.case.is_enumerated:
        _of_the_guide(subject, names)
    tree = subject.tree["posterior"]
    for name in names:
        assert name in tree, f"{name} is not in the DataTree"
        found, value = tree[name].values[0], trace[name]["value"]
        if is_local(trace[name]) and np.ndim(value):  # rows come first there
            found = np.moveaxis(found, 1, 1 + np.shape(value).index(NUM_DATA))
        expected = [scored.trace[name]["value"] for scored in subject.scored]
        close(found, np.stack(expected), f"{name} in DataTree")


def _of_the_guide(subject: Subject, names: list[str]) -> None:
    def sample(key: Array, params: dict[str, Any]) -> dict[str, Array]:
        shape, guide = (NUM_SAMPLES,), subject.guide
        return guide.sample_posterior(
            key, params, *subject.args, sample_shape=shape, **subject.kwargs
        )

    draws = jax.jit(sample)(subject.key, subject.params)
    for number in range(NUM_SAMPLES):
        values = {name: draws[name][number] for name in subject.draws}
        trace = subject.score({**subject.params, **values}, subject.encoded).trace
        for name in names:
            close(draws[name][number], trace[name]["value"], f"{name} in sample_posterior")


def predictions(subject: Subject) -> None:
    """Predictions are in their supports and of the right shapes; without noise they are known."""
    found, traces = _without_noise(subject)
    for step in subject.case.program.steps:
        if isinstance(step, Data) and DATA in step.plates:
            name = f"{step.name}_observed" if step.obs_mask else step.name
            kind = OBSERVED[step.kind]
            assert name in found, f"{name} is not predicted"
            rows = np.stack([_mean(trace[name], kind) for trace in traces])
            assert found[name].shape == rows.shape, f"{name}: {found[name].shape}, {rows.shape}"
            if kind.is_noisy:
                close(found[name], rows, f"prediction of {name}", 3.0)
            inside = traces[0][name]["fn"].support.check(jnp.asarray(found[name]))
            assert np.asarray(inside).all(), f"prediction of {name} is out of its support"


def _without_noise(subject: Subject) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Return predictions, and the model's traces for the draws that they are made of."""
    case, key, noise = subject.case, subject.key, 1e-5
    traces = [scored.trace for scored in subject.scored]
    if case.has_noise and not case.is_enumerated:  # as an argument: it is compiled already
        group = subject.tree_of(case.with_argument("noise", noise))["posterior_predictive"]
        return {str(name): value.values[0] for name, value in group.data_vars.items()}, traces
    static = {**subject.static, "noise": noise}
    data = case.with_argument("noise", noise) if case.has_noise else case.data
    posterior = subject.posterior if case.has_noise else subject.posterior_of(static)
    if case.is_enumerated:  # discrete latents depend on the noise
        draws = posterior.sample(key, data, NUM_SAMPLES)
        values = [{name: x[number] for name, x in draws.items()} for number in range(NUM_SAMPLES)]
        given = ({**subject.params, **draw} for draw in values)
        traces = [subject.score(draw, subject.encoded).trace for draw in given]
    return posterior.predict(key, data, NUM_SAMPLES), traces


def _mean(site: dict, kind: Observed) -> np.ndarray:
    """Return what a site is without noise, rows in front; of other sites the shape counts."""
    fn = site["fn"]
    mean = fn.mean if kind.is_noisy else np.zeros(fn.shape())
    rows = np.asarray(rows_in_front(np.broadcast_to(mean, fn.shape()), site, fn.event_dim))
    if kind.event is None:
        return rows
    # NumPyro draws one value for all that it broadcasts it to
    return np.broadcast_to(rows, rows.shape[: -len(kind.event)] + kind.event)
