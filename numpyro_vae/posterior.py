"""A trained posterior for any rows of data: encode, sample, weigh, predict, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from numpyro.infer.autoguide import AutoGuide

from numpyro_vae import views as compiled
from numpyro_vae.amortized import AmortizedGuide
from numpyro_vae.datatree import build_datatree, constant_data, rows_first, site_dims
from numpyro_vae.enumeration import Enumeration
from numpyro_vae.rows import Rows
from numpyro_vae.views import View

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["Posterior", "SiteEncoding"]

ROWS = 256  # rows at once
DRAWS = 2**22  # unconstrained values drawn at once


class SiteEncoding(NamedTuple):
    """The guide's ``loc`` and ``scale`` of a site's unconstrained values, a row a datum."""

    loc: np.ndarray
    scale: np.ndarray


class Posterior:
    """The posterior that a trained guide gives for any rows of data.

    Every method takes data as `fit` does, runs in batches over rows and draws, keeps the rows in
    order, and moves results off the device batch by batch. All rows share one set of draws of the
    global sites. A row's draws depend on the key and on its number, not on the batches.

    Args:
        guide: the guide that was trained.
        params: what `fit` or ``svi.run`` returned, or its parameters.
        static_kwargs: keyword arguments of the model that are the same in every call.

    Raises:
        TypeError: if the guide is not an amortized one.

    Example:
        >>> import numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_vae import AutoAmortizedNormal, fit
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> guide = AutoAmortizedNormal(model)
        >>> svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
        >>> x = np.linspace(-2.0, 2.0, 100)
        >>> result = fit(svi, jax.random.key(0), x, num_epochs=5, progress_bar=False)
        >>> posterior = Posterior(guide, result)
        >>> posterior.encode(x[:3])["z"].loc.shape
        (3,)
        >>> posterior.sample(jax.random.key(1), x[:3], 10)["z"].shape
        (10, 3)
    """

    def __init__(self, guide: AutoGuide, params: Any, **static_kwargs: Any):
        if not isinstance(guide, AmortizedGuide):
            raise TypeError(
                f"The guide is a {type(guide).__name__}, expected an amortized guide such as "
                "AutoAmortizedNormal. Pass the guide itself, not what wraps it."
            )
        self.guide, self.static_kwargs = guide, static_kwargs
        state = getattr(getattr(params, "state", None), "mutable_state", None)
        self.params = {**getattr(params, "params", params), **(state or {})}
        self._compiled: dict[Callable, Callable] = {}

    def encode(self, data: Any, *, batch_axes: Any = 0) -> dict[str, SiteEncoding]:
        """Return ``loc`` and ``scale`` of every local site's unconstrained values.

        Args:
            data: as for `fit`, any number of rows.
            batch_axes: as for `fit`.

        Returns:
            By site name, arrays of shape ``(num_data, *datum_shape)``.
        """
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        found = rows.collect(partial(self._run, compiled.encode), ROWS)
        return {name: SiteEncoding(*parts) for name, parts in found.items()}

    def sample(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        var_names: Iterable[str] | None = None,
        batch_axes: Any = 0,
    ) -> dict[str, np.ndarray]:
        """Draw every latent site, for every row.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.
            var_names: the sites to return; by default all latent ones.
            batch_axes: as for `fit`.

        Returns:
            By site name, ``(num_samples, *batch_shape, *event_shape)``.

        Raises:
            ValueError: if ``num_samples`` is below 1 or a site does not exist.
        """
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        globals_ = self._globals(rng_key, rows, num_samples)
        local = self._local_names()
        names = self._names(var_names, (*local, *globals_))
        kept = tuple(name for name in local if name in names)
        static = {"num_samples": num_samples, "names": kept}
        fn = partial(self._run, compiled.sample, rng_key, globals_, **static)
        draws = rows.collect(fn, self._rows_at_once(num_samples), row_axis=1) if kept else {}
        for name, value in draws.items():
            axis = self.guide.sites.sites[name].axis(self.guide.plate)
            draws[name] = np.moveaxis(value, 1, 1 + axis)
        return {name: np.asarray((draws | globals_)[name]) for name in names}

    def predict(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        var_names: Iterable[str] | None = None,
        batch_axes: Any = 0,
    ) -> dict[str, np.ndarray]:
        """Draw the observed sites anew from the posterior predictive of every row.

        The latents are those that `sample` draws with the same key. Draws of the observed sites
        depend on the batches.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.
            var_names: the sites to return; by default all observed and deterministic ones that
                lie in the local plate.
            batch_axes: as for `fit`.

        Returns:
            By site name, ``(num_samples, num_data, ...)``, the plate's axis second.

        Raises:
            ValueError: if ``num_samples`` is below 1 or a site does not exist.
        """
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        globals_ = self._globals(rng_key, rows, num_samples)
        fn = partial(self._run, compiled.predict, rng_key, globals_, num_samples=num_samples)
        found = rows.collect(fn, self._rows_at_once(num_samples), row_axis=1)
        return {name: found[name] for name in self._names(var_names, found)}

    def log_weights(
        self, rng_key: Array, data: Any, num_samples: int, *, batch_axes: Any = 0
    ) -> np.ndarray:
        r"""Return the log importance weight of every draw of every row.

        .. math:: \log w_i = \log p(x_i, z_i \mid g) - \log q(z_i \mid x_i)

        for the draws ``z`` and ``g`` (the global sites) that `sample` makes with the same key.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.
            batch_axes: as for `fit`.

        Returns:
            An array of shape ``(num_samples, num_data)``.

        Raises:
            ValueError: if ``num_samples`` is below 1, or the guide has no density.
        """
        self._require_density()
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        globals_ = self._globals(rng_key, rows, num_samples)
        fn = partial(self._run, compiled.weigh, rng_key, globals_, num_samples=num_samples)
        return rows.collect(fn, self._rows_at_once(num_samples), row_axis=1)["log_weights"]

    def log_evidence(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        num_particles: int = 32,
        batch_axes: Any = 0,
    ) -> np.ndarray:
        r"""Estimate the log-likelihood marginal over the local sites, for draws of the globals.

        .. math:: \log p(x_i \mid g) \approx \log \frac{1}{K} \sum_k w_{ik}

        with ``num_particles`` local draws for each of the ``num_samples`` draws of the globals;
        its mean is a lower bound (Burda et al., *Importance Weighted Autoencoders*, ICLR 2016).

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of the global sites.
            num_particles: local draws for each of them.
            batch_axes: as for `fit`.

        Returns:
            An array of shape ``(num_samples, num_data)``.
        """
        self._require_density()
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        globals_ = self._globals(rng_key, rows, num_samples)
        sizes = {"num_samples": num_samples, "particles": num_particles}
        fn = partial(self._run, compiled.evidence, rng_key, globals_, **sizes)
        return rows.collect(fn, ROWS, row_axis=1)["log_evidence"]

    def probabilities(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        num_particles: int = 32,
        batch_axes: Any = 0,
    ) -> dict[str, np.ndarray]:
        r"""Return the posterior probability of each value of every enumerated site.

        .. math:: p(y \mid x) \approx \frac{1}{S} \sum_s
            \frac{\sum_k w_{sk}\, p(y \mid x, z_{sk}, g_s)}{\sum_k w_{sk}}

        with ``num_particles`` local draws :math:`z` for each of the ``num_samples`` draws :math:`g`
        of the globals, which count by their importance weights: more particles make up for what
        the guide gets wrong.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of the global sites.
            num_particles: local draws for each of them.
            batch_axes: as for `fit`.

        Returns:
            By site name, ``(num_data, *datum_shape, number of values)``.

        Raises:
            ValueError: if no site of the local plate is enumerated.
        """
        self._require_density()
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        if not self.guide.sites.enumerated(self.guide.plate.name):
            raise ValueError(
                f"No site of plate {self.guide.plate.name!r} is enumerated, so there are no "
                'probabilities. Mark a discrete site with infer={"enumerate": "parallel"}.'
            )
        globals_ = self._globals(rng_key, rows, num_samples)
        sizes = {"num_samples": num_samples, "particles": num_particles}
        fn = partial(self._run, compiled.classify, rng_key, globals_, **sizes)
        found = rows.collect(fn, ROWS)["probabilities"]
        return Enumeration.of_model(
            self.guide.model, self.guide.plate.name, rows.args, rows.kwargs
        ).probabilities(found)

    def divergences(
        self, rng_key: Array, data: Any, num_samples: int, *, batch_axes: Any = 0
    ) -> dict[str, np.ndarray]:
        """Return the KL divergence of each row's guide from its prior, by latent dimension.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws over which what is not known in closed form is averaged.
            batch_axes: as for `fit`.

        Returns:
            By local site, in nats: ``(num_data, *datum_shape)``, NaN for values that the model
            masks; or ``(num_data,)`` where the prior is no product over dimensions.
        """
        self._require_density()
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        globals_ = self._globals(rng_key, rows, num_samples)
        fn = partial(self._run, compiled.diverge, rng_key, globals_, num_samples=num_samples)
        return rows.collect(fn, self._rows_at_once(num_samples))

    def to_datatree(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int = 500,
        *,
        num_particles: int = 32,
        var_names: Iterable[str] | None = None,
        coords: Mapping[str, Any] | None = None,
        batch_axes: Any = 0,
    ) -> DataTree:
        """Return everything ArviZ reads, for every row.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.
            num_particles: local draws for each log-likelihood, see `log_evidence`.
            var_names: the latent sites to return; by default all.
            coords: coordinates by dimension.
            batch_axes: as for `fit`.

        Returns:
            The groups ``posterior``; ``posterior_predictive``, the observed sites drawn anew;
            ``log_likelihood``, marginal over the local sites, a value for each draw of the global
            ones; ``sample_stats`` with the importance weights of the posterior's draws;
            ``observed_data``; and ``constant_data``, the model's other data. A guide without a
            density, of points, has neither log-likelihood nor weights.
        """
        rows = Rows.read(self.guide, self.static_kwargs, data, batch_axes)
        globals_ = self._globals(rng_key, rows, num_samples)
        local = self._local_names()
        known = (*local, *globals_, *self.guide.sites.deterministic)
        names = self._names(var_names, known)
        fn = partial(self._run, compiled.draws, rng_key, globals_, num_samples=num_samples)
        found = rows.collect(fn, self._rows_at_once(num_samples), row_axis=1)
        observed = rows.collect(partial(self._run, compiled.observed), ROWS)
        plates = (self.guide.plate.name, *self.guide.segments)
        of_globals = {name: np.asarray(x) for name, x in globals_.items()}
        if globals_:
            derive = partial(self._run, compiled.derive, rng_key, globals_)
            of_globals |= rows.once(partial(derive, names=self.guide.sites.derived(plates)))
        latent = found["posterior"] | of_globals
        likelihood = {}
        if self.guide.family.has_density:
            alone = len(observed) == 1 and not self.guide.segments
            likelihood[next(iter(observed)) if alone else "joint"] = self.log_evidence(
                rng_key, data, num_samples, num_particles=num_particles, batch_axes=batch_axes
            )
        groups = found | {
            "posterior": {name: latent[name] for name in names if name in latent},
            "log_likelihood": likelihood,
            "observed_data": observed,
            "constant_data": constant_data(self.guide.model, rows.data, observed),
        }
        by_row = {name for group in groups.values() for name in group} - set(of_globals)
        dims = rows_first(site_dims(self.guide.sites), by_row, plates)
        return build_datatree(groups, dims, coords)

    def _require_density(self) -> None:
        if not self.guide.family.has_density:
            raise ValueError(
                f"{type(self.guide.family).__name__} has no density, so there are no importance "
                "weights, evidence, divergences or checks of it. Use AutoAmortizedNormal for these."
            )

    def _local_names(self) -> tuple[str, ...]:
        """Return the latent sites of the local plate, those that are enumerated too."""
        discrete = self.guide.sites.enumerated(self.guide.plate.name)
        return tuple(site.name for site in (*self.guide.local_sites, *discrete))

    def _globals(self, rng_key: Array, rows: Rows, num_samples: int) -> dict[str, Array]:
        """Draw the global sites, one set for all rows."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1.")
        key = jax.random.fold_in(rng_key, 2**32 - 1)  # of no row
        return self.guide.sample_globals(key, self.params, (num_samples,), rows.args, rows.kwargs)

    def _names(self, var_names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
        names = list(known if var_names is None else var_names)
        missing = sorted(set(names) - set(known))
        if missing:
            raise ValueError(f"There are no sites {missing} here, choose from {sorted(known)}.")
        return names

    def _rows_at_once(self, num_samples: int) -> int:
        size = sum(site.datum_size(self.guide.plate) for site in self.guide.local_sites)
        return int(np.clip(DRAWS // (num_samples * max(size, 1)), 1, ROWS))

    def _run(
        self, fn: Callable[..., Any], *arguments: Any, layout: Any, subsamples: bool, **static: Any
    ) -> Any:
        """Call a function of a `View` on the last two arguments, arrays and indices, compiled."""
        *dynamic, arrays, indices = arguments

        def on_view(params: dict, arrays: tuple, indices: Array, *dynamic: Any, **kw: Any) -> Any:
            names = {"layout": kw.pop("layout"), "subsamples": kw.pop("subsamples")}
            view = View.build(
                self.guide, params, arrays, indices, static_kwargs=self.static_kwargs, **names
            )
            return fn(view, *dynamic, **kw)

        static |= {"layout": layout, "subsamples": subsamples}
        if fn not in self._compiled:
            self._compiled[fn] = jax.jit(on_view, static_argnames=tuple(static))
        return self._compiled[fn](self.params, arrays, indices, *dynamic, **static)
