"""An encoder and its heads as one network: built, checked, initialized and applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from flax import nnx
from jaxtyping import Array
from numpyro.primitives import mutable

from numpyro_vae.data.ragged import Segments
from numpyro_vae.encoders.adapters import as_module
from numpyro_vae.families import AbstractFamily
from numpyro_vae.families.bounded import Bounded
from numpyro_vae.guides.blocks import Block, Context, features_of, key_of
from numpyro_vae.model.sites import Plate, Site

Encoder = Any  # a module of flax or Equinox, an (init, apply) pair, or a builder of one


class Amortizer(nnx.Module):
    """An encoder, and a block for each group of sites that are served together."""

    def __init__(self, encoder: nnx.Module, blocks: dict[str, Block]):
        self.encoder, self.blocks = encoder, nnx.data(dict(blocks))
        self.order = tuple(blocks)  # which a pytree does not keep

    def __call__(self, inputs: Any) -> dict[str, Any]:
        """Return what each block reads of the data, by its name."""
        output = self.encoder(inputs)
        return {name: features_of(output, self.blocks[name]) for name in self.order}

    def in_order(self) -> dict[str, Block]:
        """Return the blocks in the order in which they are sampled."""
        return {name: self.blocks[name] for name in self.order}


@dataclass(frozen=True)
class Structure:
    """A network without its values: the static part, and the shapes of the others.

    ``is_deterministic`` says whether its state, if any, is of use to it in training alone, as the
    random keys of dropout are.
    """

    graphdef: nnx.GraphDef
    params: dict
    state: dict
    is_deterministic: bool

    @property
    def has_state(self) -> bool:
        """Whether the network has anything but parameters."""
        return bool(jax.tree.leaves(self.state))


def _check_shapes(found: Any, expected: Any, name: str) -> None:
    paths = dict(jax.tree.leaves_with_path(found))
    for path, leaf in jax.tree.leaves_with_path(expected):
        shape = jnp.shape(paths[path]) if path in paths else None
        if shape != leaf.shape:
            where = name + jax.tree_util.keystr(path)
            raise ValueError(
                f"{where} has shape {shape}, expected {leaf.shape}: these parameters belong to "
                "another guide, or to data of another shape. Pass those of this guide."
            )
    if len(paths) != len(jax.tree.leaves(expected)):
        raise ValueError(
            f"{name} holds {len(paths)} arrays, expected {len(jax.tree.leaves(expected))}: these "
            "parameters belong to another guide. Pass those of this guide."
        )


def is_headless(params: Mapping[str, Any], prefix: str) -> bool:
    """Return whether an encoder is its own head: if it returns pairs, no head has parameters."""
    return "blocks" not in params.get(f"{prefix}$params", {"blocks": {}})


def num_rows(inputs: Any) -> int:
    """Return how many data the encoder's inputs hold."""
    first = jax.tree.leaves(inputs, is_leaf=lambda x: isinstance(x, Segments))[0]
    return first.num_segments if isinstance(first, Segments) else first.shape[0]


@dataclass(frozen=True)
class Network:
    """A guide's network: an encoder, and a head where the encoder returns features.

    Args:
        encoder: a module, or a builder; see `numpyro_vae.encoders.base`.
        family: what the heads' outputs mean.
        sites: the local sites, in the model's order.
        plate: the local plate.
        reads: by local site, how many values of which other sites its head reads.
    """

    encoder: Encoder
    family: AbstractFamily
    sites: tuple[Site, ...]
    plate: Plate
    reads: Mapping[str, Mapping[str, int]]

    def init(self, rng_key: Array, inputs: Any) -> tuple[dict, dict]:
        """Return initial ``(params, state)``, nested dicts of arrays.

        Args:
            rng_key: another key is another initialization.
            inputs: the first batch, data along the leading axis.

        Raises:
            ValueError: if the encoder's output has not the shape that the local sites need.
        """
        _, params, state = self._split(rng_key, inputs)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def structure(self, inputs: Any) -> Structure:
        """Return the network's static parts and shapes, without computing anything."""
        found = []

        def split(rng_key: Array, inputs: Any) -> tuple[dict, dict]:
            graphdef, params, state = self._split(rng_key, inputs)
            found.append((graphdef, not nnx.filter_state(state, nnx.Not(nnx.RngState))))
            return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

        params, state = jax.eval_shape(split, jax.random.key(0), inputs)
        graphdef, is_deterministic = found[-1]
        return Structure(graphdef, params, state, is_deterministic)

    def check_params(self, params: Mapping[str, Any], prefix: str, structure: Structure) -> None:
        """Raise unless ``params`` hold the parameters and the state of a structure of this network.

        Raises:
            ValueError: naming what is missing, or the first array of another shape.
        """
        needed = {f"{prefix}$params": structure.params}
        state_name = f"{prefix}$state"
        if structure.has_state and (state_name in params or not structure.is_deterministic):
            needed[state_name] = {"state": structure.state}
        for name, expected in needed.items():
            if name not in params:
                raise ValueError(f"{self.lacks(name)} Found {sorted(params)}.")
            _check_shapes(params[name], expected, name)

    def lacks(self, name: str) -> str:
        """Return a message: the parameters that were given lack some."""
        return (
            f"The parameters of the guide of {self._names()} have no {name!r}. Pass the result of "
            "a fit of this guide; network state that svi.run leaves in its state is added by "
            "{**result.params, **result.state.mutable_state}, and lost with num_particles above 1, "
            "where fit keeps it."
        )

    def _split(self, rng_key: Array, inputs: Any) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        rngs = nnx.Rngs(rng_key)
        encoder = as_module(self.encoder, inputs, rngs)
        graphdef, state = nnx.split(encoder)
        output = jax.eval_shape(
            lambda state, inputs: nnx.merge(graphdef, state, copy=True)(inputs), state, inputs
        )
        network = Amortizer(encoder, self._blocks(output, num_rows(inputs), rngs))
        graphdef, params, *rest = nnx.split(network, nnx.Param, ...)
        return graphdef, params, rest[0]

    def _blocks(self, output: Any, batch: int, rngs: nnx.Rngs) -> dict[str, Block]:
        """Return the blocks that the encoder's output needs, by name."""
        if isinstance(output, tuple) and len(output) == 2:
            return {"joint": self._pair(output, batch)}
        if isinstance(output, Mapping):
            return self._by_name(output, batch, rngs)
        groups = [(site,) for site in self.sites] if self._ordered() else [self.sites]
        return {
            group[0].name if len(group) == 1 else "joint": self._block(
                group, output, self._reads(group), batch, rngs
            )
            for group in groups
        }

    def _by_name(self, output: Mapping[str, Any], batch: int, rngs: nnx.Rngs) -> dict[str, Block]:
        """Return the blocks of features by site, or by the plate that sites lie in."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites:
            groups.setdefault(key_of(output, site, self.plate), []).append(site)
        if set(output) != set(groups):
            raise ValueError(
                f"The encoder's features cover the sites {sorted(output)}; plate "
                f"{self.plate.name!r} has the local sites {self._names()}. Return exactly these."
            )
        if set(groups) == set(self._names()):
            pairs = ((name, tuple(sites)) for name, sites in groups.items())
            return {
                name: self._block(sites, output[name], self._reads(sites), batch, rngs)
                for name, sites in pairs
            }
        return self._by_plate(output, groups, batch, rngs)

    def _by_plate(
        self,
        output: Mapping[str, Any],
        groups: Mapping[str, list[Site]],
        batch: int,
        rngs: nnx.Rngs,
    ) -> dict[str, Block]:
        """Return a block for each plate, from the outermost; its head reads the sites before."""
        if self._ordered():
            raise ValueError(
                f"The encoder returned features of the plates {sorted(groups)}, of which each head "
                "reads all sites of the plates around it. Leave out dependencies=."
            )
        found: dict[str, Block] = {}
        before: dict[str, tuple[int, int]] = {}
        for name in sorted(groups, key=lambda name: output[name].ndim):
            sites, steps = tuple(groups[name]), output[name].ndim - 2
            found[name] = self._block(sites, output[name], dict(before), batch, rngs)
            before |= {site.name: (site.datum_size(self.plate), steps) for site in sites}
        return found

    def _reads(self, sites: tuple[Site, ...]) -> dict[str, tuple[int, int]]:
        """Return what the head of sites reads: how many values of each site, of no steps."""
        return {name: (size, 0) for name, size in self.reads.get(sites[0].name, {}).items()}

    def _ordered(self) -> bool:
        """Whether a site reads another one that is served here."""
        names = set(self._names())
        return any(names & set(reads) for reads in self.reads.values())

    def _block(
        self,
        sites: tuple[Site, ...],
        features: Any,
        reads: Mapping[str, tuple[int, int]],
        batch: int,
        rngs: nnx.Rngs,
    ) -> Block:
        """Return the block of sites; ``reads`` has of others the values and the axes of steps."""
        steps = self._steps(sites, features, batch)
        num_features, context = features.shape[-1], None
        if reads:
            sizes = [size // math.prod(steps[:depth]) for size, depth in reads.values()]
            context = Context(num_features, sum(sizes), rngs=rngs)
            num_features = context.size
        sizes = [_size_of_step(site, self.plate, len(steps)) for site in sites]
        head = self.family.head(num_features, sum(sizes), rngs=rngs)
        bounded = np.repeat([site.is_bounded for site in sites], sizes)
        if self.family.maps_bounded and bounded.any():
            head = Bounded(head, bounded)
        depths = {name: depth for name, (_, depth) in reads.items()}
        return Block(sites, self.plate, steps, depths, head, context)

    def _steps(self, sites: tuple[Site, ...], features: Any, batch: int) -> tuple[int, ...]:
        """Return the axes of the features between the data and the features themselves."""
        shape = getattr(features, "shape", None)
        if shape is None or len(shape) < 2 or shape[0] != batch:
            size = sum(site.datum_size(self.plate) for site in self.sites)
            raise ValueError(
                f"The encoder of {self._names()} in plate {self.plate.name!r} returned "
                f"{type(features).__name__ if shape is None else shape}; expected features of "
                f"shape ({batch}, k), or ({batch}, *steps, k), or a pair (loc, raw_scale) of shape "
                f"({batch}, {size}) each. Flatten what are no steps of the sites."
            )
        steps = tuple(shape[1:-1])
        for site in sites:
            found = site.datum_shape(self.plate)
            if found[: len(steps)] != steps:
                raise ValueError(
                    f"The encoder returned features of shape {shape} for site {site.name!r} in "
                    f"plate {self.plate.name!r}, which has shape {found} for each datum: its "
                    f"leading axes are not the steps {steps} of the features. Return features "
                    f"({batch}, k) of each datum, or a dict of features by site name."
                )
        return steps

    def _pair(self, output: tuple, batch: int) -> Block:
        """Return the block of an encoder that is its own head."""
        read = sorted({name for reads in self.reads.values() for name in reads})
        if read:
            raise ValueError(
                f"The encoder returned a pair (loc, raw_scale), so there is no head that could "
                f"read the sites {read}. Return features from the encoder."
            )
        size = sum(site.datum_size(self.plate) for site in self.sites)
        for part, meaning in zip(output, ("loc", "raw_scale"), strict=True):
            self._check_part(part, meaning, batch, size)
        return Block(self.sites, self.plate, (), {}, self.family.pair(), None)

    def _check_part(self, part: Any, meaning: str, batch: int, size: int) -> None:
        if isinstance(part, Mapping):
            self._check_by_site(part, meaning, batch)
        elif getattr(part, "shape", None) != (batch, size):
            sizes = {site.name: site.datum_size(self.plate) for site in self.sites}
            raise ValueError(
                f"The encoder's {meaning} has shape {getattr(part, 'shape', type(part))}; the "
                f"local sites of plate {self.plate.name!r} have sizes {sizes}, so expected "
                f"({batch}, {size}). Return that shape, or a dict of arrays by site name."
            )

    def _check_by_site(self, part: Mapping[str, Any], meaning: str, batch: int) -> None:
        if set(part) != {site.name for site in self.sites}:
            raise ValueError(
                f"The encoder's {meaning} covers the sites {sorted(part)}; plate "
                f"{self.plate.name!r} has the local sites {self._names()}. Return exactly these."
            )
        for site in self.sites:
            expected = (batch, *site.datum_shape(self.plate))
            if part[site.name].shape != expected:
                raise ValueError(
                    f"The encoder's {meaning} for site {site.name!r} in plate "
                    f"{self.plate.name!r} has shape {part[site.name].shape}; expected {expected}, "
                    "the unconstrained shape of the site with the data in front."
                )

    def _names(self) -> list[str]:
        return [site.name for site in self.sites]


def _size_of_step(site: Site, plate: Plate, num_steps: int) -> int:
    return math.prod(site.datum_shape(plate)[num_steps:])


def apply_network(
    graphdef: nnx.GraphDef, params: dict, state: dict, inputs: Any, *, train: bool
) -> tuple[Amortizer, dict[str, Any], dict]:
    """Return the network, what its blocks read of the data, and its new state.

    Args:
        graphdef: the network's static part.
        params: its parameters.
        state: its other state, such as batch statistics.
        inputs: data along the leading axis.
        train: False for evaluation mode, in which dropout is off and batch statistics are used.
    """
    network = nnx.merge(graphdef, nnx.State(params), nnx.State(state), copy=True)
    if not train:
        network.eval()
    features = network(inputs)
    new_state = nnx.to_pure_dict(nnx.state(network, nnx.Not(nnx.Param)))
    return network, features, jax.lax.stop_gradient(new_state)


def declare_network(
    network: Network, structure: Structure, prefix: str, inputs: Any, *, train: bool
) -> tuple[Amortizer, dict[str, Any]]:
    """Return a network and its features, with its parameters and state declared to NumPyro.

    Args:
        network: the network.
        structure: what it is on these inputs.
        prefix: of the names of its sites.
        inputs: data along the leading axis.
        train: see `apply_network`; in training the state is updated.

    Raises:
        ValueError: if evaluation is given parameters, but not the state that belongs to them.
    """
    fresh: dict[str, Any] = {}

    def init(rng_key: Array) -> dict:
        params, fresh["state"] = network.init(rng_key, inputs)
        return params

    params: Any = numpyro.param(f"{prefix}$params", init)
    holder: dict[str, Any] = {"state": {}}
    if structure.has_state:
        name = f"{prefix}$state"
        held = mutable(name)
        if held is None and not (fresh or train or structure.is_deterministic):
            raise ValueError(network.lacks(name))
        holder = _declare_state(name, fresh, network, inputs) if held is None else cast(Any, held)
    applied, features, state = apply_network(
        structure.graphdef, params, holder["state"], inputs, train=train
    )
    if train:
        holder["state"] = state
    return applied, features


def _declare_state(name: str, fresh: dict, network: Network, inputs: Any) -> dict[str, Any]:
    """Declare the state that was made with the parameters, or else one of its own."""
    # A key of the step would make `SVI.evaluate`, which has no state, draw other latents.
    holder: Any = fresh or {"state": network.init(jax.random.key(0), inputs)[1]}
    mutable(name, holder)
    return holder
