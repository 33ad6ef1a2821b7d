"""Runs of model and guide as an objective makes them, and what their traces say."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import kl_divergence
from numpyro.distributions.util import scale_and_mask

from numpyro_vae.model.densities import log_prob_of
from numpyro_vae.model.simulate import simulate
from numpyro_vae.numpyro_internals import check_traces, seed_plates

Site = dict[str, Any]
Trace = Any  # an ordered dict of sites by name, as `handlers.trace` makes it


class Call(NamedTuple):
    """Model and guide, with the parameters and arguments that an objective is given.

    Attributes:
        params: of both, with the networks' state among them.
        model: the model.
        guide: the guide.
        args: their arguments.
        kwargs: their keyword arguments.
        plate_key: chooses the rows of plates that subsample; None leaves it to the key of a run.
    """

    params: dict[str, Any]
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    plate_key: Any = None

    def trace_guide(self, key: Array, values: dict[str, Array] | None = None) -> Trace:
        """Run the guide, with values that some of its sites have already."""
        return self._trace(self._seeded(self.guide, key), {**self.params, **(values or {})})

    def trace_prior(self, key: Array) -> Trace:
        """Run the model, whose latents are drawn from it."""
        return self._trace(self._seeded(self.model, key), self.params)

    def simulate(
        self, key: Array, plates: Collection[str] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values of latent and of observed sites, drawn from the model.

        Args:
            key: the random key.
            plates: those whose observed sites are drawn; by None all are.
        """
        model = self._with_rows(self.model)
        drawn, seen = simulate(model, self.params, {}, key, self.args, self.kwargs, plates)
        return drawn.drawn, values_of(seen)

    def trace_model(self, guide_trace: Trace, key: Array) -> Trace:
        """Run the model against the guide, whose new state it sees where they share a network."""
        replayed = handlers.replay(self._seeded(self.model, key), guide_trace)
        trace = self._trace(replayed, {**self.params, **mutable_state(guide_trace)})
        check_traces(trace, guide_trace)
        return trace

    def _seeded(self, fn: Callable[..., Any], key: Array) -> Callable[..., Any]:
        return handlers.seed(self._with_rows(fn), key)

    def _with_rows(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn if self.plate_key is None else seed_plates(fn, self.plate_key)

    def _trace(self, fn: Callable[..., Any], data: dict[str, Any]) -> Trace:
        given = handlers.substitute(fn, data=data)
        return handlers.trace(given).get_trace(*self.args, **self.kwargs)


# -- what a trace says -----------------------------------------------------------------------------


def samples(trace: Trace) -> Trace:
    """Return the sample sites of a trace."""
    return {name: site for name, site in trace.items() if site["type"] == "sample"}


def latents(trace: Trace) -> Trace:
    """Return the sample sites of a trace that are not observed."""
    return {name: site for name, site in samples(trace).items() if not site["is_observed"]}


def values_of(sites: Trace) -> dict[str, Any]:
    """Return the values of sites."""
    return {name: site["value"] for name, site in sites.items()}


def mutable_state(*traces: Trace) -> dict[str, Any]:
    """Return the networks' state after runs one after the other."""
    return {
        name: site["value"]
        for trace in traces
        for name, site in trace.items()
        if site["type"] == "mutable"
    }


def scaled_log_prob(site: Site) -> Array:
    """Return the log density of a site, with its scale, of the shape of its plates."""
    return scale_and_mask(log_prob_of(site), site["scale"])


def divergence_of(guide_site: Site, model_site: Site) -> Array:
    """Return the divergence of a site with its scale, in closed form if there is one, by row."""
    try:
        found = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return scaled_log_prob(guide_site) - scaled_log_prob(model_site)
    return jnp.asarray(scale_and_mask(found, guide_site["scale"]))


def total(terms: Iterable[Any]) -> Array:
    """Return the sum of arrays that broadcast, 0 of none."""
    return reduce(operator.add, terms, jnp.zeros(()))
