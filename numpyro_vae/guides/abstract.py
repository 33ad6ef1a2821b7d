"""What is asked of any trained guide, and of what it says of a batch of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped
from numpyro.distributions import biject_to

from numpyro_vae.data.batch import Batch
from numpyro_vae.data.shapes import Shapes
from numpyro_vae.model.captured import captured
from numpyro_vae.model.plan import GuidePlan
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.run import Run
from numpyro_vae.model.sites import ModelSites, Plate, Site, choose_plate
from numpyro_vae.model.stacked import peeled
from numpyro_vae.model.trace import Rows, is_real
from numpyro_vae.numpyro_internals import HANDLERS


@dataclass(frozen=True)
class AbstractEncoding(ABC):
    """What any guide says of a batch of data.

    Latents are **packed**: the unconstrained values of all local sites of a datum side by side.

    Attributes:
        run: the run of the model that was read.
        has_features: whether it is made of features, in which rows differ, and of which their own
            variational parameters can be made.
    """

    run: Run
    has_features: ClassVar[bool] = False

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """The local sites as they are in this batch, in packing order."""

    @abstractmethod
    def condition(self, values: Mapping[str, Array]) -> AbstractEncoding:
        """Return the encoding given values of the global sites.

        Args:
            values: by site name; any number of leading axes of draws, and sites that nothing
                reads are ignored.
        """

    @abstractmethod
    def sample(
        self, row_keys: Shaped[Array, "batch *key"], num_samples: int
    ) -> Float[Array, "num_samples batch size"]:
        """Draw packed latents, each row from its own key.

        If global sites were given with an axis of draws, it is that of these draws.
        """

    @abstractmethod
    def sample_evenly(
        self, row_keys: Shaped[Array, "batch *key"], num_samples: int
    ) -> Float[Array, "num_samples batch size"]:
        """Draw as `sample` does, spread evenly if that can be; global sites have no draws."""

    @property
    @abstractmethod
    def is_factorized(self) -> bool:
        """Whether latents are drawn one by one, given those that are drawn before."""

    @property
    @abstractmethod
    def reads_globals(self) -> bool:
        """Whether it depends on the values of global sites."""

    @abstractmethod
    def log_prob(self, packed: Float[Array, "*lead batch size"]) -> Float[Array, "*lead batch"]:
        """Return the log-density of each datum's packed latents; what is masked does not count."""

    @abstractmethod
    def log_prob_of(
        self, name: str, packed: Float[Array, "*lead batch size"]
    ) -> Float[Array, "*lead batch"]:
        """Return the log-density of each datum's latents of one site, whatever its others are.

        That is of the sites that it is drawn with, given those that are drawn before.

        Args:
            name: of the site.
            packed: the latents of all sites.

        Raises:
            ValueError: if it is not known in closed form.
        """

    @abstractmethod
    def marginal(
        self, fn: Callable[[Any], Array], packed: Float[Array, "batch size"] | None = None
    ) -> Float[Array, "batch size"]:
        """Return a function of the distribution of every packed latent by itself.

        Args:
            fn: from distributions to an array of the same batch shape, such as their mean.
            packed: a draw, for sites that read other local sites; the distribution of a latent is
                then given those.

        Raises:
            ValueError: if that distribution is not known in closed form.
        """

    @abstractmethod
    def has_marginals(self, packed: Float[Array, "batch size"] | None = None) -> bool:
        """Return whether `marginal` knows the distribution of every latent."""

    @abstractmethod
    def unpack(self, packed: Float[Array, "*lead batch size"]) -> Iterator[tuple[Site, Array]]:
        """Yield each site with its unconstrained value, ``(*lead, *batch_shape, ...)``."""

    @abstractmethod
    def pack_rows(self, rows: Mapping[str, Shaped[Array, "batch k"]]) -> Shaped[Array, "batch n"]:
        """Pack what each datum has of the sites, ``(batch, datum_size)`` each."""

    @property
    def mask(self) -> Bool[Array, "batch size"] | None:
        """Which packed latents count; None if all do."""
        if all(self.run.mask(site) is None for site in self.sites):
            return None
        return self.pack_rows({site.name: self.rows_of_mask(site) for site in self.sites})

    def rows_of_mask(self, site: Site) -> Bool[Array, "batch datum_size"]:
        """Return which unconstrained values of a site count, flat."""
        shape = site.batch_shape + site.unconstrained_shape
        mask = self.run.mask(site)
        mask = jnp.asarray(True if mask is None else mask)
        mask = mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
        return site.flat_rows(jnp.broadcast_to(mask, shape), self.run.plate)

    def pack(self, values: Mapping[str, Array]) -> Float[Array, "batch size"]:
        """Return the sites' values, which lie on their supports, as packed latents."""
        parts = {}
        for site in self.sites:
            unconstrained = biject_to(self.run.support(site)).inv(values[site.name])
            parts[site.name] = site.flat_rows(unconstrained, self.run.plate)
        return self.pack_rows(parts)

    def constrain(
        self, packed: Float[Array, "*lead batch size"]
    ) -> tuple[dict[str, Array], Float[Array, "*lead batch"]]:
        """Map packed latents to the sites' supports.

        Returns:
            The values by site name, and the log-determinant of the map for each datum, so that
            ``log q(values) = log q(packed) - log_det``.
        """
        values, log_det = {}, jnp.zeros(packed.shape[:-1], packed.dtype)
        lead = packed.ndim - 2
        for site, unconstrained in self.unpack(packed):
            transform = biject_to(peeled(self.run.support(site))[0])
            values[site.name] = transform(unconstrained)
            log_dets = transform.log_abs_det_jacobian(unconstrained, values[site.name])
            mask = self.run.mask(site)
            if mask is not None and not is_real(self.run.support(site)):
                missing = log_dets.ndim - lead - mask.ndim
                log_dets = jnp.where(mask.reshape(mask.shape + (1,) * missing), log_dets, 0.0)
            rows = jnp.moveaxis(log_dets, lead + site.axis(self.run.plate), lead)
            log_det += rows.sum(tuple(range(lead + 1, rows.ndim)))
        return values, log_det


class AbstractGuide(ABC):
    """What is asked of a trained guide after training.

    Attributes:
        model: the model.
        reader: of the model.
        plate_name: the local plate's name, if the user gave one.
        segments: by other plate that holds the data's observations, whom its rows belong to.
        plan: the model as the guide divides it; None before it has read its model.
        argument_shapes: of the model's arguments, as they were then.
        compiled: what was compiled for this guide.
        functions: those of the user that it runs.
        held: what they read beside their arguments, when that was compiled.
    """

    model: Callable[..., Any]
    reader: ModelReader
    plate_name: str | None
    segments: dict[str, Callable[..., Any]]
    plan: GuidePlan | None
    argument_shapes: Shapes
    compiled: dict[Any, Callable[..., Any]]
    functions: tuple[Any, ...]
    held: tuple[Any, ...] | None = None

    def renew(self) -> None:
        """Forget what was compiled, if a function reads other values, as of globals, than then."""
        held = captured(*self.functions)
        if held == self.held:
            return
        with HANDLERS:
            if self.held is not None:
                self.reader, self.compiled = ModelReader(self.model), {}
            self.held = held

    @property
    @abstractmethod
    def no_density(self) -> str:
        """Why rows have no importance weights of it; empty if they have."""

    @property
    def has_density(self) -> bool:
        """Whether rows have importance weights of it."""
        return not self.no_density

    def choose_plate(self, sites: ModelSites) -> Plate:
        """Return the local plate of a model that has not been read."""
        return choose_plate(sites, self.plate_name)

    @property
    def not_amortized(self) -> str:
        """Why the guide says nothing of other rows than those of its training; empty if it does."""
        return ""

    def needs_all_rows(
        self, params: dict[str, Any], first: Callable[[], Batch], static_kwargs: dict[str, Any]
    ) -> bool:
        """Return whether the guide can only be run on all rows at once.

        Args:
            params: as in `encode_batch`, as the next one.
            first: returns a batch of the first row, which may take a reading of the model.
            static_kwargs: keyword arguments of the model that never change.
        """
        return False

    @abstractmethod
    def read_model(self, args: tuple, kwargs: dict[str, Any], rows: Rows) -> None:
        """Read the model with plates that hold given rows, unless it has been read.

        Args:
            args: the model's arguments.
            kwargs: its keyword arguments.
            rows: by plate its size and the rows that it is told to hold.
        """

    @abstractmethod
    def encode_batch(
        self, params: dict[str, Any], batch: Batch, static_kwargs: dict[str, Any]
    ) -> AbstractEncoding:
        """Return what the guide says of a batch of rows.

        Args:
            params: trained parameters, with the networks' state among them.
            batch: the rows.
            static_kwargs: keyword arguments of the model that never change.
        """

    @abstractmethod
    def set_up_globals(
        self, params: dict[str, Any], args: tuple, kwargs: dict[str, Any], rows: Rows
    ) -> None:
        """Let the guide of global sites read the model, as it may not in compiled code."""

    @abstractmethod
    def sample_globals(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> dict[str, Array]:
        """Draw the global sites, ``sample_shape`` in front, given the data of all rows."""

    @abstractmethod
    def draw_globals(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, Array], Array]:
        """Draw the global sites, each draw with its log-density.

        Returns:
            By site name ``(*sample_shape, *batch_shape, *event_shape)``, and the log-densities
            ``sample_shape``, on the scale of the model's sites.

        Raises:
            NoDensityError: if the guide of a global site has no density, as a point has none.
        """

    @abstractmethod
    def given_median(
        self,
        encoding: Any,
        params: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> AbstractEncoding:
        """Return an encoding given the medians of the global sites that it depends on.

        Raises:
            ValueError: if it depends on any, and these have no median.
        """

    @property
    def known(self) -> GuidePlan:
        """The plan of a guide that has read its model."""
        if self.plan is None:
            raise AttributeError("The guide has not read its model yet: call it with data.")
        return self.plan

    @property
    def sites(self) -> ModelSites:
        """All that the model holds."""
        return self.known.sites

    @property
    def plate(self) -> Plate:
        """The local plate."""
        return self.known.plate

    @property
    def local_sites(self) -> tuple[Site, ...]:
        """The latent sites in it that the guide serves."""
        return self.known.local

    @property
    def global_names(self) -> tuple[str, ...]:
        """The names of all other latent sites."""
        return self.known.globals

    def is_unobserved(self, sites: ModelSites) -> bool:
        """Return whether a model holds none of the observations that belong to the plate's data."""
        plate = self.plate.name
        return not self.segments and bool(self.sites.observed(plate) and not sites.observed(plate))
