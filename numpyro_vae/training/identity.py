"""What tells one fit from another, so that none goes on from a checkpoint that is not its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from numpyro.infer.svi import SVIState

from numpyro_vae.data.devices import ONE_DEVICE, Devices
from numpyro_vae.model.provenance import inner_jaxprs
from numpyro_vae.training.simulations import SimulationSource
from numpyro_vae.training.sources import Source
from numpyro_vae.training.step import Trainer

STEP = "what a step computes, of model, guide, objective and optimizer"


def identify(
    trainer: Trainer,
    source: Source,
    state: SVIState,
    options: Mapping[str, Any],
    start: Mapping[str, Any],
) -> dict[str, str]:
    """Return by name what tells a fit from others, whatever the number of its epochs.

    Args:
        trainer: of the fit.
        source: its data; of an iterable the first batch is looked at.
        state: its first state.
        options: plain ones.
        start: options that hold arrays.
    """
    batch = like = source.first()
    known: dict[str, Any] = {
        "batch_size": len(batch.indices),
        "num_data": batch.num_data,
        "plate": batch.plate,
        "freeze": sorted(trainer.frozen),
        **options,
    }
    if isinstance(source, SimulationSource):
        known["simulations"] = replace(source.simulations, like=None, to_data=None)
        like = source.shapes(state)
    like = replace(like, layout=replace(like.layout, devices=ONE_DEVICE))  # whichever they are
    params = jax.tree.leaves_with_path(jax.eval_shape(trainer.params, state))
    shapes = {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in params}
    form = [f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(state)]
    devices = batch.layout.devices
    data = (source.data.arrays, source.data.layout.static, source.data.layout.axes)
    parts = {"data": data, **start}
    fingerprints = {name: _of_hosts(devices, digest(x)) for name, x in parts.items()}
    return {
        **{f"the shape of parameter {name}": shape for name, shape in shapes.items()},
        **{name: repr(value) for name, value in known.items()},
        **{f"the fingerprint of {name}": value for name, value in fingerprints.items()},
        "the form of the optimizer's state": digest(form),
        STEP: digest_of_program(trainer.jaxpr_of_step(*map(_shapes, (state, like)))),
    }


def digest(tree: Any) -> str:
    """Return a fingerprint of the values of all arrays in a pytree, and of what else is in it.

    Example:
        >>> digest({"a": np.arange(3)}) == digest({"a": np.arange(3) + 1})
        False
    """
    found = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = _numbers(leaf)
        described = repr(leaf) if array is None else f"{array.dtype} {array.shape}"
        found.update(f"{jax.tree_util.keystr(path)} {_plain(described)}".encode())
        if array is not None:
            found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.hexdigest()


def _shapes(tree: Any) -> Any:
    """Return a pytree with shapes for arrays, wherever these lie."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False)),
        tree,
    )


def _of_hosts(devices: Devices, fingerprint: str) -> str:
    """Return one fingerprint for those of all hosts."""
    if devices.num_hosts == 1:
        return fingerprint
    return digest(devices.gather(np.frombuffer(bytes.fromhex(fingerprint), np.uint8)))


def digest_of_program(jaxpr: ClosedJaxpr) -> str:
    """Return a fingerprint of the operations of a program and of the constants in them.

    They are taken in any order, as Python's sets give them another one in each process.
    """
    operations = sorted(map(_plain, _operations(jaxpr.jaxpr)))
    return digest((operations, sorted(map(digest, jaxpr.consts))))


def _operations(jaxpr: Any) -> Iterator[str]:
    """Yield the operations of a jaxpr that hold no others, without the names of variables."""
    for eqn in jaxpr.eqns:
        inner = inner_jaxprs(eqn)
        for found in inner:
            yield from _operations(found)
        if not inner:
            inputs = [getattr(var, "val", var.aval) for var in eqn.invars]
            yield f"{eqn.primitive} {inputs} {[var.aval for var in eqn.outvars]} {eqn.params}"


def _plain(text: str) -> str:
    """Return a text without the addresses of objects."""
    return re.sub(r"0x[0-9a-f]+", "", text)


def _numbers(leaf: Any) -> np.ndarray | None:
    """Return the numbers of an array, also of one of random keys; None of what is none."""
    if not hasattr(leaf, "dtype"):
        return None
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
