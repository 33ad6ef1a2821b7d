"""An encoder and its head as one network: built, checked, initialized and applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_vae.families import AbstractFamily
from numpyro_vae.sites import Plate, Site

Encoder = nnx.Module | Callable[..., nnx.Module]


class _EncoderWithHead(nnx.Module):
    """Features through the head; a pair as the encoder gave it, packed to one row a datum."""

    def __init__(self, encoder: nnx.Module, head: nnx.Module | None, names: Sequence[str]):
        self.encoder, self.head, self.names = encoder, head, tuple(names)

    def __call__(self, inputs: Any) -> Any:
        output = self.encoder(inputs)
        if self.head is not None:
            return self.head(output)
        return tuple(self._pack(part) for part in output)

    def _pack(self, part: Array | Mapping[str, Array]) -> Float[Array, "batch size"]:
        if not isinstance(part, Mapping):
            return part
        rows = [part[name].reshape(part[name].shape[0], -1) for name in self.names]
        return jnp.concatenate(rows, axis=-1)


@dataclass(frozen=True)
class Structure:
    """A network without its values: the static part, and the shapes of the others."""

    graphdef: nnx.GraphDef
    params: dict
    state: dict

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


@dataclass(frozen=True)
class Network:
    """A guide's network: an encoder, and a head where the encoder returns features.

    Args:
        encoder: a module, or a builder; see `numpyro_vae.encoders.base`.
        family: what the head's outputs mean.
        sites: the local sites, in the model's order.
        plate: the local plate.
    """

    encoder: Encoder
    family: AbstractFamily
    sites: tuple[Site, ...]
    plate: Plate

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
            found.append(graphdef)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

        params, state = jax.eval_shape(split, jax.random.key(0), inputs)
        return Structure(found[-1], params, state)

    def check_params(self, params: Mapping[str, Any], prefix: str, inputs: Any) -> None:
        """Raise unless ``params`` hold this network's parameters and state.

        Raises:
            ValueError: naming what is missing, or the first array of another shape.
        """
        structure = self.structure(inputs)
        needed = {f"{prefix}$params": structure.params}
        if structure.has_state:
            needed[f"{prefix}$state"] = {"state": structure.state}
        for name, expected in needed.items():
            if name not in params:
                raise ValueError(
                    f"The parameters of the guide of {self._names()} have no {name!r}, found "
                    f"{sorted(params)}. Pass the result of a fit of this guide; network state "
                    "that svi.run leaves in its state is added by "
                    "{**result.params, **result.state.mutable_state}."
                )
            _check_shapes(params[name], expected, name)

    def _split(self, rng_key: Array, inputs: Any) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        rngs = nnx.Rngs(rng_key)
        encoder = self.encoder
        if not isinstance(encoder, nnx.Module):
            encoder = encoder(inputs, rngs=rngs)
        if not isinstance(encoder, nnx.Module):
            raise TypeError(
                f"The encoder must be a flax nnx.Module or return one when called as "
                f"encoder(example_inputs, rngs=rngs); found {type(encoder).__name__}."
            )
        head = self._head(encoder, inputs, rngs)
        network = _EncoderWithHead(encoder, head, [site.name for site in self.sites])
        graphdef, params, *state = nnx.split(network, nnx.Param, ...)
        return graphdef, params, state[0]

    def _head(self, encoder: nnx.Module, inputs: Any, rngs: nnx.Rngs) -> nnx.Module | None:
        """Return the head that the encoder's output needs: None if it is a pair already."""
        graphdef, state = nnx.split(encoder)
        output = jax.eval_shape(
            lambda state, inputs: nnx.merge(graphdef, state, copy=True)(inputs), state, inputs
        )
        batch = jax.tree.leaves(inputs)[0].shape[0]
        size = sum(site.datum_size(self.plate) for site in self.sites)
        if isinstance(output, tuple) and len(output) == 2:
            for part, meaning in zip(output, ("loc", "raw_scale"), strict=True):
                self._check_part(part, meaning, batch, size)
            return None
        if not hasattr(output, "shape") or len(output.shape) != 2 or output.shape[0] != batch:
            found = getattr(output, "shape", type(output).__name__)
            raise ValueError(
                f"The encoder of {self._names()} in plate {self.plate.name!r} returned {found}; "
                f"expected features of shape ({batch}, k), or a pair (loc, raw_scale) of shape "
                f"({batch}, {size}) each. Flatten all axes but the first."
            )
        return self.family.head(output.shape[1], size, rngs=rngs)

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


def apply_network(
    graphdef: nnx.GraphDef, params: dict, state: dict, inputs: Any, *, train: bool
) -> tuple[Any, dict]:
    """Return the network's raw outputs and its new state.

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
    raw = network(inputs)
    new_state = nnx.to_pure_dict(nnx.state(network, nnx.Not(nnx.Param)))
    return raw, jax.lax.stop_gradient(new_state)
