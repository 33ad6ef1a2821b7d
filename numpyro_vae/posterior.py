"""A trained posterior for any rows of data: encode, sample, weigh, predict, in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from numpyro_vae.checks.choose import Checks
from numpyro_vae.checks.report import Report
from numpyro_vae.checks.run import run_checks
from numpyro_vae.data.arguments import require_count
from numpyro_vae.data.devices import Devices
from numpyro_vae.inference import draws
from numpyro_vae.inference import quantities as compiled
from numpyro_vae.inference.make_datatree import make_datatree
from numpyro_vae.inference.predictable import predict
from numpyro_vae.inference.runner import Runner
from numpyro_vae.inference.seen import Seen
from numpyro_vae.inference.trained import require_trained, with_state
from numpyro_vae.repair.global_sites import GlobalRepair, repair_globals
from numpyro_vae.repair.result import Repair
from numpyro_vae.repair.run import run_repair
from numpyro_vae.saving.save import load_posterior, save_posterior
from numpyro_vae.serving.export import export_posterior

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["Posterior"]


OF_FIT: Any = object()  # stands for the fit's own, as None is a value of batch_axes


class Posterior:
    """The posterior that a trained guide gives for any rows of data.

    Every method takes data as `fit` does, runs in batches over rows and draws, keeps the rows in
    order, and moves results off the device batch by batch. All rows share one set of draws of the
    global sites. A row's draws depend on the key and on its number, not on the batches.

    Args:
        guide: the guide that was trained: an amortized one, an automatic guide of NumPyro's, or a
            function.
        params: what `fit` or ``svi.run`` returned, or its parameters.
        model: the model of a guide that is a function; other guides know theirs.
        plate: the local plate of a guide that is not amortized; by default the one that
            subsamples, else the only one that holds latent sites, else one with observations.
        segments: for such a guide, other plates that hold the observations of the local plate's
            data, as in `GuideOptions`.
        static_kwargs: keyword arguments of the model that are the same in every call; by default
            those of the fit.
        batch_axes: the datum axis of each argument, as for `fit`; by default those of the fit.
        natural_steps: that each row's Normal takes at most from what the network says, towards the
            row's largest ELBO and any covariance; see the page on training.
        mesh: the devices of a `jax.sharding.Mesh` of one axis, among which the rows of each batch
            are divided; results are those of one device. Of devices of several processes each
            uses its own, for its own rows.

    Raises:
        TypeError: if the guide is none, has no model, or the parameters are none.
        ValueError: at the first call, if rows are to take steps, and the guide says no Normals.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, optax
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

    def __init__(
        self,
        guide: Callable[..., Any],
        params: Any,
        *,
        model: Callable[..., Any] | None = None,
        plate: str | None = None,
        segments: Mapping[str, Callable[..., Any]] | None = None,
        static_kwargs: Mapping[str, Any] | None = None,
        batch_axes: Any = OF_FIT,
        natural_steps: int = 0,
        mesh: Mesh | None = None,
    ):
        trained = require_trained(guide, params, model, plate, segments)
        if static_kwargs is None:
            static_kwargs = getattr(params, "static_kwargs", {})
        if batch_axes is OF_FIT:
            batch_axes = getattr(params, "batch_axes", 0)
        self.guide, self.batch_axes = trained, batch_axes
        self.static_kwargs = dict(static_kwargs)
        self.params = with_state(params)
        self.natural_steps = require_count("natural_steps", natural_steps, least=0)
        known = (self.static_kwargs, batch_axes, Seen.of(params))
        devices = Devices.of(mesh).own
        self._runner = Runner(trained, self.params, *known, devices, self.natural_steps)

    save, load, export = save_posterior, classmethod(load_posterior), export_posterior

    def encode(self, data: Any) -> dict[str, draws.SiteEncoding]:
        """Return ``loc`` and ``scale`` of every local site's unconstrained values.

        Args:
            data: as for `fit`, any number of rows.

        Returns:
            By site name, ``(num_data, *datum_shape)``.
        """
        return draws.encode_sites(self._runner, data)

    def sample(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        var_names: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Draw every latent site, for every row.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.
            var_names: the sites to return; by default all latent ones.

        Returns:
            By site name, ``(num_samples, *batch_shape, *event_shape)``.

        Raises:
            ValueError: if ``num_samples`` is below 1 or a site does not exist.
        """
        return draws.sample_sites(self._runner, rng_key, data, num_samples, var_names)

    def predict(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        var_names: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Draw the observed sites from the posterior predictive of every row.

        The latents are those that `sample` draws with the same key, and observed sites that are of
        no row keep their values. Draws of the others depend on the batches. Where the model is
        given no observations, as in ``model(x, None)``, the latents are drawn from their prior,
        given the posterior of the globals.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.
            var_names: the sites to return; by default all observed ones that lie in the local
                plate, and the deterministic ones with a value for each of its rows. These are
                computed from the draws and the data, as in `numpyro.infer.Predictive`.

        Returns:
            By site name, ``(num_samples, num_data, ...)``, the plate's axis second.

        Raises:
            ValueError: if ``num_samples`` is below 1 or a site does not exist.
        """
        rows = self._runner.read(data, of_prior=True)
        names = draws.listed(var_names)
        found = predict(self._runner, rows, rng_key, num_samples, names)
        return {name: found[name] for name in draws.choose_names(names, found)}

    def log_weights(self, rng_key: Array, data: Any, num_samples: int) -> np.ndarray:
        r"""Return the log importance weight of every draw of every row.

        .. math:: \log w_i = \log p(x_i, z_i \mid g) - \log q(z_i \mid x_i)

        for the draws ``z`` and ``g`` (the global sites) that `sample` makes with the same key.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.

        Returns:
            An array of shape ``(num_samples, num_data)``.

        Raises:
            ValueError: if ``num_samples`` is below 1, or the guide has no density.
        """
        given = (self._runner, rng_key, data, num_samples)
        return draws.densities(compiled.weigh, *given)["log_weights"]

    def log_evidence(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        num_particles: int = 32,
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

        Returns:
            An array of shape ``(num_samples, num_data)``.
        """
        given = (self._runner, rng_key, data, num_samples)
        return draws.densities(compiled.evidence, *given, particles=num_particles)["log_evidence"]

    def probabilities(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int,
        *,
        num_particles: int = 32,
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

        Returns:
            By site name, ``(num_data, *datum_shape, number of values)``.

        Raises:
            ValueError: if no site of the local plate is enumerated.
        """
        sizes = {"num_samples": num_samples, "particles": num_particles}
        return draws.site_probabilities(self._runner, rng_key, data, **sizes)

    def check(
        self,
        rng_key: Array,
        data: Any,
        checks: Checks = None,
        *,
        progress_bar: bool = True,
        coords: Mapping[str, Any] | None = None,
        store: str | os.PathLike[str] | None = None,
    ) -> Report:
        """Check the posterior of every row, without a refit; see the page on checks.

        The importance check gives each row a verdict on its local posterior, given draws of the
        global latents: *fine* if its draws are usable as they are, *reweight* if they are usable
        with their importance weights, *borderline*, or *not to be trusted*. The report's
        ``flagged`` are all rows that are not fine. The globals check is of all data together.

        Args:
            rng_key: the random key. What a check computes does not depend on the other checks.
            data: as for `fit`, any number of rows; for the globals check those of the fit.
            checks: which to run: names, of ``importance``, ``gap``, ``calibration``, ``collapse``,
                ``novelty``, ``predictive`` and ``globals``, or objects with options, such as `Gap`;
                one or several. By default the quick ones, ``importance``, ``collapse`` and
                ``predictive``; ``"all"`` runs all that apply, and says why others do not.
            progress_bar: whether to show one, with the check that runs.
            coords: coordinates by dimension, as ArviZ takes them; by default those of pandas and
                xarray data.
            store: a path at which what is computed is written as Zarr, part by part, and from where
                the report reads it. A run that was killed goes on where it stopped.

        Raises:
            ValueError: if a check is unknown, is there twice, or was asked for and does not apply;
                if there is none; if ``coords`` names no dimension; no row has finite weights; or at
                ``store`` there is something else than these results.
        """
        options: dict[str, Any] = {"progress_bar": progress_bar, "coords": coords, "store": store}
        return run_checks(self._runner, rng_key, data, checks, **options)

    def repair(
        self,
        rng_key: Array,
        data: Any,
        rows: Any,
        *,
        method: str = "auto",
        num_samples: int = 500,
    ) -> Repair:
        """Replace the guide's draws of some rows by better ones.

        ``"importance"`` weighs draws of the guide, and a few of the prior, and resamples them;
        ``"refine"`` does so after it has optimized the rows' own variational parameters; ``"nuts"``
        runs four chains of each row. ``"auto"`` tries them in this order on the rows that have not
        passed yet. Rows that no method repairs, such as those whose data the model gives no
        density, are named in `Repair.remaining`.

        Global latents are held at 32 draws of their guide, among which the draws of a row are
        divided evenly. So the row's data do not update the globals a second time.

        Args:
            rng_key: the random key.
            data: as for `fit`.
            rows: the numbers of the rows, a boolean for each row, or a `Report` on these data, of
                which the flagged rows are taken.
            method: ``"auto"``, ``"importance"``, ``"refine"`` or ``"nuts"``.
            num_samples: draws of each row.

        Raises:
            ValueError: if a row does not exist, the report is on other data, the method is unknown,
                or the guide has no density.
        """
        return run_repair(self._runner, rng_key, data, rows, method, num_samples)

    def repair_globals(
        self, rng_key: Array, data: Any, *, method: str = "auto", num_samples: int = 500
    ) -> GlobalRepair:
        """Draw the global latents anew, given all data; see the page on repair.

        Args:
            rng_key: the random key.
            data: as for `fit`, all that the posterior of the global latents is given.
            method: ``"importance"``, ``"nuts"``, or ``"auto"``, which is the second if the weights
                of the first cannot be trusted.
            num_samples: draws to return.

        Raises:
            ValueError: if there are no global latents, the method is unknown, or the model gives
                some row no density, whatever they are.
        """
        return repair_globals(self._runner, rng_key, data, method, num_samples)

    def to_datatree(
        self,
        rng_key: Array,
        data: Any,
        num_samples: int = 500,
        *,
        num_particles: int = 32,
        marginal: bool = False,
        groups: Iterable[str] | None = None,
        var_names: Iterable[str] | None = None,
        coords: Mapping[str, Any] | None = None,
        store: str | os.PathLike[str] | None = None,
    ) -> DataTree:
        """Return everything ArviZ reads, for every row.

        Args:
            rng_key: the random key.
            data: as for `fit`, any number of rows.
            num_samples: draws of each row.
            num_particles: local draws for each log-likelihood, see `log_evidence`.
            marginal: whether ``posterior_predictive`` is of new data, with local latents drawn
                from their prior, which goes with the log-likelihood in `arviz.plot_loo_pit`.
            groups: the groups to return, of those below; by default all. Without
                ``posterior_predictive`` nothing is predicted.
            var_names: the latent sites to return; by default all.
            coords: coordinates by dimension; by default those of pandas and xarray data.
            store: a path at which the tree is written as Zarr, part by part, so that it may be
                larger than memory. A run that was killed goes on where it stopped.

        Raises:
            ValueError: if a group, a site or a dimension of ``coords`` does not exist, or a site
                has the name of a dimension; or if at ``store`` there is something else than this
                tree.

        Returns:
            The groups ``posterior``; ``posterior_predictive``, draws of the observed sites;
            ``log_likelihood``, marginal over the local sites, a value for each draw of the global
            ones; ``sample_stats`` with the importance weights of the posterior's draws, or, of a
            guide that draws all rows jointly, ``log_p`` and ``log_q`` of each draw;
            ``observed_data``; and ``constant_data``, the model's other data with rows. A guide
            without a density, of points, has neither log-likelihood nor weights. The slash in the
            name of a site in a ``numpyro.handlers.scope`` becomes a point.
        """
        given = (self._runner, rng_key, data, num_samples, num_particles)
        return make_datatree(*given, marginal, groups, var_names, coords, store=store)
