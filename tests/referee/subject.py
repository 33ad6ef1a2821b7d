"""A case with a guide and parameters, and what several comparisons need of it."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import xarray as xr
from case import Case
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from reference import (
    as_one,
    auxiliary_values,
    density,
    is_latent,
    is_local,
    normal_log_q,
    total,
)

from numpyro_vae import Posterior

NUM_SAMPLES = 2
OBJECTIVE = (optax.adam(1e-2), Trace_ELBO())


@contextmanager
def settings(case: Case) -> Generator[None]:
    """Let JAX and NumPyro run a case."""
    x64, valid = jax.enable_x64(case.is_x64), numpyro.validation_enabled(False)
    with x64, valid, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing a plate statement")
        warnings.filterwarnings("ignore", message="Currently, SVI with Trace_ELBO loss does not")
        yield


class Objective(NamedTuple):
    """A run of guide and model, the loss, and the difference of NumPyro's log-densities."""

    guide_trace: dict
    model_trace: dict
    loss: Array | None
    expected: Array


class Scored(NamedTuple):
    """What NumPyro says of a draw of all rows.

    Attributes:
        log_p: the model's log-densities by site.
        trace: the model's.
        log_q: the guide's log-densities by site.
        guide_trace: the guide's.
        normal: by local site the log-density of a Normal of ``loc`` and ``scale``, if it is one.
        inside: by latent site, which values lie in its support.
    """

    log_p: dict[str, Array]
    trace: dict
    log_q: dict[str, Array]
    guide_trace: dict
    normal: dict[str, Array]
    inside: dict[str, Array]


class Subject:
    """A case, its guide with random parameters, and what several comparisons need."""

    def __init__(self, case: Case):
        self.case, self.static, self.key = case, case.static_kwargs, jax.random.key(11)
        self.model, self.full = case.model(), case.model(subsamples=False)
        self.guide = case.guide(self.model)
        self.args, self.kwargs = _arguments(case.data)
        self.kwargs = {**self.kwargs, **self.static}
        self.svi = SVI(self.model, self.guide, *OBJECTIVE, **self.static)
        self.params = self._random_params()
        self.guide.setup(*self.args, **self.kwargs)
        self.guide.set_up_globals(self.params, self.args, self.kwargs, {})
        self.posterior = self.posterior_of(self.static)
        self.score = as_one(self._score)

    def _random_params(self) -> dict[str, Any]:
        """Return random values for the parameters of a guide like this."""
        args, kwargs = _arguments(self.case.data)
        svi = SVI(self.model, self.case.guide(self.model), *OBJECTIVE, **self.static)
        state = jax.eval_shape(lambda key: svi.init(key, *args, **kwargs), self.key)
        rng = np.random.default_rng(self.case.seed)
        shapes = svi.optim.get_params(state.optim_state)
        return svi.constrain_fn(
            jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes)
        )

    def posterior_of(self, static: dict[str, Any], **options: Any) -> Posterior:
        axes = self.case.batch_axes
        options |= {"static_kwargs": static, "batch_axes": axes}
        return Posterior(self.guide, self.params, **options)

    # -- the library's answers -----------------------------------------------------------------

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        return self.posterior.sample(self.key, self.case.data, NUM_SAMPLES)

    @cached_property
    def tree(self) -> xr.DataTree:
        return self.tree_of(self.case.data)

    def tree_of(self, data: Any) -> xr.DataTree:
        return self.posterior.to_datatree(self.key, data, NUM_SAMPLES, num_particles=2)

    @property
    def is_encoded(self) -> bool:
        """Whether the guide says of a row what reads no other site."""
        return self.is_factorized and not self.guide.dependencies

    @cached_property
    def encoded(self) -> dict[str, Any]:
        return self.posterior.encode(self.case.data) if self.is_encoded else {}

    @property
    def is_factorized(self) -> bool:
        return self.guide.family.is_factorized

    @property
    def has_density(self) -> bool:
        return self.guide.family.has_density

    # -- NumPyro's answers ---------------------------------------------------------------------

    @cached_property
    def objective(self) -> Objective:
        return as_one(self._objective)(self.key)

    def _objective(self, key: Array) -> Objective:
        _, guide_key = jax.random.split(key)  # as `Trace_ELBO` does
        args, kwargs = self.args, self.kwargs
        guide = handlers.substitute(handlers.seed(self.guide, guide_key), data=self.params)
        guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
        values = {
            name: site["value"]
            for name, site in guide_trace.items()
            if site["type"] == "plate" or is_latent(site)
        }
        values = {**self.params, **values}
        log_p, model_trace = density(self.model, args, kwargs, values)
        log_q, _ = density(self.guide, args, kwargs, values)
        loss, expected = None, total(log_q) - total(log_p)
        if not self.case.is_enumerated:
            given = (self.params, self.model, self.guide)
            loss = Trace_ELBO().loss(key, *given, *args, **kwargs)
        return Objective(guide_trace, model_trace, loss, expected)

    def values(self, number: int) -> dict[str, Any]:
        """Return a draw of each latent site, and the parameters."""
        draw = {name: jnp.asarray(value[number]) for name, value in self.draws.items()}
        return {**self.params, **draw}

    def _score(self, values: dict[str, Any], encoded: dict[str, Any]) -> Scored:
        log_p, trace = density(self.full, self.args, self.kwargs, values)
        guide, given = (self.full_guide, self.args, self.kwargs), self.params
        log_q, guide_trace = self.guide_density(*guide, values, trace, given)
        is_normal = encoded and self.has_density and not self.guide.condition_on
        inside = {
            name: site["fn"].support.check(values[name])
            for name, site in trace.items()
            if is_latent(site) and name in values
        }
        normal = normal_log_q(encoded, trace, values) if is_normal else {}
        return Scored(log_p, trace, log_q, guide_trace, normal, inside)

    @cached_property
    def scored(self) -> list[Scored]:
        """What NumPyro says of each draw."""
        _ = self.full_guide  # which is made outside of compiled code
        return [self.score(self.values(number), self.encoded) for number in range(NUM_SAMPLES)]

    @property
    def trace(self) -> dict:
        """The model's trace with all rows, of the first draw."""
        return self.scored[0].trace

    @cached_property
    def full_guide(self) -> Any:
        if not self.case.subsampled:
            return self.guide.eval()
        guide = self.case.guide(self.full)
        guide.setup(*self.args, **self.kwargs)
        return guide.eval()

    def guide_density(
        self, guide: Any, args: tuple, kwargs: dict, values: dict, model_trace: dict, given: dict
    ) -> tuple[dict[str, Array], dict]:
        """Return the log-densities of a guide that is run with what is given, and its trace."""
        seeded = handlers.seed(handlers.substitute(guide, data=given), 0)
        trace = handlers.trace(seeded).get_trace(*args, **kwargs)
        joint = auxiliary_values(trace, model_trace, values)
        if joint:  # the sites are functions of them
            served = [name for name, site in model_trace.items() if is_latent(site)]
            served = [name for name in served if is_local(model_trace[name])]
            values = {name: x for name, x in values.items() if name not in served}
        return density(guide, args, kwargs, {**values, **joint})

    @cached_property
    def local(self) -> tuple[str, ...]:
        sites = self.trace.items()
        return tuple(name for name, site in sites if is_latent(site) and is_local(site))

    # -- data ----------------------------------------------------------------------------------

    def rows(self, chosen: Any) -> Any:
        """Return the data of some rows."""
        return _take(self.case.data, self.case.batch_axes, chosen)


def _take(value: Any, axes: Any, chosen: Any) -> Any:
    """Return the rows of nested arrays, whose axes are nested likewise or one for all."""
    if isinstance(value, dict):
        parts = ((x, axes[name] if isinstance(axes, dict) else axes) for name, x in value.items())
        return dict(zip(value, (_take(*part, chosen) for part in parts), strict=True))
    if isinstance(value, tuple):
        each = axes if isinstance(axes, tuple) else (axes,) * len(value)
        return tuple(_take(*part, chosen) for part in zip(value, each, strict=True))
    return value if axes is None or value is None else np.take(value, chosen, axes)


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
