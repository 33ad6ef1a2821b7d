"""The guide whose local posterior is read off each datum by a network, for any family."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoGuide, AutoNormal
from numpyro.primitives import Messenger

from numpyro_vae.data.batch import Batch
from numpyro_vae.data.shapes import Shapes, abstract, argument_shapes
from numpyro_vae.encoders import MLP
from numpyro_vae.families import AbstractFamily
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.guides.global_sites import GlobalGuide, require_maker
from numpyro_vae.guides.local_sites import sample_local
from numpyro_vae.guides.network import Encoder, Network, declare_network
from numpyro_vae.guides.options import as_names, require_functions
from numpyro_vae.model.covariates import WithCovariates
from numpyro_vae.model.data_sets import DataSets
from numpyro_vae.model.plan import GuidePlan, plan_guide
from numpyro_vae.model.plates import all_rows, given_rows, same_rows
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.run import Run, run_model
from numpyro_vae.model.sites import ModelSites, Site
from numpyro_vae.model.trace import Rows
from numpyro_vae.numpyro_internals import (
    is_set_up,
    is_training,
    plate_indices,
)

__all__ = ["AmortizedGuide"]


class AmortizedGuide(AutoGuide, AbstractGuide):
    """An amortized guide of any family; see its named forms, such as `AutoAmortizedNormal`.

    A network with state, such as batch statistics, is in training mode where an objective calls
    the guide, and in evaluation mode, with the state that training left, in `Predictive` and in
    all that takes ``params``: pass ``{**result.params, **result.state.mutable_state}`` after
    ``svi.run``. The state lives in the ``SVIState``, of which NumPyro's objectives lose it with
    ``num_particles`` above 1, and `numpyro.infer.SVI.evaluate` makes no use; `fit` keeps it.

    Args:
        model: a NumPyro model with latent sites in a plate.
        encoder: a network, or a builder of one; see `numpyro_vae.encoders.base`.
        family: the distribution over the latents of a datum, see `numpyro_vae.families.base`.
        inputs: see `GuideOptions`, also for the other options.
        plate: the local plate's name.
        segments: other plates that hold the data's observations.
        condition_on: global sites that the heads read.
        dependencies: local sites that the heads of other local sites read.
        global_guide: for the latent sites outside the local plate.
        create_plates: makes plates, as for every AutoGuide.
        prefix: of the guide's parameters.
    """

    reads_observations: ClassVar[bool] = True  # which most guides of global sites do not

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | None = None,
        *,
        family: AbstractFamily,
        inputs: Callable[..., Any] | None = None,
        plate: str | None = None,
        segments: Mapping[str, Callable[..., Any]] | None = None,
        condition_on: Sequence[str] = (),
        dependencies: Mapping[str, Sequence[str]] | None = None,
        global_guide: Callable[..., Any] = AutoNormal,
        create_plates: Callable[..., Any] | None = None,
        prefix: str = "auto",
    ):
        require_functions(model, inputs)
        super().__init__(model, prefix=prefix, create_plates=create_plates)
        if isinstance(model, DataSets):
            encoder = model.encoder if encoder is None else encoder
            inputs = model.inputs if inputs is None else inputs
        self.encoder = MLP if encoder is None else encoder
        self.family = family
        self.inputs = inputs
        self.plate_name = plate
        self.segments = dict(segments or {})
        self.functions = (model, self.encoder, inputs, *self.segments.values())
        self.condition_on = as_names(condition_on)
        self.dependencies = {name: as_names(read) for name, read in (dependencies or {}).items()}
        self.global_guide = require_maker(global_guide)
        self.argument_shapes: Shapes = {}
        self.arguments: Any = None  # of the model as it was read, shapes for arrays
        self.expects: Callable[[GuidePlan], None] | None = None  # of the model, if it was loaded
        self.training = True
        self.reader = ModelReader(model)
        self.plan: GuidePlan | None = None
        self.globals: GlobalGuide | None = None
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return all but what is compiled, which cannot be pickled."""
        return {**super().__getstate__(), "compiled": {}, "held": None}

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Read the model, once: nothing is computed, no likelihood evaluated, at any size.

        Args:
            args: the model's arguments.
            kwargs: its keyword arguments.

        Raises:
            ValueError: see the class.
        """
        self.read_model(args, kwargs, {})

    def read_model(self, args: tuple, kwargs: dict[str, Any], rows: Rows) -> None:
        """Read the model as `setup` does, with plates that hold given rows."""
        if is_set_up(self):
            return
        plan = self.plan_for(args, kwargs, rows)
        if self.expects is not None:
            self.expects(plan)
        self.adopt(plan, (args, kwargs, rows))

    def plan_for(self, args: tuple, kwargs: dict[str, Any], rows: Rows) -> GuidePlan:
        """Return the model as this guide divides it, and change nothing."""
        plan = plan_guide(
            self.reader,
            args,
            kwargs,
            rows,
            plate=self.plate_name,
            condition_on=self.condition_on,
            dependencies=self.dependencies,
        )
        if not self.family.is_factorized:
            plan.require_like_scales()
        return plan

    def adopt(self, plan: GuidePlan, arguments: tuple[tuple, dict[str, Any], Rows]) -> None:
        """Serve a model that has been read with these arguments."""
        if plan != self.plan:
            self.compiled = {}  # what was compiled for another model
        self.plan = plan
        self.globals = None
        if plan.globals:
            self.globals = GlobalGuide(self.global_guide, self.model, plan, self.prefix)
        self.arguments = abstract(arguments)
        self.argument_shapes = argument_shapes(*arguments[:2])
        self.prototype_trace = {
            name: {"name": name, "type": "sample", "is_observed": site.is_observed}
            for name, site in self.sites.sites.items()
        }

    def reset(self) -> None:
        """Forget the model as it was read; the next call reads it anew."""
        self.prototype_trace = None

    def eval(self) -> AmortizedGuide:
        """Return the guide in evaluation mode: dropout off, batch statistics frozen."""
        guide = copy.copy(self)
        guide.training = False
        return guide

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Sample every latent site, with the same arguments as the model.

        Returns:
            The values by site name.
        """
        rows = {} if self.plate_name is None else given_rows(self.plate_name)
        self.read_model(args, kwargs, rows)
        with same_rows():
            return self._sample(args, kwargs)

    def _sample(self, args: tuple, kwargs: dict) -> dict[str, Array]:
        """Sample the global sites before the local ones if they are read, or the model's first."""
        latent = self.sites.latent()
        first = self.condition_on or (latent and latent[0].name in self.global_names)
        values = self._sample_globals(args, kwargs) if first else {}
        encoding = self._encode(args, kwargs).condition(values)
        values |= dict(sample_local(encoding, self.prefix))
        return values if first else values | self._sample_globals(args, kwargs)

    def _sample_globals(self, args: tuple, kwargs: dict) -> dict[str, Array]:
        if self.globals is None:
            return {}
        rows = given_rows(self.plate.name)
        scales = self.reader.read(args, kwargs, rows).scales if self.globals.is_scaled else {}
        return self.globals(args, kwargs, rows, scales)

    def _run(self, args: tuple, kwargs: dict) -> Run:
        """Run the model with the plates of ``create_plates``, if there are any."""
        made = self._create_plates(*args, **kwargs) if self.create_plates is not None else {}
        given = {name: plate_indices(plate) for name, plate in made.items()}
        with handlers.substitute(data=given):
            return run_model(self.reader, self.plate.name, self.segments, args, kwargs)

    def _encode(self, args: tuple, kwargs: dict, given: dict[str, Any] | None = None) -> Encoding:
        """Encode the rows of a run, with parameters from the enclosing handlers.

        ``given`` are these parameters where they are the user's, to be checked.
        """
        run = self._run(args, kwargs)
        sites = run.same_sites(self.local_sites)
        if not sites or (given is not None and self.is_unobserved(run.sites)):
            return Encoding(run, {}, {}, self.family)
        network, inputs = self._network(run, sites), run.inputs(self.inputs)
        structure = network.structure(inputs)  # for which the user's code builds the encoder
        if given is not None:
            network.check_params(given, self.prefix, structure)
        train = self.training and is_training()
        applied, features = declare_network(network, structure, self.prefix, inputs, train=train)
        return Encoding(run, features, applied.in_order(), self.family)

    def is_unobserved(self, sites: ModelSites) -> bool:
        """Return whether a model holds none of the observations that the network reads."""
        return isinstance(self.inputs, WithCovariates | None) and super().is_unobserved(sites)

    def _network(self, run: Run, sites: tuple[Site, ...]) -> Network:
        """Return the network that serves the sites as they are in a run."""
        read = {site.name: self.dependencies.get(site.name, ()) for site in sites}
        run.require_whole({*self.condition_on}.union(*read.values()), "Site, which heads read,")
        sizes = {name: run.sites.sites[name].size for name in self.condition_on}
        local = {site.name: site.datum_size(run.plate) for site in sites}
        reads = {name: sizes | {one: local[one] for one in read[name]} for name in local}
        return Network(self.encoder, self.family, sites, run.plate, reads)

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
        self, rows: Messenger, params: dict[str, Any] | None, args: tuple, kwargs: dict[str, Any]
    ) -> Encoding:
        """Encode the rows that a handler of `numpyro_vae.model.plates` lets the plates hold."""
        self.setup(*args, **kwargs)
        given = handlers.substitute(data=params or {})
        with handlers.block(), rows, handlers.seed(rng_seed=0), given:
            return self.eval()._encode(args, kwargs, params)

    def encode_batch(
        self, params: dict[str, Any] | None, batch: Batch, static_kwargs: dict[str, Any]
    ) -> Encoding:
        """Encode a batch of rows, with untrained parameters where there are none."""
        args, kwargs = batch.arguments()
        rows = all_rows(rows=batch.rows)
        return self.encode_rows(rows, params, args, {**kwargs, **static_kwargs})

    @property
    def no_density(self) -> str:
        """Why rows have no importance weights of it; empty if they have."""
        if self.family.has_density:
            return ""
        return (
            f"{type(self.family).__name__} has no density, so there are no importance "
            "weights, evidence, divergences, checks or repairs of it. Use AutoAmortizedNormal "
            "for these."
        )

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
        count = math.prod(sample_shape)
        draws = self.sample_globals(global_key, params, (count,), args, kwargs)
        encoding = self.encode(params, *args, **kwargs).condition(draws)
        row_keys = jax.random.split(local_key, encoding.run.plate.length)
        draws |= encoding.constrain(encoding.sample(row_keys, count))[0]
        draws = jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)
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
        return self.globals.sample(rng_key, params, sample_shape, args, kwargs)

    def draw_globals(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, Array], Array]:
        """Draw the global sites, each with its log-density; not the draws of `sample_globals`."""
        if self.globals is None:
            return {}, jnp.zeros(sample_shape)
        return self.globals.draw(rng_key, params, sample_shape, args, kwargs)

    def median(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Return the posterior median of each latent site for every row of the arguments."""
        return jax.tree.map(lambda x: x[0], self.quantiles(params, [0.5], *args, **kwargs))

    def quantiles(
        self, params: dict[str, Any], quantiles: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """Return posterior quantiles of each latent site, a leading axis for ``quantiles``.

        They are quantiles of the unconstrained values, mapped to the site's support; where heads
        read global sites, given the medians of these.

        Args:
            params: trained parameters.
            quantiles: between 0 and 1.
            args: the model's arguments.
            kwargs: the model's keyword arguments.

        Raises:
            ValueError: if the family has no closed-form quantiles.
        """
        quantiles = jnp.atleast_1d(jnp.asarray(quantiles))
        encoding = self.encode(params, *args, **kwargs)
        encoding = self.given_median(encoding, params, args, kwargs)
        icdf = partial(_quantile, encoding)
        values, _ = encoding.constrain(jax.vmap(icdf)(quantiles))
        if self.globals is not None and self.globals.is_auto:
            values |= self.globals.quantiles(params, quantiles, args, kwargs)
        return values

    def set_up_globals(
        self, params: dict[str, Any], args: tuple, kwargs: dict[str, Any], rows: Rows
    ) -> None:
        """Let the guide of global sites read the model, as it may not in compiled code."""
        if self.globals is not None:
            self.globals.set_up(params, args, kwargs, rows)

    def given_median(
        self, encoding: Encoding, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]
    ) -> Encoding:
        """Return an encoding given the medians of the global sites that the heads read.

        Raises:
            ValueError: if they read any, and the guide of these has no median.
        """
        if self.globals is None or not self.condition_on:
            return encoding
        if not self.globals.is_auto:
            raise ValueError(
                f"The heads read the global sites {list(self.condition_on)}, and their guide was "
                "written by hand and has no median. Sample from the posterior instead."
            )
        found = self.globals.median(params, args, kwargs)
        return encoding.condition({name: found[name] for name in self.condition_on})


def _quantile(encoding: Encoding, quantile: Array) -> Array:
    return encoding.marginal(lambda fn: fn.icdf(jnp.broadcast_to(quantile, fn.batch_shape)))
