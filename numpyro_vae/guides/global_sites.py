"""The guide of the latent sites outside the local plate: any guide of NumPyro's, or one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide

from numpyro_vae.model.plan import GuidePlan
from numpyro_vae.model.trace import own_trace
from numpyro_vae.numpyro_internals import draw_improper, set_up


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


class GlobalGuide:
    """A guide of global sites, and what is asked of it.

    Args:
        make: an AutoGuide class, or a callable from a model to a guide.
        model: the whole model.
        plan: what of it is global.
        prefix: of the local guide's parameters.

    Raises:
        ValueError: if its parameters would have the names of the local guide's.
    """

    def __init__(
        self, make: Callable[..., Any], model: Callable[..., Any], plan: GuidePlan, prefix: str
    ):
        self.names = plan.globals
        self.guide = make(_global_model(model, plan))
        if getattr(self.guide, "reads_observations", False):
            self.guide = make(handlers.block(model, hide=[site.name for site in plan.local]))
            if self.guide.prefix == prefix:
                raise ValueError(
                    f"The guide of plate {plan.plate.name!r} and its global_guide= both have the "
                    f"prefix {prefix!r}, so that one would use the parameters of the other. Give "
                    "one of them another, as in partial(AutoAmortizedNormal, prefix='second')."
                )

    @property
    def is_auto(self) -> bool:
        """Whether it is an automatic guide, which knows quantiles."""
        return isinstance(self.guide, AutoGuide)

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Array]:
        """Sample the global sites, and return their values."""
        with own_trace() as trace:  # as a guide written by hand need not return its values
            self.guide(*args, **kwargs)
        return {name: trace[name]["value"] for name in self.names}

    def set_up(self, params: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """Let an automatic guide read the model, as it may not in compiled code."""
        if self.is_auto:
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
            return self.guide.sample_posterior(rng_key, params, *args, **shape, **kwargs)
        keys = jax.random.split(rng_key, math.prod(sample_shape))

        def draw(key: Array) -> dict[str, Array]:
            guide = handlers.substitute(handlers.seed(self.guide, key), data=params)
            with handlers.block():
                trace = handlers.trace(guide).get_trace(*args, **kwargs)
            return {name: trace[name]["value"] for name in self.names}

        draws = jax.vmap(draw)(keys)
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)

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
