"""Reads a model, once for arguments of the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_vae.data.arrays import ArrayData, Layout
from numpyro_vae.data.whole_numbers import floats_told
from numpyro_vae.model.contents import Reading, Values, reading_of, values_of
from numpyro_vae.model.mixing import mixed_plates
from numpyro_vae.model.provenance import Names, sources
from numpyro_vae.model.sites import ModelSites, Reads
from numpyro_vae.model.trace import NEEDS_VALUES, Model, Rows, trace_model


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
        self._traced = jax.jit(self._trace, static_argnums=(0, 1))
        self._compiled = jax.jit(self._read, static_argnums=(0, 1))
        self._reads: dict[Any, Reads] = {}
        self._mixed: Names | None = None

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

    def abstract(self, args: tuple, kwargs: dict[str, Any], rows: Rows | None = None) -> Reading:
        """Return a reading of shapes, without computing anything, at any size of the data.

        Args:
            args: its positional arguments; arrays may be replaced by `jax.ShapeDtypeStruct`.
            kwargs: its keyword arguments.
            rows: as in `read`.
        """
        return self._run(args, kwargs, rows or {}, None, jax.eval_shape)

    def sites(self, args: tuple, kwargs: dict[str, Any], rows: Rows | None = None) -> ModelSites:
        """Return what the model holds; see `abstract`."""
        return self.abstract(args, kwargs, rows).sites

    def deterministic(
        self, args: tuple, kwargs: dict[str, Any], rows: Rows
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the deterministic sites, with rows as in `read`."""
        layout, sizes, *arguments = self._arguments(args, kwargs, rows, None)
        try:
            trace = partial(self._traced if _is_hashable(layout) else self._trace, layout, sizes)
            _, values = jax.eval_shape(trace, *arguments)
        except NEEDS_VALUES:
            _, values = jax.eval_shape(lambda: self._trace(layout, sizes, *arguments))
        return {name: jnp.shape(value) for name, value in values[-1].items()}

    def needs_values(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Return whether the model asks for the values of its arguments."""
        layout, sizes, *arguments = self._arguments(args, kwargs, {}, None)
        if not _is_hashable(layout):
            return False
        try:
            jax.eval_shape(partial(self._compiled, layout, sizes), *arguments)
        except NEEDS_VALUES:
            return True
        except Exception:  # of any kind, as the model's own code raises it
            return False
        return False

    def plates_met(self, args: tuple, kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the plates that the model enters, before it fails if it does."""
        watch = _Plates()

        def run() -> None:
            with handlers.block(), watch:
                handlers.seed(self.model, jax.random.key(0))(*args, **kwargs)

        with suppress(Exception):  # of any kind, as the model's own code raises it
            jax.eval_shape(run)
        return tuple(watch.names)

    def bounds(
        self, args: tuple, kwargs: dict[str, Any], rows: Rows, names: Collection[str]
    ) -> tuple[Any, ...]:
        """Return what the supports of latent sites are made of, to be compared with those of later.

        Supports that are not computed have no bounds. Bounds that cannot be known now, in compiled
        code, equal no others.
        """
        computed = [name for name in self.abstract(args, kwargs, rows).supports if name in names]
        if not computed:
            return ()
        supports = self.read(args, kwargs, rows).supports
        leaves = jax.tree.leaves([supports[name] for name in computed])
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return (object(),)
        return tuple(np.asarray(leaf).tobytes() for leaf in leaves)

    def mixed(self, args: tuple, kwargs: dict[str, Any], rows: Rows) -> Names:
        """Return the plates that are none, see `mixed_plates`, found once for all arguments."""
        if self._mixed is None:
            arrays, layout = Layout.of(args, kwargs)
            self._mixed = mixed_plates(self.model, layout, arrays, rows)
        return self._mixed

    def read_all(self, args: tuple, kwargs: dict[str, Any], rows: Rows) -> Reading:
        """Read the model with given rows in plates, and in others all, whatever they subsample."""
        plates = self.sites(args, kwargs, rows).plates.values()
        short = [plate for plate in plates if plate.length < plate.size]
        every = {plate.name: (plate.size, jnp.arange(plate.size)) for plate in short}
        return self.read(args, kwargs, every | rows)

    def _run(
        self, args: tuple, kwargs: dict, rows: Rows, rng_key: Array | None, call: Callable
    ) -> Reading:
        layout, sizes, key, arrays, indices = self._arguments(args, kwargs, rows, rng_key)

        def again(arrays: tuple) -> tuple:
            return self._trace(layout, sizes, key, list(arrays), indices)

        with floats_told(again, arrays, layout):
            return self._reading(call, layout, sizes, key, arrays, indices)

    def _reading(
        self,
        call: Callable,
        layout: Layout,
        sizes: tuple[tuple[str, int], ...],
        key: Array,
        arrays: list[Any],
        indices: list[Array],
    ) -> Reading:
        if _is_hashable(layout):
            try:
                found = call(partial(self._compiled, layout, sizes), key, arrays, indices)
                return found.with_reads(self._reads_of(layout, sizes, key, arrays, indices))
            except NEEDS_VALUES:
                pass
        found = call(lambda: self._trace(layout, sizes, key, arrays, indices)[0])
        trace = partial(self._trace, layout, sizes, arrays=arrays, indices=indices)
        return found.with_reads(_reads(trace, key))

    def _arguments(self, args: tuple, kwargs: dict, rows: Rows, rng_key: Array | None) -> tuple:
        """Return the arguments of `_trace`, of which the first two are static."""
        arrays, layout = Layout.of(args, kwargs)
        sizes = tuple((name, size) for name, (size, _) in rows.items())
        indices = [indices for _, indices in rows.values()]
        key = jax.random.key(0) if rng_key is None else rng_key
        return layout, sizes, key, arrays, indices

    def _trace(
        self,
        layout: Layout,
        sizes: tuple[tuple[str, int], ...],
        rng_key: Array,
        arrays: list[Any],
        indices: list[Array],
    ) -> tuple[Reading, Values]:
        """Return what the model holds, and the values that decide on what reads what."""
        args, kwargs = layout.whole(arrays)
        pairs = zip(sizes, indices, strict=True)
        rows = {name: (size, held) for (name, size), held in pairs}
        trace = trace_model(self.model, args, kwargs, rng_key, rows)
        return reading_of(trace), values_of(trace)

    def _read(self, *args: Any) -> Reading:
        """Return what the model holds, and let the rest be computed by no one."""
        return self._traced(*args)[0]

    def _reads_of(self, layout: Layout, sizes: tuple, *args: Any) -> Reads:
        """Return what reads what, found once for arguments of the same shapes."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(like))
        known = (layout, sizes, shapes)
        if known not in self._reads:
            self._reads[known] = _reads(partial(self._traced, layout, sizes), *like)
        return self._reads[known]


def _reads(trace: Callable[..., tuple[Reading, Values]], *args: Any) -> Reads:
    """Return what the values that a trace returns come from."""
    jaxpr, shapes = jax.make_jaxpr(lambda *args: trace(*args)[1], return_shape=True)(*args)
    leaves = iter(sources(jaxpr))
    return Reads(*map(_united, jax.tree.map(lambda _: next(leaves), shapes)))


def _united(by_name: dict[str, Any]) -> dict[str, frozenset[str]]:
    leaves = {name: jax.tree.leaves(names, is_leaf=_is_names) for name, names in by_name.items()}
    return {name: frozenset().union(*found) for name, found in leaves.items()}


def _is_names(x: Any) -> bool:
    return isinstance(x, frozenset)


def read_for(
    reader: ModelReader,
    data: Any,
    batch_axes: Any,
    static_kwargs: Mapping[str, Any],
    name: str = "data",
) -> ArrayData:
    """Read data in memory; arrays whose values a model asks for are constants.

    Args:
        reader: of the model.
        data: see `ArrayData.read`.
        batch_axes: likewise.
        static_kwargs: the model's keyword arguments that never change.
        name: what the data are called in messages.
    """
    arrays = ArrayData.read(data, batch_axes, name)
    if all(axis is not None for axis in arrays.layout.axes):
        return arrays
    args, kwargs = arrays.whole()
    needs = reader.needs_values(args, {**kwargs, **static_kwargs})
    return arrays.with_constants() if needs else arrays


class _Plates(Messenger):
    """Remembers the names of plates."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            self.names[msg["name"]] = None


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
