"""Guides whose local posterior is read off each datum by a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoGuide, AutoNormal
from numpyro.primitives import Messenger, mutable

from numpyro_vae.distributions import LogScaleNormal
from numpyro_vae.encoders import MLP
from numpyro_vae.encoding import Encoding
from numpyro_vae.families import DiagonalNormal
from numpyro_vae.network import Encoder, Network, apply_network
from numpyro_vae.parameterization import AbstractParameterization, get_parameterization
from numpyro_vae.plates import all_rows
from numpyro_vae.runs import run_model
from numpyro_vae.sites import Site, choose_plate, is_real, read_model

__all__ = ["AutoAmortizedNormal"]


class AutoAmortizedNormal(AutoGuide):
    r"""A guide that reads a Normal posterior over each datum's latents off the datum itself.

    A network maps a datum :math:`x_i` to ``loc`` and a raw scale, and the guide is

    .. math:: q(z_i \mid x_i) = \mathrm{Normal}(\mathrm{loc}(x_i), \mathrm{scale}(x_i)),

    over the unconstrained latents of the datum, sampled with the reparameterization trick and
    mapped to each site's support. Latent sites outside the local plate go to ``global_guide``.
    Everything else is read from the model. The guide works wherever NumPyro takes one.

    Args:
        model: a NumPyro model with latent sites in a plate.
        encoder: a flax ``nnx.Module``, or a builder of one; see `numpyro_vae.encoders.base`.
        scale: what the network's second output means: ``"log_scale"``, ``"log_variance"``,
            ``"softplus"``, or a parameterization with its own initial scale and bounds.
        inputs: ``inputs(*args, **kwargs)``, from the model's arguments to what the encoder reads,
            data along the leading axis. By default the observed sites of the local plate.
        plate: the local plate's name; by default the one that subsamples, else the only one
            that holds latent sites.
        global_guide: an AutoGuide class, or a callable from a model to a guide, for the latent
            sites outside the local plate.
        prefix: of the guide's parameters.

    Raises:
        ValueError: at the first call, if the model has no latent site in a plate or several
            candidate plates, nothing observed to encode, a discrete local site, or if the
            encoder's output has not the shape that the sites need.

    Reference:
        Kingma and Welling, *Auto-Encoding Variational Bayes*, ICLR 2014.

    Example:
        >>> import numpy as np, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> x = np.linspace(-2.0, 2.0, 50)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-2), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 500, x, progress_bar=False)
        >>> draws = svi.guide.sample_posterior(
        ...     jax.random.key(1), result.params, x[:3], sample_shape=(1000,)
        ... )
        >>> draws["z"].shape
        (1000, 3)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | None = None,
        *,
        scale: str | AbstractParameterization = "log_scale",
        inputs: Callable[..., Any] | None = None,
        plate: str | None = None,
        global_guide: Callable[..., Any] = AutoNormal,
        prefix: str = "auto",
    ):
        super().__init__(model, prefix=prefix)
        self.encoder = MLP if encoder is None else encoder
        self.family = DiagonalNormal(get_parameterization(scale))
        self.inputs = inputs
        self.plate_name = plate
        self.global_guide = global_guide
        self.training = True

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Read the model, once: nothing is computed, no likelihood evaluated, at any size.

        Args:
            args: the model's arguments.
            kwargs: its keyword arguments.

        Raises:
            ValueError: see the class.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def reset(self) -> None:
        """Forget the model as it was read; the next call reads it anew."""
        self.prototype_trace = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.sites = read_model(self.model, args, kwargs)
        self.plate = choose_plate(self.sites, self.plate_name)
        self.local_sites = tuple(self.sites.local(self.plate.name))
        for site in self.local_sites:
            if site.is_discrete:
                raise ValueError(
                    f"Site {site.name!r} in plate {self.plate.name!r} is discrete; the guide needs "
                    "continuous latents. Hide it from the guide with handlers.block(model, "
                    f"hide=[{site.name!r}]) and marginalize it in the model."
                )
        self.network = Network(self.encoder, self.family, self.local_sites, self.plate)
        self.global_names = tuple(site.name for site in self.sites.globals(self.plate.name))
        self.globals = self.global_guide(self._global_model()) if self.global_names else None
        self.prototype_trace = {
            name: {"name": name, "type": "sample", "is_observed": site.is_observed}
            for name, site in self.sites.sites.items()
        }

    def _global_model(self) -> Callable[..., Any]:
        """Return the model with all but its global latent sites and their plates hidden."""
        kept = set(self.global_names)
        kept |= {plate for name in self.global_names for plate in self.sites.sites[name].plates}
        return handlers.block(self.model, hide_fn=partial(_is_not_among, frozenset(kept)))

    def eval(self) -> AutoAmortizedNormal:
        """Return the guide in evaluation mode: dropout off, batch statistics frozen."""
        guide = copy.copy(self)
        guide.training = False
        return guide

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Sample every latent site, with the same arguments as the model.

        Returns:
            The values by site name.
        """
        self.setup(*args, **kwargs)
        parts = [self._sample_local, self._sample_globals]
        if self.sites.latent()[0].name in self.global_names:  # as the model orders them
            parts.reverse()
        return {name: value for part in parts for name, value in part(args, kwargs)}

    def _sample_globals(self, args: tuple, kwargs: dict) -> Iterator[tuple[str, Array]]:
        if self.globals is not None:
            yield from self.globals(*args, **kwargs).items()

    def _sample_local(self, args: tuple, kwargs: dict) -> Iterator[tuple[str, Array]]:
        encoding = self._encode(args, kwargs)
        for site, fn in self._site_distributions(encoding):
            with encoding.run.enter_plates(site):
                yield site.name, jnp.asarray(numpyro.sample(site.name, fn))

    def _site_distributions(self, encoding: Encoding) -> Iterator[tuple[Site, dist.Distribution]]:
        """Yield each local site with its distribution, Normal through the support's bijection."""
        normal = encoding.normal
        log_scales = encoding.unpack(normal.log_scale)
        for (site, loc), (_, log_scale) in zip(
            encoding.unpack(normal.loc), log_scales, strict=True
        ):
            fn = LogScaleNormal(loc, log_scale).to_event(len(site.unconstrained_shape))
            support = encoding.run.support(site)
            if not is_real(support):
                fn = dist.TransformedDistribution(fn, biject_to(support))
            yield site, fn

    def _encode(self, args: tuple, kwargs: dict) -> Encoding:
        run = run_model(self.model, self.plate.name, args, kwargs)
        raw = self._raw(run.inputs(self.inputs))
        return Encoding(raw, self.family, run.same_sites(self.local_sites), run)

    def _raw(self, inputs: Any) -> Any:
        """Return the network's raw outputs, its parameters declared as a param site."""
        structure = self.network.structure(inputs)
        params: Any = numpyro.param(
            f"{self.prefix}$params", lambda key: self.network.init(key, inputs)[0]
        )
        holder: Any = self._state(inputs) if structure.has_state else {"state": {}}
        raw, state = apply_network(
            structure.graphdef, params, holder["state"], inputs, train=self.training
        )
        if self.training:
            holder["state"] = state
        return raw

    def _state(self, inputs: Any) -> dict[str, Any]:
        """Return the holder of the network's state, which what is put into it updates."""
        name = f"{self.prefix}$state"
        holder: Any = mutable(name)
        if holder is not None:
            return holder
        rng_key: Any = numpyro.prng_key()
        initial: Any = {"state": self.network.init(rng_key, inputs)[1]}
        mutable(name, initial)
        return initial

    def encode(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> Encoding:
        """Encode every row of the arguments, in evaluation mode.

        Args:
            params: trained parameters, with the network's state among them if it has any.
            args: the model's arguments, with any number of rows.
            kwargs: likewise.

        Raises:
            ValueError: if the parameters do not belong to this guide.
        """
        return self.encode_rows(all_rows(), params, args, kwargs)

    def encode_rows(
        self, rows: Messenger, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]
    ) -> Encoding:
        """Encode the rows that a handler of `numpyro_vae.plates` lets the plates hold."""
        self.setup(*args, **kwargs)
        with handlers.block(), rows, handlers.seed(rng_seed=0):
            run = run_model(self.model, self.plate.name, args, kwargs)
            run.same_sites(self.local_sites)
            self.network.check_params(params, self.prefix, run.inputs(self.inputs))
            with handlers.substitute(data=params):
                return self.eval()._encode(args, kwargs)

    def sample_posterior(
        self,
        rng_key: Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draw from the guide for every row of the arguments, however many.

        Args:
            rng_key: the random key.
            params: trained parameters of the model and the guide.
            args: the model's arguments.
            sample_shape: how many draws.
            kwargs: the model's keyword arguments.

        Returns:
            Draws of each latent and deterministic site, ``sample_shape`` in front.
        """
        local_key, global_key, model_key = jax.random.split(rng_key, 3)
        encoding = self.encode(params, *args, **kwargs)
        packed = jnp.asarray(encoding.distribution.sample(local_key, sample_shape))
        draws, _ = encoding.constrain(packed)
        draws |= self.sample_globals(global_key, params, sample_shape, args, kwargs)
        if self.sites.deterministic:
            predictive = Predictive(
                all_rows(self.model),
                draws,
                params=params,
                return_sites=list(self.sites.deterministic),
                batch_ndims=len(sample_shape),
            )
            draws |= predictive(model_key, *args, **kwargs)
        return draws

    def sample_globals(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> dict[str, Array]:
        """Draw the global sites; see `sample_posterior`."""
        if self.globals is None:
            return {}
        if isinstance(self.globals, AutoGuide):
            _setup(self.globals, params, args, kwargs)
            return self.globals.sample_posterior(
                rng_key, params, *args, sample_shape=sample_shape, **kwargs
            )
        keys = jax.random.split(rng_key, math.prod(sample_shape))

        def draw(key: Array) -> dict[str, Array]:
            guide = handlers.substitute(handlers.seed(self.globals, key), data=params)
            with handlers.block():
                trace = handlers.trace(guide).get_trace(*args, **kwargs)
            return {name: trace[name]["value"] for name in self.global_names}

        draws = jax.vmap(draw)(keys)
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)

    def median(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Return the posterior median of each latent site for every row of the arguments."""
        return {
            name: value[0] for name, value in self.quantiles(params, [0.5], *args, **kwargs).items()
        }

    def quantiles(
        self, params: dict[str, Any], quantiles: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """Return posterior quantiles of each latent site, a leading axis for ``quantiles``.

        They are quantiles of the unconstrained values, mapped to the site's support.

        Args:
            params: trained parameters.
            quantiles: between 0 and 1.
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
        quantiles = jnp.atleast_1d(jnp.asarray(quantiles))
        encoding = self.encode(params, *args, **kwargs)
        packed = jnp.asarray(encoding.normal.icdf(quantiles.reshape(-1, 1, 1)))
        values, _ = encoding.constrain(packed)
        if isinstance(self.globals, AutoGuide):
            _setup(self.globals, params, args, kwargs)
            values |= self.globals.quantiles(params, quantiles)
        return values


def _is_not_among(names: frozenset[str], msg: Any) -> bool:
    return "name" in msg and msg["name"] not in names


def _setup(guide: AutoGuide, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> None:
    """Let an automatic guide read the model, which it does when first called."""
    if guide.prototype_trace is None:
        with handlers.block(), handlers.seed(rng_seed=0), handlers.substitute(data=params):
            guide(*args, **kwargs)
