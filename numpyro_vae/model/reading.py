"""Reads a model: what it holds on given arguments, its latents apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int
from numpyro.distributions import constraints

from numpyro_vae.data.arrays import Layout
from numpyro_vae.model.sites import ModelSites, Plate
from numpyro_vae.model.supports import outside_support
from numpyro_vae.model.trace import Model, Rows, mask_of, sites_of_trace, trace_model

# What JAX raises when a model asks for the values of an abstract array.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclass(frozen=True)
class Param:
    """A parameter as the model declares it: its first value, its constraint, and the rest."""

    value: Any
    constraint: Any
    kwargs: tuple[tuple[str, Any], ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices", "values", "masks", "supports", "outside", "choices", "params"),
    meta_fields=("sites", "fixed_supports", "has_state"),
)
@dataclass(frozen=True, eq=False)
class Reading:
    """What a model holds on given arguments; a pytree of arrays, the rest static.

    Attributes:
        indices: by plate the rows that it holds. A plate inside a ``scan`` is not seen.
        values: by observed site its values.
        masks: by site the mask of its distribution, where it has one.
        supports: by latent site its support, where it is made of values.
        outside: by observed site where its values are outside their support, if that can be.
        choices: by enumerated site the values that it can take.
        params: by name the parameters that the model declares.
        sites: its sites and plates.
        fixed_supports: by latent site its support, where it is made of none.
        has_state: whether the model has mutable state.
    """

    indices: dict[str, Any]  # unchecked, as JAX puts what it likes into the place of arrays
    values: dict[str, Any]
    masks: dict[str, Any]
    supports: dict[str, Any]
    outside: dict[str, Any]
    choices: dict[str, Any]
    params: dict[str, Any]
    sites: ModelSites
    fixed_supports: Fixed
    has_state: bool

    def support(self, name: str) -> Any:
        """Return the support of a latent site."""
        return self.supports[name] if name in self.supports else self.fixed_supports.value[name]

    def rows(self, plate: Plate) -> Int[Array, "rows"]:
        """Return the rows that a plate holds: all of them if it stands in a ``scan``."""
        return self.indices[plate.name] if plate.name in self.indices else jnp.arange(plate.length)

    def with_sizes(self, sizes: Mapping[str, int]) -> Reading:
        """Return the reading with other sizes of plates; the rows that they hold are the same."""
        plates = {
            name: replace(plate, size=sizes.get(name, plate.size))
            for name, plate in self.sites.plates.items()
        }
        return replace(self, sites=replace(self.sites, plates=plates))


@dataclass(frozen=True, eq=False)
class Fixed:
    """Holds what cannot be hashed, in the static part of a pytree."""

    value: Any


class ModelReader:
    """Reads a model: runs its Python once for all arguments of the same shapes.

    A reading is a compiled function of the arguments, so that a guide can read its model at each
    call, in whatever JAX transforms the call, and the model's code is not run again. Of what is
    read, only what is used is computed, above all not the likelihood.

    A model whose Python code asks for the *values* of its arguments, as
    ``plate("groups", len(np.unique(group)))`` does, is run at each call.

    Args:
        model: a NumPyro model.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Gamma(2.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> reader = ModelReader(model)
        >>> sites = reader.sites((np.zeros(1_000_000),), {})
        >>> sites.plates["data"]
        Plate(name='data', size=1000000, length=1000000, dim=-1)
        >>> reader.read((jnp.ones(3),), {}).values["x"]
        Array([1., 1., 1.], dtype=float32)
    """

    def __init__(self, model: Model):
        self.model = model
        self._compiled = jax.jit(self._read, static_argnums=(0, 1))

    def __getstate__(self) -> dict[str, Any]:
        """Return the model alone: what is compiled cannot be pickled."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        rows: Rows | None = None,
        rng_key: Array | None = None,
    ) -> Reading:
        """Read the model.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            rows: by plate, the size and the rows that it is to hold; others hold their own.
            rng_key: what parameters start from.
        """
        return self._run(args, kwargs, rows or {}, rng_key, lambda fn, *args: fn(*args))

    def sites(self, args: tuple, kwargs: dict[str, Any]) -> ModelSites:
        """Return what the model holds, without computing anything, at any size of the data.

        Args:
            args: its positional arguments; arrays may be replaced by `jax.ShapeDtypeStruct`.
            kwargs: its keyword arguments.
        """
        return self._run(args, kwargs, {}, None, jax.eval_shape).sites

    def supports(self, args: tuple, kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the latent sites with a support that is computed."""
        return tuple(self._run(args, kwargs, {}, None, jax.eval_shape).supports)

    def bounds(
        self, args: tuple, kwargs: dict[str, Any], names: Collection[str]
    ) -> tuple[Any, ...]:
        """Return what the supports of latent sites are made of, to be compared with those of later.

        Supports that are not computed have no bounds. Bounds that cannot be known now, in compiled
        code, equal no others.
        """
        computed = [name for name in self.supports(args, kwargs) if name in names]
        if not computed:
            return ()
        supports = self.read(args, kwargs).supports
        leaves = jax.tree.leaves([supports[name] for name in computed])
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return (object(),)
        return tuple(np.asarray(leaf).tobytes() for leaf in leaves)

    def read_all(self, args: tuple, kwargs: dict[str, Any]) -> Reading:
        """Read the model with all rows in each plate, whatever it would subsample."""
        plates = self.sites(args, kwargs).plates.values()
        short = [plate for plate in plates if plate.length < plate.size]
        rows = {plate.name: (plate.size, jnp.arange(plate.size)) for plate in short}
        return self.read(args, kwargs, rows)

    def _run(
        self, args: tuple, kwargs: dict, rows: Rows, rng_key: Array | None, call: Callable
    ) -> Reading:
        arrays, layout = Layout.of(args, kwargs)
        sizes = tuple((name, size) for name, (size, _) in rows.items())
        indices = [indices for _, indices in rows.values()]
        key = jax.random.key(0) if rng_key is None else rng_key
        if _is_hashable(layout):
            try:
                return call(partial(self._compiled, layout, sizes), key, arrays, indices)
            except NEEDS_VALUES:
                pass
        return call(lambda: self._read(layout, sizes, key, arrays, indices))

    def _read(
        self,
        layout: Layout,
        sizes: tuple[tuple[str, int], ...],
        rng_key: Array,
        arrays: list[Any],
        indices: list[Array],
    ) -> Reading:
        args, kwargs = layout.whole(arrays)
        pairs = zip(sizes, indices, strict=True)
        rows = {name: (size, held) for (name, size), held in pairs}
        return reading_of(trace_model(self.model, args, kwargs, rng_key, rows))


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def reading_of(trace: dict[str, Any]) -> Reading:
    """Return what a trace holds of a model beside its latents."""
    sites = sites_of_trace(trace)
    latent = [site.name for site in sites.latent() if not site.is_discrete]
    supports = {name: trace[name]["fn"].support for name in latent}
    computed = {name: support for name, support in supports.items() if jax.tree.leaves(support)}
    masks = {name: mask_of(trace[name]["fn"]) for name in sites.sites}
    seen = [name for name, site in sites.sites.items() if site.is_observed]
    seen = [name for name in seen if trace[name]["value"] is not None]
    outside = {name: outside_support(trace[name]) for name in seen}
    return Reading(
        indices={name: msg["value"] for name, msg in _of_type(trace, "plate")},
        values={name: jnp.asarray(trace[name]["value"]) for name in seen},
        masks={name: mask for name, mask in masks.items() if mask is not None},
        supports=computed,
        outside={name: found for name, found in outside.items() if found is not None},
        choices={
            site.name: trace[site.name]["fn"].enumerate_support(expand=False)
            for site in sites.sites.values()
            if site.is_enumerated
        },
        params={name: _param(msg) for name, msg in _of_type(trace, "param")},
        sites=sites,
        fixed_supports=Fixed({name: x for name, x in supports.items() if name not in computed}),
        has_state=any(True for _ in _of_type(trace, "mutable")),
    )


def _of_type(trace: dict[str, Any], kind: str) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((name, msg) for name, msg in trace.items() if msg["type"] == kind)


def _param(msg: dict[str, Any]) -> Param:
    kwargs = dict(msg["kwargs"])
    constraint = kwargs.pop("constraint", constraints.real)
    return Param(msg["value"], constraint, tuple(sorted(kwargs.items())))


jax.tree_util.register_dataclass(Param, ("value", "constraint"), ("kwargs",))
