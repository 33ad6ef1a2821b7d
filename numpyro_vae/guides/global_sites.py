"""The guide of the latent sites outside the local plate: any guide of NumPyro's, or one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoContinuous, AutoGuide
from numpyro.primitives import Messenger

from numpyro_vae.model.densities import log_prob_of, trace_rows
from numpyro_vae.model.plan import GuidePlan
from numpyro_vae.model.plates import all_rows
from numpyro_vae.model.trace import Rows, hold_rows, is_point, own_trace
from numpyro_vae.numpyro_internals import draw_improper, set_up


class scale_sites(Messenger):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """Scale the sites of a guide as those of the model are scaled.

    An auxiliary site, of which several are made, is scaled as the first of them.

    Args:
        scales: by site its factor, where it has one.
        names: of the sites that the guide is of.
    """

    def __init__(self, scales: Mapping[str, Any], names: tuple[str, ...]):
        self.scales = {name: handlers.scale(scale=scales[name]) for name in names if name in scales}
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        """Scale a site."""
        if msg["type"] != "sample" or not self.scales:
            return
        first = next(iter(self.scales.values()))
        auxiliary = msg["infer"].get("is_auxiliary")
        handler = first if auxiliary else self.scales.get(msg["name"])
        if handler is not None:
            handler.process_message(msg)


def require_maker(global_guide: Any) -> Callable[..., Any]:
    """Return what makes a guide of a model.

    Raises:
        TypeError: if it is a guide already, of a model that it has, or cannot be called.
    """
    if isinstance(global_guide, AutoGuide) or not callable(global_guide):
        name = type(global_guide).__name__
        raise TypeError(
            f"global_guide= is an object of type {name}, expected an AutoGuide class, or a callable"
            " from a model to a guide. Pass AutoNormal itself, or with options "
            "functools.partial(AutoNormal, init_scale=0.01)."
        )
    return global_guide


class NoDensityError(ValueError):
    """A guide of global sites has no density, so that its draws cannot be weighed."""


def drawn_with_density(
    trace: Mapping[str, Any], names: tuple[str, ...], guide: Any, others: tuple[str, ...] = ()
) -> tuple[dict[str, Array], Array]:
    """Return the values of sites in the trace of a guide, and their log-density.

    Sites may be functions of auxiliary ones: the density is that of the whole trace.

    Args:
        trace: of the guide.
        names: the sites.
        guide: the guide, for what an error says.
        others: sites that do not count.

    Raises:
        NoDensityError: if a site has a point for its distribution, and no auxiliary site.
    """
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    random = [name for name, site in sites.items() if not is_point(site["fn"])]
    auxiliary = any(sites[name]["infer"].get("is_auxiliary") for name in random)
    points = [name for name in names if not auxiliary and name not in random]
    if points:
        name = getattr(guide, "__name__", type(guide).__name__)
        raise NoDensityError(
            f"The guide of the global sites {points} is {name}, a point without a density. Train "
            "with global_guide=AutoNormal or AutoMultivariateNormal, or draw them from a "
            "distribution in a guide of your own."
        )
    terms = [log_prob_of(site).sum() for name, site in sites.items() if name not in others]
    return {name: trace[name]["value"] for name in names}, jnp.stack(terms).sum()


class GlobalGuide:
    """A guide of global sites, and what is asked of it.

    Args:
        make: an AutoGuide class, or a callable from a model to a guide.
        model: the whole model.
        plan: what of it is global.
        prefix: of the local guide's parameters.

    Raises:
        ValueError: if its parameters would have the names of the local guide's, or it is a joint
            one of sites of which the model holds a part.
    """

    def __init__(
        self, make: Callable[..., Any], model: Callable[..., Any], plan: GuidePlan, prefix: str
    ):
        self.names = plan.globals
        model = self._held = hold_rows({}, model)
        self.is_scaled = bool(set(plan.globals) & set(plan.scaled))
        self.guide = make(_global_model(model, plan))
        if isinstance(self.guide, AutoContinuous):
            self._require_whole(plan)
        if getattr(self.guide, "reads_observations", False):
            self.guide = make(handlers.block(model, hide=[site.name for site in plan.local]))
            if self.guide.prefix == prefix:
                raise ValueError(
                    f"The guide of plate {plan.plate.name!r} and its global_guide= both have the "
                    f"prefix {prefix!r}, so that one would use the parameters of the other. Give "
                    "one of them another, as in partial(AutoAmortizedNormal, prefix='second')."
                )

    def _require_whole(self, plan: GuidePlan) -> None:
        """Refuse a joint guide, whose vector has all rows, where a plate holds but some of them."""
        for name in self.names:
            for plate in map(plan.sites.plates.__getitem__, plan.sites.sites[name].plates):
                if plate.length < plate.size:
                    raise ValueError(
                        f"Global site {name!r} lies in plate {plate.name!r}, which subsamples "
                        f"{plate.length} of {plate.size} rows, and global_guide= is "
                        f"{type(self.guide).__name__}, which draws all of them jointly. Leave "
                        f"global_guide= out, or remove the subsample_size of plate {plate.name!r}."
                    )

    @contextmanager
    def _holding(self, rows: Rows) -> Generator[None]:
        """Let the model's plates hold rows, of which an automatic guide hides the handlers."""
        self._held.rows = rows
        try:
            yield
        finally:
            self._held.rows = {}

    @property
    def is_auto(self) -> bool:
        """Whether it is an automatic guide, which knows quantiles."""
        return isinstance(self.guide, AutoGuide)

    def __call__(
        self, args: tuple, kwargs: dict[str, Any], rows: Rows, scales: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Sample the global sites, scaled as the model scales them, and return their values.

        Args:
            args: the model's arguments.
            kwargs: its keyword arguments.
            rows: those that the local plate is told to hold, if any.
            scales: by site its factor, where it has one.
        """
        with own_trace() as trace, scale_sites(scales, self.names), self._holding(rows):
            self.guide(*args, **kwargs)  # which, written by hand, need not return its values
        return {name: trace[name]["value"] for name in self.names}

    def set_up(
        self,
        params: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
        rows: Rows | None = None,
    ) -> None:
        """Let an automatic guide read the model, as it may not in compiled code."""
        if self.is_auto:
            with self._holding(rows or {}):
                set_up(self.guide, params, args, kwargs)

    def sample(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> dict[str, Array]:
        """Draw the global sites, given trained parameters."""
        self.set_up(params, args, kwargs)
        if self.is_auto:
            shape = {"sample_shape": sample_shape}
            try:
                return self.guide.sample_posterior(rng_key, params, *args, **shape, **kwargs)
            except KeyError as error:
                raise ValueError(
                    f"The parameters of the guide of the global sites {list(self.names)} have no "
                    f"{error}. Pass the result of a fit of this guide. Found {sorted(params)}."
                ) from error
        keys = jax.random.split(rng_key, math.prod(sample_shape))

        def draw(key: Array) -> dict[str, Array]:
            guide = handlers.substitute(handlers.seed(self.guide, key), data=params)
            with handlers.block():
                trace = handlers.trace(guide).get_trace(*args, **kwargs)
            return {name: trace[name]["value"] for name in self.names}

        draws = jax.vmap(draw)(keys)
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)

    def draw(
        self,
        rng_key: Array,
        params: dict[str, Any],
        sample_shape: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, Array], Array]:
        """Draw the global sites, and return the log-density of each draw with it.

        A guide may draw auxiliary sites, of which global ones are functions: the density is that of
        its whole trace. What the model scales is not scaled here.

        Raises:
            NoDensityError: if a site has a point for its distribution, or is read off the data.
        """
        self.set_up(params, args, kwargs)
        self._require_density()
        keys = jax.random.split(rng_key, math.prod(sample_shape))

        def draw(key: Array) -> tuple[dict[str, Array], Array]:
            trace = trace_rows(self.guide, params, all_rows(), key, args, kwargs)
            return drawn_with_density(trace, self.names, self.guide)

        draws = jax.vmap(draw)(keys)
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)

    def _require_density(self) -> None:
        if getattr(self.guide, "reads_observations", False):
            raise NoDensityError(
                f"The guide of the global sites {list(self.names)} is itself amortized, over "
                "another plate, whose latents are too many to be weighed together."
            )

    def median(
        self, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, Array]:
        """Return the median of each global site, which automatic guides know, of points too."""
        self.set_up(params, args, kwargs)
        if getattr(self.guide, "reads_observations", False):
            return self.guide.median(params, *args, **kwargs)
        return self.guide.median(params)

    def quantiles(
        self, params: dict[str, Any], quantiles: Array, args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, Array]:
        """Return quantiles of each global site, which automatic guides know."""
        self.set_up(params, args, kwargs)
        if getattr(self.guide, "reads_observations", False):
            return self.guide.quantiles(params, quantiles, *args, **kwargs)
        return self.guide.quantiles(params, quantiles)


def _global_model(model: Callable[..., Any], plan: GuidePlan) -> Callable[..., Any]:
    """Return the model with all but its global latent sites and their plates hidden."""
    kept = set(plan.globals)
    kept |= {plate for name in plan.globals for plate in plan.sites.sites[name].plates}
    hidden = partial(_is_not_among, frozenset(kept))
    drawn = partial(_draw_if_improper, hidden)
    return handlers.block(handlers.substitute(model, substitute_fn=drawn), hide_fn=hidden)


def _is_not_among(names: frozenset[str], msg: Any) -> bool:
    return "name" in msg and msg["name"] not in names


def _draw_if_improper(hidden: Callable[[Any], bool], msg: Any) -> Any:
    return draw_improper(msg) if hidden(msg) else None
