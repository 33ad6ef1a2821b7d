"""The sites of a data set, under `jax.vmap`, shown to the handlers around as those of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from numpyro_vae.model.stacked import Axes, Stacked, peeled, stacked_support
from numpyro_vae.model.trace import event_shape_of, mask_of, with_event
from numpyro_vae.numpyro_internals import is_improper, outwards


class DataSet(outwards):
    """Shows the sites of a data set, which stands for all of them, to the handlers around.

    Args:
        plate: of the data sets.
        number: that of the data set, under `jax.vmap`.
        lengths: by plate, how many of its rows are no padding.
    """

    def __init__(self, plate: Any, number: Array, lengths: Mapping[str, Array]):
        self.plate, self.number, self.lengths = plate, number, lengths
        self.plates: dict[str, int] = {}
        self.sites: list[tuple[bool, tuple[str, ...]]] = []  # observed or not, plates by their dims
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        """Let the handlers around see what all data sets have of a site."""
        if msg["type"] in ("mutable", "control_flow"):
            raise ValueError(_no_place(msg))
        if msg["type"] == "plate":
            self.plates[msg["name"]] = msg["args"][0]
        if msg["type"] == "sample":
            self.sites.append((msg["is_observed"], _names(msg)))
            msg["value"], msg["stop"] = self._sample(msg), True
        if msg["type"] == "deterministic":
            self._send_value(msg)
            msg["stop"] = True

    def postprocess_message(self, msg: Any) -> None:
        """Give each data set random keys of its own."""
        if msg["type"] == "prng_key" and msg["value"] is not None:
            msg["value"] = jax.random.fold_in(msg["value"], self.number)

    def check_lengths(self) -> None:
        """Raise if sizes are given of plates that the model does not have, or beyond theirs."""
        wrong = sorted(set(self.lengths) - set(self.plates))
        if wrong:
            raise ValueError(
                f"sizes= names the plates {wrong}; the model has {sorted(self.plates)}. Name these."
            )

    def set_plate(self) -> str | None:
        """Return the plate of the elements of a data set if it is a set; None if it is none.

        It is one if all observations lie in one plate, and no latent does.
        """
        seen = {names for is_observed, names in self.sites if is_observed}
        latent = {name for is_observed, names in self.sites if not is_observed for name in names}
        plates = next(iter(seen)) if len(seen) == 1 else ()
        return plates[0] if len(plates) == 1 and plates[0] not in latent else None

    def _sample(self, msg: dict[str, Any]) -> Array:
        """Return the value of a site in a data set, of which the handlers around decide."""
        _check_site(msg)
        fn, value = self._distribution(msg)
        shape, support = fn.batch_shape + fn.event_shape, peeled(fn.support)[0]
        mask = mask_of(fn, as_a_whole=False)
        parts = {"fn": fn, "mask": mask, "scale": msg["scale"], "value": value}
        parts["support"] = support if jax.tree.leaves(support) else None

        def message(parts: Any, axes: Any, num_sets: int) -> dict[str, Any]:
            bounds = support if parts["support"] is None else parts["support"]
            bounds = stacked_support(bounds, axes["support"], len(shape))
            found = {name: _every(parts[name], axes[name], num_sets) for name in ("mask", "value")}
            return {
                **msg,
                "fn": Stacked(
                    parts["fn"], axes["fn"], bounds, found["mask"], num_sets, _names(msg)
                ),
                "value": found["value"],
                "scale": parts["scale"],
                "plate_to_scale": {} if parts["scale"] is None else {None: parts["scale"]},
                "kwargs": {"rng_key": None, "sample_shape": ()},
            }

        return self._send(message, parts, _like(fn) if value is None else value)

    def _send_value(self, msg: dict[str, Any]) -> None:
        """Let the handlers around see what a deterministic site is in all data sets."""

        def message(parts: Any, axes: Any, num_sets: int) -> dict[str, Any]:
            return {**msg, "value": _every(parts["value"], axes["value"], num_sets)}

        value = jnp.asarray(msg["value"])
        self._send(message, {"value": value}, value)

    def _distribution(self, msg: dict[str, Any]) -> tuple[Any, Any]:
        """Return a site's distribution, padding masked, and value, each of the shape of both."""
        fn, value = msg["fn"], msg["value"]
        fn = fn.expand(msg["kwargs"].get("sample_shape", ()) + fn.batch_shape)
        if value is not None:
            event = event_shape_of({**msg, "fn": fn})
            fn = with_event(fn, event)
            batch = jnp.shape(value)[: jnp.ndim(value) - len(event)]
            fn = fn.expand(jnp.broadcast_shapes(batch, fn.batch_shape))
            value = jnp.broadcast_to(value, fn.batch_shape + event)
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.lengths:
                fn = fn.mask(_rows_there(msg, frame, self.lengths[frame.name]))
        return fn, value

    def _send(
        self, message: Callable[..., dict[str, Any]], parts: dict[str, Any], like: Any
    ) -> Array:
        """Send a message of all data sets, and return its value in this one.

        The rule by which `jax.vmap` is to batch a function is where all data sets are at hand.

        Args:
            message: makes it, from the parts with an axis of data sets where they have one, which
                have one, and the number of data sets.
            parts: what it is made of, in this data set.
            like: an array of the shape and type of its value in a data set.
        """
        leaves = {name: jax.tree.leaves(part) for name, part in parts.items()}
        trees = {name: jax.tree.structure(part) for name, part in parts.items()}
        shape, dtype = jnp.shape(like), jnp.result_type(like)

        @custom_vmap
        def value_of(number: Array, leaves: dict[str, list[Any]]) -> Array:
            del number, leaves
            return jnp.zeros(shape, dtype)

        @value_of.def_vmap
        def value_of_all(
            num_sets: int, batched: list[Any], number: Array, leaves: dict[str, list[Any]]
        ) -> tuple[Array, bool]:
            del number  # which differs by data set, so that this rule is asked for
            whole = {name: jax.tree.unflatten(trees[name], leaves[name]) for name in leaves}
            axes = {name: _axes(flags) for name, flags in batched[1].items()}
            made = message(whole, axes, num_sets)
            sent = self.send({**made, "cond_indep_stack": [], "stop": False}, self.plate)
            return jnp.asarray(sent["value"], dtype), True

        return value_of(self.number, leaves)


def _names(msg: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the plates around a site, by their dims."""
    return tuple(frame.name for frame in sorted(msg["cond_indep_stack"], key=lambda x: x.dim))


def _rows_there(msg: dict[str, Any], frame: Any, length: Array) -> Array:
    """Return which rows of a plate are no padding, to be broadcast to the batch of a site.

    Args:
        msg: of the site.
        frame: of the plate.
        length: how many of its rows there are, or how many for each row of another plate.
    """
    there = jnp.arange(frame.size) < length[..., None]
    if not length.ndim:
        return there.reshape(-1, *[1] * (-frame.dim - 1))
    others = [x for x in msg["cond_indep_stack"] if x.name != frame.name and x.size == len(length)]
    if len(others) != 1:
        raise ValueError(
            f"sizes= gives plate {frame.name!r} the length of each of {len(length)} rows of "
            f"another plate, but site {msg['name']!r} lies in the plates {list(_names(msg))}, of "
            f"which {len(others)} others have that length. Give one length for each data set, or "
            "nest the plate in one other plate of that length."
        )
    outer = others[0]
    there = there if outer.dim < frame.dim else there.T
    first, last = sorted((outer.dim, frame.dim))
    rows, columns = there.shape
    return there.reshape(rows, *[1] * (last - first - 1), columns, *[1] * (-last - 1))


def _axes(flags: list[bool]) -> Axes:
    """Return by leaf the axis of data sets."""
    return tuple(0 if flag else None for flag in flags)


def _every(x: Any, axes: Axes, num_sets: int) -> Any:
    """Return an array with an axis of data sets, whether it had one or not."""
    if x is None or axes[0] is not None:
        return x
    return jnp.broadcast_to(x, (num_sets, *jnp.shape(x)))


def _like(fn: Any) -> Any:
    """Return the shape and type of a draw."""
    shape = fn.batch_shape + fn.event_shape
    if is_improper(fn):  # which has no sampler
        return jax.ShapeDtypeStruct(shape, jnp.result_type(float))
    return jax.ShapeDtypeStruct(shape, jax.eval_shape(fn.sample, jax.random.key(0)).dtype)


def _check_site(msg: dict[str, Any]) -> None:
    """Raise if a site is a discrete latent, or its entries are scaled by factors of their own."""
    if jnp.ndim(msg["scale"]) if msg["scale"] is not None else 0:
        raise ValueError(
            f"Site {msg['name']!r} is scaled by an array of shape {jnp.shape(msg['scale'])}; a "
            "data set has one factor for all entries of a site. Scale by a number, or write "
            "weights of observations into a numpyro.factor."
        )
    if not msg["is_observed"] and msg["value"] is None and msg["fn"].support.is_discrete:
        raise ValueError(
            f"Site {msg['name']!r} is a discrete latent, which a guide of data sets cannot have. "
            "Sum over its values in the likelihood, as with a dist.MixtureSameFamily."
        )


def _no_place(msg: dict[str, Any]) -> str:
    """Return why a message has no place in a data set."""
    name = msg.get("name")
    if msg["type"] == "mutable":
        return (
            f"The model has mutable state {name!r}, which would be another one for each data set. "
            "Use a network without, such as one with LayerNorm for BatchNorm."
        )
    return (
        f"The model of a data set has the control flow {name!r}, such as a scan, whose sites "
        "cannot be told by data set. Write it without sites inside (jax.lax.scan of what is "
        "sampled before), or put the plate of data sets into the scan's body by hand."
    )
