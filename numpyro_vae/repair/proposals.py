"""Proposals for a datum's latents, and their importance weights, in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from numpyro_vae.inference.encoded import EncodedBatch
from numpyro_vae.inference.marginal import draw_prior
from numpyro_vae.inference.refine import refine

PROPOSALS = 8000  # draws of a datum, shared by the draws of the global sites that it is held at
FEWEST = 1000  # of these for each
FROM_PRIOR = 0.2  # of all proposals, where there is a prior to draw from

# In full where a GPU would shorten it: a draw and its density must agree.
multiply = partial(jnp.einsum, precision="highest")

Held = dict[str, Array]
LogDensity = Callable[[Array], Array]
Proposal = Callable[[Array, Held, int], tuple[Array, LogDensity]]


def location_and_scale(
    draws: Float[np.ndarray, "rows number size"], ess: Float[np.ndarray, "rows"], least: float
) -> tuple[Float[np.ndarray, "rows size"], Float[np.ndarray, "rows size size"]]:
    """Return the mean of each row's draws, and the Cholesky factor of their covariance.

    Correlations are shrunk to zero by how few of the draws count, as those of some draws that are
    resampled over and over are of no full rank.

    Args:
        draws: of each row; those that are not finite are left out.
        ess: how many of them count; NaN if none does.
        least: the smallest standard deviation.
    """
    draws, size = draws.astype(float), draws.shape[2]
    there = np.isfinite(draws).all(2, keepdims=True)
    number = np.maximum(there.sum(1), 1)
    center = np.where(there, draws, 0).sum(1) / number
    centered = np.where(there, draws - center[:, None], 0)
    scale = np.maximum(np.sqrt((centered**2).sum(1) / number), least)
    z = centered / scale[:, None]
    ess = np.nan_to_num(ess)
    share = (ess / (ess + 2 * size))[:, None, None]
    correlation = np.moveaxis(z, 1, 2) @ z / number[..., None]
    shrunk = share * correlation + (1 - share) * np.eye(size)
    return center, scale[:, :, None] * np.linalg.cholesky(shrunk)


class Kernels(NamedTuple):
    """A mixture of Normals for each datum, all of one covariance.

    Attributes:
        centers: ``(batch, number, size)``, equally probable.
        scale_tril: the Cholesky factor of the covariance, ``(batch, size, size)``.
    """

    centers: Any
    scale_tril: Any

    @classmethod
    def around(
        cls,
        draws: Float[np.ndarray, "batch number size"],
        ess: Float[np.ndarray, "batch"],
        within: Float[np.ndarray, "batch number size"] | None = None,
    ) -> Kernels:
        """Return kernels around draws, of the bandwidth of Silverman's rule.

        Args:
            draws: the centers.
            ess: how many of them count.
            within: the draws less the mean of the mode that each is in, if there are several:
                kernels are as wide as modes are, and not as far as these are apart.
        """
        _, number, size = draws.shape
        _, scale_tril = location_and_scale(draws if within is None else within, ess, 1e-6)
        bandwidth = (4 / (number * (size + 2))) ** (1 / (size + 4))
        return cls(draws, (bandwidth * scale_tril).astype(draws.dtype))

    def sample(self, rng_key: Array, num_samples: int) -> Float[Array, "num_samples batch size"]:
        """Draw from the mixture of every datum."""
        pick_key, noise_key = jax.random.split(rng_key)
        batch, number, size = self.centers.shape
        picked = jax.random.randint(pick_key, (batch, num_samples), 0, number)
        means = jnp.take_along_axis(self.centers, picked[..., None], axis=1)
        noise = jax.random.normal(noise_key, (batch, num_samples, size))
        return jnp.moveaxis(means + multiply("bij,bnj->bni", self.scale_tril, noise), 1, 0)

    def log_prob(self) -> Callable[[Float[Array, "batch size"]], Float[Array, "batch"]]:
        """Return the log-density, of a draw of each datum."""
        number, size = self.centers.shape[1:]
        whiten = jax.vmap(partial(solve_triangular, lower=True), (0, None))(
            self.scale_tril, jnp.eye(size)
        )
        # Counted from their mean, as their distances are all that matters.
        middle = self.centers.mean(1)
        centers = multiply("bij,bnj->bni", whiten, self.centers - middle[:, None])
        log_det = jnp.log(jnp.diagonal(self.scale_tril, axis1=1, axis2=2)).sum(-1)
        normalizer = log_det + size / 2 * jnp.log(2 * jnp.pi) + jnp.log(number)

        def log_prob(packed: Array) -> Array:
            standard = multiply("bij,bj->bi", whiten, packed - middle)
            squares = ((standard[:, None] - centers) ** 2).sum(-1)
            return logsumexp(-squares / 2, axis=-1) - normalizer

        return log_prob


def propose(batch: EncodedBatch, rng_key: Array, held: Held, *, refined: bool) -> dict[str, Array]:
    """Draw from the guide, or from what it is refined to, and weigh.

    Args:
        batch: the batch.
        rng_key: the random key.
        held: values of the global sites, a leading axis of them.
        refined: whether each datum's own variational parameters are optimized first.

    Returns:
        By row: packed ``draws`` ``(batch, held, number, size)``, their ``log_weights``
        ``(batch, held, number)`` given each value of the globals, whether the optimization has
        ``converged``, and whether all latents count, as kernels are of all.
    """
    refine_key, key = jax.random.split(rng_key)
    converged = jnp.ones(len(batch.indices), bool)
    if refined:
        batch, converged = refine(batch, refine_key, held)

    return _weigh(batch, partial(_of_guide, batch), key, held) | {"converged": converged}


def _of_guide(batch: EncodedBatch, key: Array, held: Held, number: int) -> tuple[Array, LogDensity]:
    given = {name: jnp.broadcast_to(x, (number, *x.shape)) for name, x in held.items()}
    return batch.draw(key, number, given), batch.encoding.condition(held).log_prob


def adapt(
    batch: EncodedBatch, kernels: Kernels, rng_key: Array, held: Held, *, with_guide: bool = False
) -> dict[str, Array]:
    """Draw from kernels around draws that were resampled before, and weigh; see `propose`.

    Args:
        batch: the batch.
        kernels: of each datum.
        rng_key: the random key.
        held: values of the global sites, a leading axis of them.
        with_guide: whether half of the draws are of the guide, which may know of other modes.

    Reference:
        Cappé, Guillin, Marin and Robert, *Population Monte Carlo*, Journal of Computational and
        Graphical Statistics, 2004.
    """
    kernels = jax.tree.map(jnp.asarray, kernels)

    def around(key: Array, held: Held, number: int) -> tuple[Array, LogDensity]:
        return kernels.sample(key, number), kernels.log_prob()

    def both(key: Array, held: Held, number: int) -> tuple[Array, LogDensity]:
        keys, half = jax.random.split(key), number // 2
        near, log_near = around(keys[0], held, number - half)
        drawn, log_drawn = _of_guide(batch, keys[1], held, half)
        shares = np.log([1 - half / number, half / number])

        def log_prob(packed: Array) -> Array:
            return jnp.logaddexp(shares[0] + log_near(packed), shares[1] + log_drawn(packed))

        return jnp.concatenate([near, drawn]), log_prob

    return _weigh(batch, both if with_guide else around, rng_key, held)


def _weigh(batch: EncodedBatch, proposal: Proposal, rng_key: Array, held: Held) -> dict[str, Array]:
    """Weigh draws given each value of the globals.

    Some are of the prior, lest a mode be missed. A weight is that of the mixture which all were
    drawn from, and so it is bounded by the likelihood (*defensive* importance sampling: Hesterberg,
    Technometrics, 1995). It is infinite where the model's density is.
    """
    size = len(next(iter(held.values()))) if held else 1
    number = max(PROPOSALS // size, FEWEST)
    share = 0.0 if _is_improper(batch) else FROM_PRIOR
    of_prior = round(number * share / (1 - share))

    def given(args: tuple[Array, Held]) -> tuple[Array, Array]:
        draw_key, prior_key, key = jax.random.split(args[0], 3)
        draws, log_q = proposal(draw_key, args[1], number)
        if of_prior:
            draws = jnp.concatenate([draws, draw_prior(batch, prior_key, args[1], of_prior)])

        def weigh(packed: Array) -> Array:
            log_joint, log_prior = batch.log_densities(packed, args[1], key)
            proposed = log_q(packed)
            if of_prior:
                defence = jnp.log(share) + logsumexp(log_prior, axis=0)
                proposed = jnp.logaddexp(jnp.log1p(-share) + proposed, defence)
            density = logsumexp(log_joint, axis=0)
            return jnp.where(density == jnp.inf, jnp.inf, density - proposed)

        return draws, batch.over_draws(weigh, draws)

    draws, log_weights = jax.lax.map(given, (jax.random.split(rng_key, size), held))
    return {
        "draws": jnp.moveaxis(draws, 2, 0),
        "log_weights": jnp.moveaxis(log_weights, 2, 0),
        "whole": jnp.full(len(batch.indices), batch.encoding.mask is None),
    }


def _is_improper(batch: EncodedBatch) -> bool:
    return any(site.is_improper for site in batch.encoding.sites)
