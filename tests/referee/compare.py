"""What is compared of a case: a function each, which raises AssertionError where answers differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from generator import BATCH, NUM_DATA, Case
from jax import Array
from kinds import OBSERVED
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from program import DATA, Data
from reference import (
    auxiliary_values,
    by_row,
    density,
    is_latent,
    is_local,
    normal_log_q,
    rows_in_front,
    shared_scale,
    total,
)

from numpyro_vae import Posterior
from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import Trainer

KEY = jax.random.key(11)
NUM_SAMPLES = 2
ROWS = 4  # of which subsets of the data are


@contextmanager
def settings(case: Case) -> Generator[None]:
    """Let JAX and NumPyro run a case."""
    x64, valid = jax.enable_x64(case.is_x64), numpyro.validation_enabled(False)
    with x64, valid, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing a plate statement")
        yield


class Subject:
    """A case, its guide with random parameters, and what several comparisons need."""

    def __init__(self, case: Case):
        self.case, self.static = case, case.static_kwargs
        self.model, self.full = case.model(), case.model(subsamples=False)
        self.guide = case.guide(self.model)
        self.args, self.kwargs = _arguments(case.data)
        self.kwargs = {**self.kwargs, **self.static}
        self.svi = SVI(self.model, self.guide, optax.adam(1e-2), Trace_ELBO(), **self.static)
        self.params = self._random_params()
        self.posterior = self._posterior(self.static)

    def _random_params(self) -> dict[str, Any]:
        args, kwargs = _arguments(self.case.data)
        state = self.svi.init(jax.random.key(0), *args, **kwargs)
        rng = np.random.default_rng(self.case.seed)
        start = self.svi.optim.get_params(state.optim_state)
        moved = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), start)
        return self.svi.constrain_fn(moved)

    def _posterior(self, static: dict[str, Any]) -> Posterior:
        axes = self.case.batch_axes
        return Posterior(self.guide, self.params, static_kwargs=static, batch_axes=axes)

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        return self.posterior.sample(KEY, self.case.data, NUM_SAMPLES)

    def values(self, number: int) -> dict[str, Any]:
        """Return a draw of each latent site, and the parameters."""
        draw = {name: jnp.asarray(value[number]) for name, value in self.draws.items()}
        return {**self.params, **draw}

    @cached_property
    def log_p(self) -> list[tuple[dict[str, Array], dict]]:
        """The model's log-densities with all rows, and its traces, of each draw."""
        return [
            density(self.full, self.args, self.kwargs, self.values(number))
            for number in range(NUM_SAMPLES)
        ]

    @cached_property
    def full_guide(self) -> Any:
        if not self.case.subsampled:
            return self.guide.eval()
        guide = self.case.guide(self.full)
        guide.setup(*self.args, **self.kwargs)
        return guide.eval()

    @cached_property
    def log_q(self) -> list[tuple[dict[str, Array], dict]]:
        """The guide's log-densities with all rows, and its traces, of each draw."""
        return [
            self.guide_density(self.full_guide, self.args, self.kwargs, number)
            for number in range(NUM_SAMPLES)
        ]

    def guide_density(
        self, guide: Any, args: tuple, kwargs: dict, number: int, rows: Any = None
    ) -> tuple[dict[str, Array], dict]:
        values, model_trace = self.values(number), self.log_p[number][1]
        seeded = handlers.seed(handlers.substitute(guide, data=self.params), 0)
        trace = handlers.trace(seeded).get_trace(*args, **kwargs)
        joint = auxiliary_values(trace, model_trace, values) if rows is None else {}
        if joint:  # the sites are functions of them
            values = {k: v for k, v in values.items() if k not in self.local}
        return density(guide, args, kwargs, {**values, **joint})

    @cached_property
    def local(self) -> tuple[str, ...]:
        trace = self.log_p[0][1]
        return tuple(name for name, site in trace.items() if is_latent(site) and is_local(site))

    @property
    def is_factorized(self) -> bool:
        return self.guide.family.is_factorized

    @property
    def has_density(self) -> bool:
        return self.guide.family.has_density

    def rows(self, chosen: Any) -> Any:
        """Return the data of some rows."""

        def take(value: Any, axis: int | None) -> Any:
            return value if axis is None or value is None else np.take(value, chosen, axis)

        data, axes = self.case.data, self.case.batch_axes
        if axes == 0:
            return jax.tree.map(lambda value: take(value, 0), data)
        if isinstance(data, dict):
            return {name: take(value, axes[name]) for name, value in data.items()}
        return tuple(take(value, axis) for value, axis in zip(data, axes, strict=True))


def _arguments(data: Any) -> tuple[tuple, dict[str, Any]]:
    return ((), dict(data)) if isinstance(data, dict) else (data, {})


def close(found: Any, expected: Any, what: str, scale: float = 1.0) -> None:
    """Compare sums of log-densities, or values.

    With 32 bits, the inverse of a map to a support is far from exact near the support's bounds.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    is_x64 = bool(jax.config.jax_enable_x64)  # ty: ignore
    rtol, atol = (1e-5, 1e-4 * scale) if is_x64 else (2e-3, 2e-2 * scale)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=what)


# -- the objective ------------------------------------------------------------------------------


def _traces(subject: Subject, key: Array) -> tuple[dict, dict]:
    """Trace guide and model as an objective does with a key."""
    model_key, guide_key = jax.random.split(key)
    guide = handlers.substitute(handlers.seed(subject.guide, guide_key), data=subject.params)
    guide_trace = handlers.trace(guide).get_trace(*subject.args, **subject.kwargs)
    model = handlers.substitute(handlers.seed(subject.model, model_key), data=subject.params)
    model = handlers.replay(model, guide_trace)
    return guide_trace, handlers.trace(model).get_trace(*subject.args, **subject.kwargs)


def sites(subject: Subject) -> None:
    """The guide has the model's latent sites, of the same shapes, plates, scales and masks."""
    guide_trace, model_trace = _traces(subject, KEY)
    latent = {name: site for name, site in model_trace.items() if is_latent(site)}
    ours = {
        name: site
        for name, site in guide_trace.items()
        if is_latent(site) and not site["infer"].get("is_auxiliary")
    }
    assert set(ours) == set(latent), f"guide has {sorted(ours)}, the model {sorted(latent)}"
    for name, site in latent.items():
        shape, expected = ours[name]["fn"].shape(), site["fn"].shape()
        assert shape == expected, f"{name}: guide {shape}, model {expected}"
        if is_local(site):
            one = {_scale(site), _scale(ours[name])}
            assert len(one) == 1, f"{name}: scales of model and guide {one}"


def _scale(site: dict) -> Any:
    scale = site["scale"]
    return 1.0 if scale is None else tuple(np.ravel(np.asarray(scale, np.float32)).round(5))


def elbo(subject: Subject) -> None:
    """The loss is the guide's log-density less the model's, at the values that the key gives."""
    guide_trace, _ = _traces(subject, KEY)
    values = {
        name: site["value"]
        for name, site in guide_trace.items()
        if site["type"] == "plate" or is_latent(site)
    }
    values = {**subject.params, **values}
    args, kwargs = subject.args, subject.kwargs
    log_p, _ = density(subject.model, args, kwargs, values)
    log_q, _ = density(subject.guide, args, kwargs, values)
    loss = Trace_ELBO().loss(KEY, subject.params, subject.model, subject.guide, *args, **kwargs)
    close(loss, total(log_q) - total(log_p), "loss")


# -- weights ------------------------------------------------------------------------------------


def weights(subject: Subject) -> None:
    """The weights of a row are the sums of its terms of NumPyro's log-densities.

    They are divided by the factor that the model scales all latents of the row with.
    """
    scale = shared_scale(subject.log_p[0][1], NUM_DATA)
    if not subject.has_density or scale is None:
        return
    found = subject.posterior.log_weights(KEY, subject.case.data, NUM_SAMPLES)
    for number in range(NUM_SAMPLES):
        expected = _rows_of(subject.log_p[number]) - _rows_of(subject.log_q[number])
        close(found[number], expected / scale, f"log weights of draw {number}")


def _rows_of(densities: tuple[dict[str, Array], dict]) -> np.ndarray:
    log_probs, trace = densities
    local = [name for name in log_probs if is_local(trace[name])]
    return np.sum([by_row(log_probs[name], trace[name], NUM_DATA) for name in local], axis=0)


def jacobians(subject: Subject) -> None:
    """A Normal guide's log-density is that of its loc and scale, with volumes by autodiff."""
    options = subject.guide
    if not (subject.is_factorized and subject.has_density):
        return
    if options.dependencies or options.condition_on:
        return
    encoded = subject.posterior.encode(subject.case.data)
    for number in range(NUM_SAMPLES):
        _, trace = subject.log_p[number]
        expected = normal_log_q(encoded, trace, subject.values(number))
        log_probs, guide_trace = subject.log_q[number]
        for name, value in expected.items():
            found = by_row(log_probs[name], guide_trace[name], NUM_DATA)
            close(found, value, f"log q of {name}")


def supports(subject: Subject) -> None:
    """Draws lie in their supports, and have the shapes of their sites."""
    for number in range(NUM_SAMPLES):
        for name, site in subject.log_p[number][1].items():
            if is_latent(site):
                value = subject.draws[name][number]
                assert value.shape == site["fn"].shape(), f"{name}: shape {value.shape}"
                inside = site["fn"].support.check(jnp.asarray(value))
                assert np.asarray(inside).all(), f"{name} is out of its support"


# -- minibatches -----------------------------------------------------------------------------------


def minibatches(subject: Subject) -> None:
    """The ELBOs of the batches of a partition, as the trainer has them, average to that of all."""
    case = subject.case
    trainer = Trainer(subject.svi)
    source = ArraySource(trainer, ArrayData.read(case.data, case.batch_axes), BATCH, DATA)
    found = []
    for held in _partition(subject):
        batch = source.first().at(held[DATA])
        svi = trainer._bind(batch, {}, evaluate=True)
        args, kwargs = batch.arguments()
        inner = {name: rows for name, rows in held.items() if name != DATA}
        found.append(_elbo_of_rows(subject, svi.model, svi.guide, args, kwargs, held, inner))
    close(np.mean(found), _elbo_of_all(subject), "mean ELBO of minibatches")


def subsamples(subject: Subject) -> None:
    """The ELBOs of a model that subsamples average to that of all rows, by NumPyro alone."""
    if not subject.case.subsampled:
        return
    model, guide = subject.model, subject.guide.eval()
    found = [
        _elbo_of_rows(subject, model, guide, subject.args, subject.kwargs, held, held)
        for held in _partition(subject)
    ]
    close(np.mean(found), _elbo_of_all(subject), "mean ELBO of subsamples")


def _partition(subject: Subject) -> list[dict[str, Array]]:
    """Return by plate the rows of each batch; those of plates that do not subsample are left out."""
    parts = {DATA: jax.random.permutation(KEY, NUM_DATA).reshape(-1, BATCH)}
    for name, spec in subject.case.subsampled.items():
        if name != DATA:
            parts[name] = jnp.arange(spec.size).reshape(-1, spec.subsample)
    return [dict(zip(parts, rows, strict=True)) for rows in product(*parts.values())]


def _elbo_of_all(subject: Subject) -> float:
    return total(subject.log_p[0][0]) - _log_q(subject, *subject.log_q[0])


def _log_q(subject: Subject, log_probs: dict[str, Array], trace: dict) -> float:
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
) -> float:
    """Return the ELBO at the first draw, of the rows that plates hold."""
    kwargs = {**kwargs, **subject.static}
    values = {**_cut(subject, held), **given}
    log_p, trace = density(model, args, kwargs, values)
    seeded = handlers.seed(handlers.substitute(guide, data={**subject.params, **given}), 0)
    guide_trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    joint = auxiliary_values(guide_trace, trace, values)
    if joint:
        values = {k: v for k, v in values.items() if k not in subject.local}
    return total(log_p) - _log_q(subject, *density(guide, args, kwargs, {**values, **joint}))


def _cut(subject: Subject, held: dict[str, Array]) -> dict[str, Any]:
    """Return the parameters, and the rows of the first draw that plates hold."""
    trace, found = subject.log_p[0][1], subject.values(0)
    for name in subject.draws:
        for frame in trace[name]["cond_indep_stack"]:
            if frame.name in held:
                axis = frame.dim - trace[name]["fn"].event_dim
                found[name] = jnp.take(found[name], held[frame.name], axis=axis)
    return found


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
    tree = posterior.to_datatree(KEY, data, NUM_SAMPLES, groups=groups, var_names=subject.local)
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


# -- deterministic sites and predictions ------------------------------------------------------------


def deterministic(subject: Subject) -> None:
    """Deterministic sites are those of NumPyro's `Predictive`, given the draws and the data."""
    trace = subject.log_p[0][1]
    names = [name for name, site in trace.items() if site["type"] == "deterministic"]
    if not names:
        return
    draws = subject.guide.sample_posterior(
        KEY, subject.params, *subject.args, sample_shape=(NUM_SAMPLES,), **subject.kwargs
    )
    _same_deterministic(subject, names, draws, draws, "sample_posterior")
    tree = subject.posterior.to_datatree(KEY, subject.case.data, NUM_SAMPLES)["posterior"]
    found = {}
    for name in names:
        assert name in tree, f"{name} is not in the DataTree"
        found[name] = tree[name].values[0]
        if is_local(trace[name]) and np.ndim(trace[name]["value"]):  # rows come first there
            dim = _dim(trace[name]) - _event_dim(trace[name])
            found[name] = np.moveaxis(found[name], 1, dim)
    _same_deterministic(subject, names, subject.draws, found, "DataTree")


def _same_deterministic(
    subject: Subject, names: list[str], draws: dict, found: dict, what: str
) -> None:
    latent = {name: jnp.asarray(draws[name]) for name in subject.draws}
    predictive = Predictive(subject.full, latent, params=subject.params, return_sites=names)
    expected = predictive(jax.random.key(0), *subject.args, **subject.kwargs)
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
    posterior = subject._posterior({**subject.static, "noise": 1e-4})
    found = posterior.predict(KEY, subject.case.data, NUM_SAMPLES)
    model = handlers.uncondition(subject.full)
    latent = {name: jnp.asarray(value) for name, value in subject.draws.items()}
    predictive = Predictive(model, latent, params=subject.params)
    expected = predictive(KEY, *subject.args, **{**subject.kwargs, "noise": 1e-4})
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


COMPARISONS: dict[str, Callable[[Subject], None]] = {
    "sites": sites,
    "elbo": elbo,
    "supports": supports,
    "weights": weights,
    "jacobians": jacobians,
    "minibatches": minibatches,
    "subsamples": subsamples,
    "rows": rows,
    "deterministic": deterministic,
    "predictions": predictions,
}
