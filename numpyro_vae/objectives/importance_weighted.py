"""The importance-weighted bound, with three estimates of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from jax.lax import stop_gradient
from jaxtyping import Array

from numpyro_vae.objectives.base import AbstractImportance, Particles, log_mean_exp
from numpyro_vae.objectives.rows import Rows
from numpyro_vae.objectives.traces import Call, Trace, latents, values_of

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
        draw = _draw if self.gradient == "plain" else partial(_draw_with_path, particles.rows)
        weights = None
        if self.gradient == "dreg":  # XLA computes what follows again only once
            found, _ = particles.run(draw)
            weights = stop_gradient(jax.nn.softmax(found.log_weights, axis=0))
        found, state = particles.run(draw, weights)
        return found.loss(log_mean_exp(found.log_weights)), state


def _draw(call: Call, shared: dict[str, Array], key: Array, weights: None) -> Trace:
    del weights
    trace = call.trace_guide(key, shared)
    _require_reparameterized(trace)
    return trace


def _draw_with_path(
    rows: Rows, call: Call, shared: dict[str, Array], key: Array, weights: Array | None
) -> Trace:
    """Run the guide so that its density depends on parameters through its draws alone.

    Args:
        rows: those that have weights of their own.
        call: model and guide.
        shared: values of latents outside the rows.
        key: for the draws.
        weights: factors of the derivatives with respect to the draws in the rows, or None.
    """
    drawn = latents(_draw(call, shared, key, None))
    values = values_of(drawn)
    if weights is not None:
        for name, site in drawn.items():
            if rows.hold(site):
                factor = weights.reshape(*weights.shape, *[1] * site["fn"].event_dim)
                values[name] = _scale_gradient(values[name], factor)
    return call._replace(params=stop_gradient(call.params)).trace_guide(key, values)


@jax.custom_jvp
def _scale_gradient(x: Array, factor: Array) -> Array:
    """Return an array whose derivative is multiplied by a factor."""
    del factor
    return x


@_scale_gradient.defjvp
def _scale_tangent(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, factor = primals
    return x, factor * tangents[0]


def _require_reparameterized(guide_trace: Trace) -> None:
    for name, site in latents(guide_trace).items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"The site {name!r} of the guide has no reparameterized sampler "
                f"({type(site['fn']).__name__}), so that the guide would get a wrong gradient. "
                "Train with ReweightedWakeSleep, or with numpyro.infer.TraceGraph_ELBO."
            )
