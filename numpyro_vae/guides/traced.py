"""Any guide of NumPyro's, or one written by hand, as a guide of the data's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide

from numpyro_vae.data.batch import Batch
from numpyro_vae.data.shapes import argument_shapes
from numpyro_vae.families import DiagonalNormal
from numpyro_vae.guides.abstract import AbstractEncoding, AbstractGuide
from numpyro_vae.guides.division import require_same_rows, require_sites, why_joint
from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.guides.forms import traceable
from numpyro_vae.guides.global_sites import drawn_with_density
from numpyro_vae.guides.normal_form import normal_encoding
from numpyro_vae.guides.reading import (
    DATA,
    GuideReading,
    MissingParamsError,
    read_guide,
    trace_guide,
)
from numpyro_vae.guides.traced_encoding import TracedEncoding
from numpyro_vae.model.enumeration import enumerated
from numpyro_vae.model.plan import GuidePlan, choose_any, plan_any
from numpyro_vae.model.plates import all_rows, observed_plates
from numpyro_vae.model.provenance import LOOKED_UP
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.run import Run, run_model
from numpyro_vae.model.sites import ModelSites, Plate, Site
from numpyro_vae.model.trace import Rows
from numpyro_vae.numpyro_internals import set_up


class TracedGuide(AbstractGuide):
    """A guide that is known by its traces alone.

    Args:
        guide: the guide.
        model: its model.
        params: the trained parameters, with the networks' state.
        plate: the local plate's name; by default it is chosen as for an amortized guide.
        segments: other plates that hold the data's observations.

    Attributes:
        reading: what the guide holds.
        joint: why rows have no posteriors of their own; empty if they have.
        knows_rows: whether the guide has something for each row of the data.
    """

    def __init__(
        self,
        guide: Callable[..., Any],
        model: Callable[..., Any],
        params: dict[str, Any],
        plate: str | None = None,
        segments: Mapping[str, Callable[..., Any]] | None = None,
    ):
        self.guide, self.params, self.plate_name = guide, params, plate
        self.model = observed_plates(enumerated(model, plate))
        self.segments = dict(segments or {})
        own = () if isinstance(guide, AutoGuide) else (guide,)
        self.functions = (self.model, *own, *self.segments.values())
        self.reader = ModelReader(self.model)
        self.plan: GuidePlan | None = None
        self.argument_shapes = {}
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.reading = GuideReading({}, {}, {})
        self.joint, self.knows_rows = "", False

    @property
    def no_density(self) -> str:
        """Why there are no importance weights of it; empty if there are."""
        if self.plan is None:
            return ""
        points = [site.name for site in self.local_sites if self.reading.is_point(site.name)]
        if points:
            return (
                f"The guide is a point at the local sites {points}, which has no density, so there "
                "are no importance weights, evidence, divergences, checks or repairs of it. Use "
                "AutoNormal, or an amortized guide, for these."
            )
        return self.joint

    def choose_plate(self, sites: ModelSites) -> Plate:
        """Return the local plate of a model that has not been read."""
        return choose_any(sites, self.plate_name)

    @property
    def not_amortized(self) -> str:
        """Why the guide says nothing of other rows than those of its training; empty if it does."""
        if not (self.knows_rows or self.joint):
            return ""
        return "the guide has parameters for each row that it was trained with, and is of no others"

    def read_model(self, args: tuple, kwargs: dict[str, Any], rows: Rows) -> None:
        """Read model and guide, the guide anew for each data, as it may know their number."""
        if isinstance(self.guide, AutoGuide):
            set_up(self.guide, self.params, args, kwargs)
        sites = self.reader.sites(args, kwargs, rows)
        plan = self.plan or plan_any(self.reader, args, kwargs, rows, self.plate_name)
        size = sites.plates.get(plan.plate.name, plan.plate).size
        self.reading = self._read(plan.plate.name, size, args, kwargs)
        self.argument_shapes = argument_shapes(args, kwargs)
        require_sites(self.reading, plan)
        self.knows_rows = self._knows_rows(plan, size)
        self.plan = self.plan or self._divide(plan)
        if self.joint:
            require_same_rows(self.reading, sites, plan.plate)

    def _divide(self, plan: GuidePlan) -> GuidePlan:
        """Return the plan with the sites that the guide draws row by row as the local ones."""
        self.joint = why_joint(self.reading, plan)
        if self.joint:
            latent = tuple(site.name for site in plan.sites.latent())
            return replace(plan, local=(), globals=latent)
        return plan

    def _read(self, plate: str, size: int, args: tuple, kwargs: dict[str, Any]) -> GuideReading:
        """Read the guide with the rows of its own plate, or if it does not run, with all."""
        read = partial(read_guide, traceable(self.guide, self.params), self.params, args, kwargs)
        try:
            return read({})
        except MissingParamsError:
            raise
        except Exception:  # of any kind, as the guide's own code raises it
            try:
                return read({plate: (size, jnp.arange(size))})
            except Exception as error:
                raise ValueError(
                    f"The guide does not run on the {size} rows of these data: {error} If it has "
                    f"parameters for each row of plate {plate!r}, pass the rows that it was "
                    "trained with; an amortized guide takes any."
                ) from error

    def _knows_rows(self, plan: GuidePlan, size: int) -> bool:
        """Return whether the guide has something for each row, and does not read it off the data.

        Raises:
            ValueError: if it has so of another number of rows, as JAX takes an index that is too
                large for the last.
        """
        plate, shapes = plan.plate.name, self.reading.params
        reads = frozenset().union(*(self.reading.origins(site.name) for site in plan.local))
        looked_up = {name: shapes[name] for name in shapes if LOOKED_UP + name in reads}
        sized = any(size in shapes[name] for name in reads & {*shapes})
        if DATA in reads and not (looked_up or sized):
            return False
        declared = self.reading.plates.get(plate, size)
        if declared != size or not all(size in shape for shape in looked_up.values()):
            found = f", in which it looks up rows of {looked_up}" if looked_up else ""
            raise ValueError(
                "The guide knows the rows that it was trained with, and these data are others: "
                f"they have {size} in plate {plate!r}, and the guide {declared}{found}. Pass the "
                "rows of the training; an amortized guide takes any."
            )
        return True

    def needs_all_rows(
        self, params: dict[str, Any], first: Callable[[], Batch], static_kwargs: dict[str, Any]
    ) -> bool:
        """Return whether the guide can only be run on all rows at once."""
        if self.joint:
            return any(self.plate.name in site.plates for site in self.sites.latent())
        sizes = set()

        def run() -> None:  # a trace is no pytree of arrays
            trace = self._trace(params, first(), static_kwargs, {})
            shapes = (trace[site.name]["fn"].batch_shape for site in self.local_sites)
            sizes.update(shape[self.plate.dim] for shape in shapes)

        try:
            jax.eval_shape(run)
        except Exception:  # of any kind, as the guide's own code raises it
            return True
        return sizes != {1}

    def encode_batch(
        self, params: dict[str, Any], batch: Batch, static_kwargs: dict[str, Any]
    ) -> AbstractEncoding:
        """Return what the guide says of a batch of rows, as Normals if it is of these."""
        args, kwargs = batch.arguments()
        kwargs = {**kwargs, **static_kwargs}
        given = handlers.substitute(data=params)
        with handlers.block(), all_rows(rows=batch.rows), handlers.seed(rng_seed=0), given:
            run = run_model(self.reader, self.plate.name, self.segments, args, kwargs)
        sites = run.same_sites(self.local_sites)
        if not sites or self.is_unobserved(run.sites):
            return Encoding(run, {}, {}, DiagonalNormal())
        discrete = self._discrete(run)
        read = {site.name for site in (*self.sites.latent(), *discrete)}
        trace = partial(self._trace, params, static_kwargs=static_kwargs)
        if not any(self.reading.sites[site.name].reads & read for site in sites):
            found = normal_encoding(trace(batch), run, sites)
            if found is not None:
                return found
        known = self.reading.sites
        plates = {name: frozenset(site.plates) for name, site in known.items()}
        reads = {name: site.reads for name, site in known.items()}
        return TracedEncoding(
            run, trace, batch, sites, discrete=discrete, plates=plates, reads=reads
        )

    def _discrete(self, run: Run) -> tuple[Site, ...]:
        """Return the discrete sites of the local plate that the guide draws and others read."""
        found = run.sites.enumerated(self.plate.name)
        read = frozenset().union(*(self.reading.origins(site.name) for site in self.local_sites))
        return tuple(site for site in found if site.name in read & self.reading.sites.keys())

    def _trace(
        self,
        params: dict[str, Any],
        batch: Batch,
        static_kwargs: dict[str, Any],
        values: Mapping[str, Any] | None = None,
        rng_key: Array | None = None,
    ) -> dict[str, Any]:
        """Return the trace of the guide on a batch, with values for some of its sites."""
        if self.knows_rows:  # and looks them up among all
            args, kwargs = batch.layout.whole(batch.arrays)
            rows = {batch.plate: (batch.num_data, batch.indices)}
        else:
            (args, kwargs), rows = batch.arguments(), batch.rows
        return trace_guide(
            traceable(self.guide, params),
            {**params, **(values or {})},
            rows,
            jax.random.key(0) if rng_key is None else rng_key,
            args,
            {**kwargs, **static_kwargs},
        )

    def set_up_globals(
        self, params: dict[str, Any], args: tuple, kwargs: dict[str, Any], rows: Rows
    ) -> None:
        """Do nothing: an automatic guide was set up when the model was read."""

    def sample_globals(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> dict[str, Array]:
        """Draw the global sites, ``sample_shape`` in front, given the data of all rows."""
        if not self.global_names:
            return {}
        found = partial(_values, self.global_names)
        return self._draw_globals(found, rng_key, params, sample_shape, args, kwargs)

    def draw_globals(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, Array], Array]:
        """Draw the global sites as `sample_globals` does, each draw with its log-density."""
        if not self.global_names:
            return {}, jnp.zeros(sample_shape)
        local = tuple(site.name for site in self.local_sites)
        found = partial(drawn_with_density, names=self.global_names, guide=self.guide, others=local)
        return self._draw_globals(found, rng_key, params, sample_shape, args, kwargs)

    def _draw_globals(
        self,
        found: Callable[[dict[str, Any]], Any],
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """Return what is found in traces of the guide, ``sample_shape`` in front."""
        guide = traceable(self.guide, params)

        def one(key: Array) -> Any:
            return found(trace_guide(guide, params, {}, key, args, kwargs))

        keys = jax.random.split(rng_key, math.prod(sample_shape))
        draws = jax.lax.map(one, keys, batch_size=min(64, len(keys)))
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)

    def given_median(
        self,
        encoding: AbstractEncoding,
        params: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> AbstractEncoding:
        """Return the encoding, whose moments are those of sites that depend on no global ones."""
        return encoding


def _values(names: tuple[str, ...], trace: dict[str, Any]) -> dict[str, Array]:
    return {name: jnp.asarray(trace[name]["value"]) for name in names}
