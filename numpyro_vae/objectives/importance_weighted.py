"""The importance-weighted bound, with three estimates of its gradient."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array

from numpyro_vae.objectives.base import AbstractImportance, Particles, as_if, log_mean_exp
from numpyro_vae.objectives.rows import Densities
from numpyro_vae.objectives.traces import Trace, latents, values_of

__all__ = ["ImportanceWeightedELBO"]

GRADIENTS = ("plain", "stl", "dreg")


class ImportanceWeightedELBO(AbstractImportance):
    r"""The bound of importance-weighted autoencoders, of each datum by itself.

    .. math::
        \mathcal{L}_K = \sum_i \mathbb{E} \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}

    (Burda et al. 2016). It rises with :math:`K` to the log evidence, whatever the family, and is
    the value of NumPyro's ``RenyiELBO(alpha=0)``. The estimates of its gradient differ in what the
    guide learns from, not in their mean, for ``"plain"`` and ``"dreg"``:

    - ``"plain"``: the derivative of the bound. Its signal-to-noise ratio for the guide falls like
      :math:`1 / \sqrt K` (Rainforth et al. 2018).
    - ``"stl"``, sticking the landing: without the score of the guide (Roeder et al. 2017). Its
      noise vanishes where the guide is exact; it is biased for :math:`K > 1`.
    - ``"dreg"``, doubly reparameterized: the path derivative weighted by :math:`\tilde w_k^2`
      in place of :math:`\tilde w_k` (Tucker et al. 2019). Unbiased, and its ratio does not fall.

    Global latents :math:`\beta` are drawn once for all particles, and the bound is
    :math:`\mathbb{E}_{q(\beta)}[\log p(\beta) - \log q(\beta) + \sum_i \log \frac1K \sum_k
    w_{ik}(\beta)]`: importance-weighted in the local latents, an ELBO in the global ones, and so
    an unbiased one on minibatches. A model in which something outside the local plate depends on
    local latents has a single weight, of all sites together.

    A factor of `numpyro.handlers.scale` counts inside the weights; what subsampling and `fit` weigh
    a row with counts outside of them.

    Args:
        num_particles: :math:`K`.
        gradient: ``"plain"``, ``"stl"`` or ``"dreg"``.
        vectorize_particles: as in every ELBO of NumPyro's.
        plate: the plate whose rows have weights of their own; by default that of an amortized
            guide, and for other guides all plates that the sites in plates share.

    Raises:
        ValueError: for another gradient; when it is used, if a latent of the guide has no
            reparameterized sampler, or if sites subsample that share a weight.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, optax, numpyro.distributions as dist
        >>> from numpyro.infer import SVI
        >>> from numpyro_vae import AutoAmortizedNormal
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> loss = ImportanceWeightedELBO(num_particles=8, gradient="dreg")
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-3), loss)
        >>> svi.run(jax.random.key(0), 3, jnp.zeros(4), progress_bar=False).losses.shape
        (3,)
    """

    def __init__(
        self,
        num_particles: int = 8,
        gradient: Literal["plain", "stl", "dreg"] = "dreg",
        *,
        vectorize_particles: bool | Callable[..., Any] = True,
        plate: str | None = None,
    ):
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient is {gradient!r}, expected one of {GRADIENTS}.")
        super().__init__(num_particles, vectorize_particles=vectorize_particles, plate=plate)
        self.gradient = gradient

    def combine(self, particles: Particles, rng_key: Array) -> tuple[Array, dict[str, Any]]:
        """Return minus the bound, and the networks' state."""
        del rng_key
        if self.gradient == "dreg":
            return _doubly_reparameterized(particles)
        if self.gradient == "stl":
            found, state = _score(particles, _draw(particles))
        else:
            found, state = particles.run(lambda key, _: _trace(particles, key))
        return found.loss(log_mean_exp(found.log_weights)), state


def _trace(particles: Particles, key: Array) -> Trace:
    """Run the guide."""
    trace = particles.call.trace_guide(key, particles.shared)
    _require_reparameterized(trace)
    return trace


def _draw(particles: Particles) -> dict[str, Array]:
    """Return values of all latents of the guide, with the particles along the leading axis."""

    def particle(key: Array) -> dict[str, Array]:
        _, guide_key = jax.random.split(key)
        return values_of(latents(_trace(particles, guide_key)))

    return particles.map(particle, particles.keys)


def _score(particles: Particles, values: dict[str, Array]) -> tuple[Densities, dict[str, Any]]:
    """Run guide and model at given draws; parameters of the guide are constants."""
    frozen = particles.call._replace(params=stop_gradient(particles.call.params))
    return particles.run(frozen.trace_guide, values)


def _doubly_reparameterized(particles: Particles) -> tuple[Array, dict[str, Any]]:
    """Return minus the bound with a gradient in which the path of a draw has its weight twice.

    The derivative with respect to draws and parameters is taken here, once, as the weights that
    multiply what comes back to the draws are known only after the densities.
    """
    params, values = particles.call.params, _draw(particles)
    learned = {name: value for name, value in params.items() if _is_real(value)}

    def score(values: dict[str, Array], learned: dict[str, Any]) -> tuple[Any, Any]:
        call = particles.call._replace(params={**params, **learned})
        found, state = _score(particles._replace(call=call), values)
        return (found.log_weights, found.shared), (found, state)

    _, pull, (found, state) = jax.vjp(score, *stop_gradient((values, learned)), has_aux=True)
    weights = jax.nn.softmax(found.log_weights, axis=0)
    of_shared = jnp.full_like(found.shared, -1 / len(found.shared))
    of_values, of_learned = pull((-found.scale[0] * weights, of_shared))
    for name, event_dim in particles.local.items():
        of_values[name] *= weights.reshape(*weights.shape, *[1] * event_dim)
    surrogate = _inner(of_values, values) + _inner(of_learned, learned)
    return as_if(found.loss(log_mean_exp(found.log_weights)), surrogate), state


def _is_real(tree: Any) -> bool:
    """Return whether all of a pytree can be differentiated: keys and counts of networks cannot."""
    leaves = jax.tree.leaves(tree)
    return all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves)


def _inner(gradient: Any, tree: Any) -> Array:
    """Return what has a given gradient with respect to a pytree."""
    return jax.tree.reduce(
        operator.add,
        jax.tree.map(lambda of, leaf: (stop_gradient(of) * leaf).sum(), gradient, tree),
        jnp.zeros(()),
    )


def _require_reparameterized(guide_trace: Trace) -> None:
    for name, site in latents(guide_trace).items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"The site {name!r} of the guide has no reparameterized sampler "
                f"({type(site['fn']).__name__}), so that the guide would get a wrong gradient. "
                "Train with ReweightedWakeSleep, or with numpyro.infer.TraceGraph_ELBO."
            )
