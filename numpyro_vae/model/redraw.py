"""The observed sites of a model drawn anew, but for those that compiled code cannot draw."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions.batch_util import promote_batch_shape

from numpyro_vae.model.stacked import Stacked
from numpyro_vae.model.trace import Model, event_shape_of, with_event

UNDRAWN = "undrawn"  # in a site's ``infer``: why it was left as it was observed


class redraw(handlers.uncondition):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """Draw observed sites anew, as ``handlers.uncondition`` does, where that can be compiled.

    A site in none of ``plates`` keeps its value: it is no row's, and what is given of all rows,
    such as a site that ``handlers.condition`` gives a value, is given of new ones too.

    Where NumPyro broadcasts the event of a distribution to that of the data, it draws one value for
    all of them; here each is drawn. A site that cannot be drawn keeps its observed value, and
    `undrawn` says why. Such are distributions without a sampler, and counts out of a total that is
    an array without a bound.

    Args:
        fn: a NumPyro model.
        plates: the names of plates whose observed sites are drawn; by default all are.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     numpyro.sample("x", dist.Multinomial(x.sum(), jnp.ones(3) / 3), obs=x)
        >>> def trace(x):
        ...     trace = handlers.trace(handlers.seed(redraw(model), 0)).get_trace(x)
        ...     print(undrawn(trace))
        >>> _ = jax.eval_shape(trace, jnp.array([1, 2, 3]))
        {'x': 'Please specify total_count_max in Multinomial distribution.'}
    """

    def __init__(self, fn: Model | None = None, plates: Collection[str] | None = None):
        self.plates = plates
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        """Take the observed value off a site that can be drawn."""
        if msg["type"] == "sample" and msg["is_observed"]:
            if not lies_in(msg, self.plates):
                return
            if not isinstance(msg["fn"], Stacked):
                msg["fn"] = with_shapes_of_parts(msg["fn"])  # if scan has stacked it
            reason = _why_not_drawn(msg)
            msg["infer"] = {**msg["infer"], **({UNDRAWN: reason} if reason else {})}
            if reason:
                return
            msg["fn"] = with_event(msg["fn"], event_shape_of(msg))
        super().process_message(msg)


def lies_in(site: Mapping[str, Any], plates: Collection[str] | None) -> bool:
    """Return whether a site lies in one of some plates; in any, or none, if they are None."""
    frames = {frame.name for frame in site["cond_indep_stack"]}
    return plates is None or not frames.isdisjoint(plates)


def with_shapes_of_parts(fn: dist.Distribution) -> dist.Distribution:
    """Return a distribution whose parts have the batch shapes of their arrays.

    Distributions that ``scan`` stacks have them, but not those that they are made of, as a
    LogNormal is of a Normal: their draws fail, or are the same at all steps.
    """
    parts = {name: getattr(fn, name, None) for name in type(fn).gather_pytree_data_fields()}
    own = jax.tree.map(_with_own_shape, parts, is_leaf=_is_distribution)
    leaves = (jax.tree.leaves(tree, is_leaf=_is_distribution) for tree in (parts, own))
    if all(one is other for one, other in zip(*leaves, strict=True)):
        return fn
    if isinstance(fn, dist.ExpandedDistribution):
        return own["base_dist"].expand(fn.batch_shape)
    fn = copy.copy(fn)
    vars(fn).update(own)
    return fn


def _is_distribution(part: Any) -> bool:
    return isinstance(part, dist.Distribution)


def _with_own_shape(part: Any) -> Any:
    if not _is_distribution(part):
        return part
    try:
        promoted = promote_batch_shape(part)
    except (AttributeError, NotImplementedError):  # of a class that scan cannot stack either
        return part
    return with_shapes_of_parts(part if promoted.batch_shape == part.batch_shape else promoted)


def _why_not_drawn(msg: Any) -> str:
    """Return why a site cannot be drawn; empty if it can."""

    def draw(rng_key: Array) -> Array:
        return msg["fn"](rng_key=rng_key, sample_shape=msg["kwargs"].get("sample_shape", ()))

    try:
        jax.eval_shape(draw, jax.random.key(0))
    except Exception as error:  # of whatever kind, as any distribution may stand there
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def undrawn(trace: dict[str, Any]) -> dict[str, str]:
    """Return why sites of a trace under `redraw` were not drawn, by name."""
    sites = (site for site in trace.values() if site["type"] == "sample")
    return {site["name"]: site["infer"][UNDRAWN] for site in sites if UNDRAWN in site["infer"]}


def drawn_value(site: dict[str, Any]) -> Array:
    """Return the value that was drawn of a site under `redraw`.

    Raises:
        ValueError: if none was.
    """
    if UNDRAWN in site["infer"]:
        raise ValueError(explain_undrawn({site["name"]: site["infer"][UNDRAWN]}))
    return site["value"]


def explain_undrawn(reasons: dict[str, str]) -> str:
    """Return what a person should know of sites that cannot be drawn."""
    told = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    return (
        f"The observed sites {list(reasons)} cannot be drawn in compiled code ({told}). Give a "
        "distribution of counts its total_count as integers, as with .astype(int), and "
        "total_count_max=, such as Multinomial(total_count, probs, total_count_max=100), and "
        "another one a method sample() that works under jax.jit; in a scan, give it arguments of "
        "the shape of the plate."
    )
