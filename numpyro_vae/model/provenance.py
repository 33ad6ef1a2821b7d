"""Which of a model's latents and parameters a value is computed from, read off its jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from numpyro.primitives import Messenger

PREFIX = "numpyro_vae/"  # of the names that are given to values
KINDS = ("sample", "param", "plate")
RANDOM = "/random"  # what comes from a random key, and from nothing with a name

READ = "/read"  # what is asked of whether it is read
LOOKED_UP = "/looked-up/"  # before the name of what is looked up by an index that has a name
LOOKUPS = ("gather", "dynamic_slice")

Names = frozenset[str]


class named_values(Messenger):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """Name the values of latent sites, parameters and plates, so that `sources` finds them.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro import handlers
        >>> def model(key):
        ...     with named_values(), handlers.seed(rng_seed=key):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     return 2 * z, key
        >>> key = jax.random.key(0)
        >>> [sorted(names) for names in sources(jax.make_jaxpr(model)(key))]
        [['z'], ['/random']]
    """

    def __init__(self) -> None:
        super().__init__(None)

    def postprocess_message(self, msg: Any) -> None:
        """Name a value; those of observed sites are the data's."""
        if msg["type"] not in KINDS or msg.get("is_observed") or msg["value"] is None:
            return
        msg["value"] = checkpoint_name(msg["value"], PREFIX + msg["name"])


def sources(jaxpr: ClosedJaxpr, *, lookups: bool = False) -> list[Names]:
    """Return for each output of a jaxpr the names of the values that it is computed from.

    Of what is named, what it was itself computed from does not count. What is drawn without a name,
    as inside a ``scan``, is ``RANDOM``.

    What is looked up in a value with a name, by an index with a name, comes from ``LOOKED_UP`` and
    the name of the value too, if that is asked for.

    Args:
        jaxpr: of a function that runs a model under `named_values`, and whose first argument is the
            random key.
        lookups: whether it is.
    """
    key, *rest = jaxpr.jaxpr.invars
    del key
    given = [frozenset({RANDOM}), *([frozenset()] * len(rest))]
    return _flow(jaxpr.jaxpr, given, lookups)


def is_read(fn: Callable[[Any], Any], values: Any) -> bool:
    """Return whether anything that a function returns is computed from the values it is given.

    Example:
        >>> import jax.numpy as jnp
        >>> is_read(jnp.zeros_like, jnp.ones(3)), is_read(jnp.cumsum, jnp.ones(3))
        (False, True)
    """
    jaxpr = jax.make_jaxpr(fn)(values).jaxpr
    return any(_flow(jaxpr, [frozenset({READ})] * len(jaxpr.invars), False))


def _flow(jaxpr: Jaxpr, given: Sequence[Names], lookups: bool) -> list[Names]:
    """Return what the outputs of a jaxpr come from, given what its inputs do."""
    found: dict[Any, Names] = dict(zip(jaxpr.invars, given, strict=True))

    def of(var: Any) -> Names:
        return frozenset() if isinstance(var, Literal) else found.get(var, frozenset())

    for eqn in jaxpr.eqns:
        results = _through(eqn, [of(var) for var in eqn.invars], lookups)
        found.update(zip(eqn.outvars, results, strict=True))
    return [of(var) for var in jaxpr.outvars]


def _through(eqn: Any, given: list[Names], lookups: bool) -> list[Names]:
    """Return what the results of an equation come from."""
    name = str(eqn.params.get("name", ""))
    if eqn.primitive.name == "name" and name.startswith(PREFIX):
        return [frozenset({name.removeprefix(PREFIX)})]
    inner = inner_jaxprs(eqn)
    if len(inner) == 1 and len(inner[0].invars) == len(given):
        flow = partial(_flow, inner[0], lookups=lookups)
        if eqn.primitive.name == "scan":
            return _through_scan(flow, given, *_sizes_of_scan(eqn, inner[0]))
        if len(inner[0].outvars) == len(eqn.outvars) and eqn.primitive.name != "while":
            return flow(given)
    everything = frozenset().union(*given, *(_named_in(jaxpr, lookups) for jaxpr in inner))
    if lookups and eqn.primitive.name in LOOKUPS and any(given[1:]):
        everything |= {LOOKED_UP + name for name in given[0] if not name.startswith(LOOKED_UP)}
    return [everything] * len(eqn.outvars)


def _through_scan(flow: Any, given: list[Names], consts: int, carry: int) -> list[Names]:
    """Follow a scan until what its carry comes from grows no more."""
    while True:
        results = flow(given)
        carried = [old | new for old, new in zip(given[consts:], results[:carry], strict=False)]
        grown = [*given[:consts], *carried, *given[consts + carry :]]
        if grown == given:
            return results
        given = grown


def _sizes_of_scan(eqn: Any, body: Jaxpr) -> tuple[int, int]:
    """Return how many constants a scan has, and how long its carry is."""

    def same(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True))

    carry = same(eqn.outvars, body.outvars)
    return same(eqn.invars, body.invars) - carry, carry


def _named_in(jaxpr: Jaxpr, lookups: bool) -> Names:
    """Return all names that are given inside a jaxpr."""
    results = (_through(eqn, [frozenset()] * len(eqn.invars), lookups) for eqn in jaxpr.eqns)
    return frozenset().union(*(names for found in results for names in found))


def inner_jaxprs(eqn: Any) -> list[Jaxpr]:
    """Return the jaxprs inside an equation of a jaxpr."""
    held = jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    opened = (x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in held)
    return [x for x in opened if isinstance(x, Jaxpr)]
