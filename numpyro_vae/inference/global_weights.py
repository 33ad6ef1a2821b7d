"""Draws of the global sites and their importance weights: what the weights say of the draws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_vae.guides.global_sites import NoDensityError
from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.marginal import (
    PARTICLES,
    Globals,
    LogDensity,
    chunks,
    global_scale,
    log_density,
    outside_of,
    precise_log_density,
    require_density,
)
from numpyro_vae.inference.psis import require_some_density, smooth
from numpyro_vae.inference.quantities import weigh
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner


class Change(NamedTuple):
    """How weights change the moments of draws, an array of the site's shape each.

    Attributes:
        shift: of the mean, in standard deviations of the draws.
        shift_mcse: its Monte Carlo standard error.
        ratio: of the standard deviation with weights to that without.
        ratio_mcse: its Monte Carlo standard error.
    """

    shift: np.ndarray
    shift_mcse: np.ndarray
    ratio: np.ndarray
    ratio_mcse: np.ndarray


@dataclass(frozen=True)
class GlobalWeights:
    r"""Draws of the global sites, weighed by their posterior given all data.

    .. math:: w_s = p(g_s) \prod_i p(x_i \mid g_s) / q(g_s)

    Attributes:
        draws: by site, ``(num_samples, *batch_shape, *event_shape)``.
        density: the log joint density of each draw and the data.
        log_weights: unnormalized, ``(num_samples,)``.
        smoothed: the Pareto-smoothed weights, which add up to one; first those, then those of each
            replicate of the density's error, ``(num_samples, 1 + replicates)``.
        khat: that of the weights.
        density_key: the random key of the density.
    """

    draws: dict[str, np.ndarray]
    density: LogDensity
    log_weights: np.ndarray
    smoothed: np.ndarray
    khat: float
    density_key: Array

    @classmethod
    def of(
        cls, draws: Globals, density: LogDensity, log_q: np.ndarray, density_key: Array
    ) -> GlobalWeights:
        """Weigh draws by their log-densities.

        Raises:
            ValueError: if none of them has a finite weight.
        """
        log_weights = density.values - log_q
        require_some_density(log_weights)
        replicates = np.column_stack([log_weights, log_weights[:, None] + density.errors.T])
        smoothed, khat = smooth(replicates)
        found = {name: np.asarray(value, float) for name, value in draws.items()}
        return cls(found, density, log_weights, np.exp(smoothed), float(khat[0]), density_key)

    @property
    def ess(self) -> float:
        """The number of effective draws, one over the sum of the squared weights."""
        return float(1 / (self.smoothed[:, 0] ** 2).sum())

    @property
    def spread(self) -> float:
        """The standard deviation of the log weights that are finite."""
        return float(np.std(self.log_weights, where=np.isfinite(self.log_weights)))

    def changes(self) -> dict[str, Change]:
        """Return by site how the weights change the moments of the draws.

        The errors are those of the draws, by the delta method, and those of their densities.
        """
        return {name: self._change(draws) for name, draws in self.draws.items()}

    def _change(self, draws: np.ndarray) -> Change:
        shape, number = draws.shape[1:], len(draws)
        flat = draws.reshape(number, -1)
        z = (flat - flat.mean(0)) / np.maximum(flat.std(0), np.finfo(float).tiny)
        means = self.smoothed.T @ z
        variances = np.maximum(self.smoothed.T @ z**2 - means**2, np.finfo(float).tiny)
        ratios, weights = np.sqrt(variances), self.smoothed[:, :1]
        of_mean = weights * (z - means[0]) - z / number
        of_ratio = weights * ((z - means[0]) ** 2 / variances[0] - 1) - (z**2 - 1) / number
        errors = [
            np.sqrt((influence**2).sum(0) + ((values[1:] - values[0]) ** 2).mean(0))
            for influence, values in ((of_mean, means), (of_ratio * ratios[0] / 2, ratios))
        ]
        parts = (means[0], errors[0], ratios[0], errors[1])
        return Change(*(part.reshape(shape) for part in parts))


def weigh_globals(runner: Runner, rows: Rows, rng_key: Array, num_samples: int) -> GlobalWeights:
    """Weigh draws of the guide of the global sites by the posterior given all data.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        num_samples: how many draws.

    Raises:
        NoDensityError: if the guide of a global site has no density.
        ValueError: if no draw has a finite weight, or the sites are scaled by unlike factors.
    """
    draw_key, density_key = jax.random.split(rng_key)
    draws, log_q = runner.weigh_globals(draw_key, rows, num_samples)
    log_q = np.asarray(log_q, float)
    density = precise_log_density(runner, rows, density_key, draws, log_q)
    return GlobalWeights.of(draws, density, log_q, density_key)


def draw_whole(
    runner: Runner, rows: Rows, rng_key: Array, num_samples: int
) -> tuple[Globals, dict[str, np.ndarray]]:
    """Draw all latents as `Runner.draw_globals` does, where rows have none of their own.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        num_samples: how many draws.

    Returns:
        The draws, and ``log_p`` and ``log_q``, the log-densities of each under the model, its data
        included, and under the guide, ``(num_samples,)``; none if it has no density.
    """
    try:
        draws, log_q = runner.weigh_globals(rng_key, rows, num_samples)
    except NoDensityError:
        return runner.draw_globals(rng_key, rows, num_samples), {}
    log_p = log_density(runner, rows, rng_key, draws, PARTICLES[0]).values
    return draws, {"log_p": log_p, "log_q": np.asarray(log_q, float)}


def weigh_whole(
    runner: Runner, rows: Rows, rng_key: Array, num_samples: int
) -> Float[np.ndarray, "num_samples"]:
    r"""Return the log importance weights of draws of all latents of all rows together.

    .. math:: \log w_s = \log p(x, z_s, g_s) - \log q(z_s, g_s \mid x)

    They are those of `numpyro.infer.importance.psis_diagnostic`, and their mean estimates the ELBO
    that NumPyro trains. They are of any guide, also where rows have no posteriors of their own.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        num_samples: how many draws.

    Raises:
        NoDensityError: if the guide of a site has no density.
        ValueError: if the model scales its global sites by unlike factors.
    """
    require_density(runner)
    draw_key, row_key = jax.random.split(rng_key)
    globals_, log_q = runner.weigh_globals(draw_key, rows, num_samples)
    of_globals = runner.once(_outside_all, rows, row_key, globals_, num_samples=num_samples)
    total = of_globals.astype(float)
    run = partial(runner.per_draw, _scaled_weights, num_samples=num_samples)
    for chunk in chunks(rows):
        total = total + run(chunk, row_key, globals_).astype(float).sum(1)
    return total / global_scale(runner, rows) - np.asarray(log_q, float)


def _outside_all(
    batch: EncodedBatch, rng_key: Array, globals_: Globals, *, num_samples: int
) -> Float[Array, "num_samples"]:
    """Return the log-density of all that belongs to no row, also where there are no globals."""

    def one(_: Array, globals_: Globals) -> Array:
        return outside_of(batch, rng_key, globals_)

    return batch.over_draws(one, jnp.arange(num_samples), globals_)


def _scaled_weights(
    batch: EncodedBatch, rng_key: Array, globals_: Globals, *, num_samples: int
) -> Float[Array, "num_samples batch"]:
    """Return log weights of draws of each row, which count as the model scales its latents."""
    found = weigh(batch, rng_key, globals_, num_samples=num_samples)["log_weights"]
    scale = batch.row_scale
    return found if scale is None or not batch.guide.global_names else scale * found
