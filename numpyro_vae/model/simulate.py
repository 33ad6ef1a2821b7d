"""Latents and data drawn from a model, and data put in the place of those observed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_vae.model.provenance import is_read
from numpyro_vae.model.redraw import drawn_value, redraw
from numpyro_vae.model.sites import ModelSites
from numpyro_vae.model.supports import inside
from numpyro_vae.model.trace import Model
from numpyro_vae.numpyro_internals import ask_handlers, was_observed


class NotSimulableError(ValueError):
    """Data cannot be drawn from a model, or simulated ones not put in the place of the observed."""


SIMULATED = "numpyro_vae.simulated"  # the type of a message that asks what data were drawn with


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Latents:
    """The values of the latent sites that data were simulated with.

    Attributes:
        drawn: by site, of those that were drawn from the model.
        given: of those that were given to it, such as the guide's draws of the global sites.
    """

    drawn: dict[str, Any]
    given: dict[str, Any]


def simulate(
    model: Model,
    values: dict[str, Any],
    given: dict[str, Any],
    rng_key: Array,
    args: tuple,
    kwargs: dict[str, Any],
    plates: Collection[str] | None = None,
) -> tuple[Latents, dict[str, dict[str, Any]]]:
    """Draw latents from their prior and data from the likelihood.

    Args:
        model: a NumPyro model.
        values: of its parameters and network state.
        given: values of latent sites that are not to be drawn.
        rng_key: the random key.
        args: the model's arguments, of which the covariates matter.
        kwargs: its keyword arguments.
        plates: the names of plates whose observed sites are drawn, as those of others are given
            like the latents outside; by default all are.

    Returns:
        The latents, and the observed sites of the trace, whose values are drawn.

    Raises:
        ValueError: if the model cannot draw one of its sites.
    """
    model = handlers.substitute(redraw(model, plates), data={**values, **given})
    with handlers.block():
        trace = handlers.trace(handlers.seed(model, rng_key)).get_trace(*args, **kwargs)
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    drawn = {name: site["value"] for name, site in sites.items() if not was_observed(site)}
    seen = {name: site for name, site in sites.items() if was_observed(site)}
    free = (name for name in drawn if name not in given)
    latents = Latents(
        {name: inside(sites[name]["fn"].support, drawn[name]) for name in free}, given
    )
    return latents, {name: {**site, "value": drawn_value(site)} for name, site in seen.items()}


def settle[Made](
    draw: Callable[[list[Any]], Made],
    put: Callable[[list[Any], Made], list[Any]],
    arguments: list[Any],
) -> tuple[Made, list[Any], Array]:
    """Simulate, and put what is simulated among the arguments, until nothing changes any more.

    A model may compute an observation from others, or from earlier values of its own, such as the
    one before in a time series, that it finds among its arguments. So it is run again on what was
    simulated, unless it reads nothing of that. Each run settles one more of the values that are
    computed from one another.

    Args:
        draw: from the model's arguments to what is simulated, with the same key each time.
        put: from the arguments and what is simulated to new ones, the same object where the old.
        arguments: leaves, among them the data.

    Returns:
        What is simulated, the arguments with it, and whether nothing changes any more.
    """
    made = draw(arguments)
    first = put(arguments, made)
    pairs = enumerate(zip(arguments, first, strict=True))
    replaced = [number for number, (old, new) in pairs if old is not new]

    def among(values: Sequence[Any]) -> list[Any]:
        found = dict(zip(replaced, values, strict=True))
        return [found.get(number, leaf) for number, leaf in enumerate(arguments)]

    values = [jnp.asarray(first[number]) for number in replaced]
    if not is_read(lambda values: draw(among(values)), values):
        return made, first, jnp.asarray(True)

    def again(state: tuple) -> tuple:
        _, values, _, number = state
        made = draw(among(values))
        new = [put(among(values), made)[number] for number in replaced]
        new = [x.astype(old.dtype) for x, old in zip(new, values, strict=True)]
        return made, new, _differ(values, new), number + 1

    at_most = 1 + sum(x.size // min(x.shape, default=1) for x in values)
    start = (made, values, jnp.asarray(True), 1)
    made, values, changes, _ = jax.lax.while_loop(
        lambda state: state[2] & (state[3] < at_most), again, start
    )
    return made, among(values), ~changes


def _differ(some: Sequence[Array], others: Sequence[Array]) -> Array:
    """Return whether there is a difference between arrays; NaN is the same as NaN."""
    pairs = zip(some, others, strict=True)
    return jnp.array([((x != y) & ((x == x) | (y == y))).any() for x, y in pairs]).any()


def explain_unsettled() -> str:
    """Return what a person should know of simulated data that change whenever they are read."""
    return (
        "The model computes what it observes from the observed data among its arguments, so that "
        "data simulated from it change each time it is run on them. Pass what it computes of the "
        "data, such as their mean, as an argument of its own, or write a series as a scan"
    )


def draw_outside(
    guide: Model,
    params: dict[str, Any],
    rng_key: Array,
    plate: str,
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return a guide's draw of its sites outside the local plate, auxiliary ones among them.

    Args:
        guide: a NumPyro guide.
        params: its parameters and network state.
        rng_key: the random key.
        plate: the name of the local plate.
        args: the arguments of model and guide.
        kwargs: their keyword arguments.
    """
    seeded = handlers.seed(handlers.substitute(guide, data=params), rng_key)
    with handlers.block():
        trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "sample" and plate not in {x.name for x in site["cond_indep_stack"]}
    }


def why_not_simulable(sites: ModelSites, given: Collection[str]) -> str:
    """Return why a model cannot draw one of its sites; empty if it can draw all.

    Args:
        sites: what the model holds.
        given: the names of latent sites that are not to be drawn.
    """
    for name, site in sites.sites.items():
        if name in given:
            continue
        if not site.is_observed and site.is_improper:
            return (
                f"Site {name!r} has an improper prior, so data cannot be simulated from the model. "
                "Give it a proper prior"
            )
        if site.is_observed and not site.size:
            return (
                f"Site {name!r} is a numpyro.factor, of which nothing can be simulated. Write the "
                "likelihood as a distribution"
            )
    return ""


def why_censored(sites: ModelSites) -> str:
    """Return why what a model draws is not like its data; empty if it is.

    Args:
        sites: what the model holds.
    """
    for name, site in sites.sites.items():
        if site.is_observed and site.is_censored:
            return (
                f"Site {name!r} has a censored distribution, of which NumPyro draws values that "
                "are not censored, so they are not like the data"
            )
    return ""


def places(
    arrays: Sequence[Any], axes: Sequence[int | None], value: np.ndarray
) -> Iterator[tuple[int, int | None]]:
    """Yield which of the model's arguments are what it observes, and their datum axes.

    Args:
        arrays: those among the arguments.
        axes: their datum axes.
        value: what is observed, rows in front.
    """
    rows = [
        np.moveaxis(np.asarray(array), axis or 0, 0) if array.ndim else np.asarray(array)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    yield from ((number, axes[number]) for number in equal_to(value, rows))


def equal_to(value: np.ndarray, arrays: Sequence[Any], *, equal_nan: bool = False) -> list[int]:
    """Return which arrays have the values of another: those of its dtype, if there are any.

    Example:
        >>> equal_to(np.array([1, 0]), [np.array([True, False]), np.array([1, 0]), np.zeros(2)])
        [1]
    """
    found = [
        number
        for number, array in enumerate(arrays)
        if np.array_equal(array, value, equal_nan=equal_nan)
    ]
    return [number for number in found if arrays[number].dtype == value.dtype] or found


class simulated(Messenger):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """Tell an objective which latents the data were simulated with.

    Example:
        >>> with simulated(Latents({"z": np.zeros(3)}, {})):
        ...     print(simulated_latents().drawn["z"])
        [0. 0. 0.]
        >>> print(simulated_latents())
        None
    """

    def __init__(self, latents: Latents):
        self.latents = latents
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        """Answer the question."""
        if msg["type"] == SIMULATED:
            msg["value"] = self.latents


def simulated_latents() -> Latents | None:
    """Return the latents that the data were simulated with, or None of real data."""
    return ask_handlers(SIMULATED)
