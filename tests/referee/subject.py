"""A case with a guide and parameters, and what several comparisons need of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from case import Case
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from reference import as_one, auxiliary_values, density, is_latent, is_local

from numpyro_vae import Posterior

NUM_SAMPLES = 2
OBJECTIVE = (optax.adam(1e-2), Trace_ELBO())


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
        self.case, self.static, self.key = case, case.static_kwargs, jax.random.key(11)
        self.model, self.full = case.model(), case.model(subsamples=False)
        self.guide = case.guide(self.model)
        self.args, self.kwargs = _arguments(case.data)
        self.kwargs = {**self.kwargs, **self.static}
        self.svi = SVI(self.model, self.guide, *OBJECTIVE, **self.static)
        self.params = self._random_params()
        self.guide.setup(*self.args, **self.kwargs)
        self.guide.set_up_globals(self.params, self.args, self.kwargs, {})
        self.posterior = self._posterior(self.static)

    def _random_params(self) -> dict[str, Any]:
        """Return the parameters of a guide like this, which compiling leaves as it is."""
        args, kwargs = _arguments(self.case.data)
        svi = SVI(self.model, self.case.guide(self.model), *OBJECTIVE, **self.static)
        state = jax.jit(lambda key: svi.init(key, *args, **kwargs))(jax.random.key(0))
        rng = np.random.default_rng(self.case.seed)
        start = svi.optim.get_params(state.optim_state)
        moved = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), start)
        return svi.constrain_fn(moved)

    def _posterior(self, static: dict[str, Any]) -> Posterior:
        axes = self.case.batch_axes
        return Posterior(self.guide, self.params, static_kwargs=static, batch_axes=axes)

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        return self.posterior.sample(self.key, self.case.data, NUM_SAMPLES)

    def values(self, number: int) -> dict[str, Any]:
        """Return a draw of each latent site, and the parameters."""
        draw = {name: jnp.asarray(value[number]) for name, value in self.draws.items()}
        return {**self.params, **draw}

    @cached_property
    def density(self) -> Callable[..., tuple[dict[str, Array], dict]]:
        """The model's log-densities with all rows, and its trace, of a draw."""
        return as_one(lambda values: density(self.full, self.args, self.kwargs, values))

    @cached_property
    def log_p(self) -> list[tuple[dict[str, Array], dict]]:
        """The model's log-densities with all rows, and its traces, of each draw."""
        return [self.density(self.values(number)) for number in range(NUM_SAMPLES)]

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
        of_draw = as_one(self._guide_density)
        return [of_draw(self.values(number)) for number in range(NUM_SAMPLES)]

    def _guide_density(self, values: dict[str, Any]) -> tuple[dict[str, Array], dict]:
        _, model_trace = density(self.full, self.args, self.kwargs, values)
        guide, args, kwargs = self.full_guide, self.args, self.kwargs
        return self.guide_density(guide, args, kwargs, values, model_trace, self.params)

    def guide_density(
        self, guide: Any, args: tuple, kwargs: dict, values: dict, model_trace: dict, given: dict
    ) -> tuple[dict[str, Array], dict]:
        """Return the log-densities of a guide that is run with what is given, and its trace."""
        seeded = handlers.seed(handlers.substitute(guide, data=given), 0)
        trace = handlers.trace(seeded).get_trace(*args, **kwargs)
        joint = auxiliary_values(trace, model_trace, values)
        if joint:  # the sites are functions of them
            values = {name: x for name, x in values.items() if name not in self.local}
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
