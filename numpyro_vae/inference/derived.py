"""Deterministic sites, for any rows of data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.inference import quantities
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.deterministic import Derived

PROBE = 9973  # rows of data that nothing else in a model is as many as


def derived_sites(runner: Runner, rows: Rows) -> Derived:
    """Return how the deterministic sites of a model are computed of rows."""
    guide = runner.guide
    sites = guide.reader.sites(rows.args, rows.kwargs, rows.held)
    if not sites.deterministic:
        return Derived({}, (), (), {})
    groups, plate = tuple(guide.segments), guide.plate.name
    if not rows.data.is_whole:
        args, kwargs, held = _of_probe(rows)
        with suppress(Exception):  # of any kind: a model may not run with so many rows
            probed = guide.reader.sites(args, kwargs, held)
            shapes = guide.reader.deterministic(args, kwargs, held)
            return Derived.of(probed, shapes, plate, groups, is_probed=True)
    shapes = guide.reader.deterministic(rows.args, rows.kwargs, rows.held)
    return Derived.of(sites, shapes, plate, groups, is_probed=False)


def _of_probe(rows: Rows) -> tuple[tuple, dict[str, Any], dict]:
    """Return what stands for a model's arguments with so many rows, and for the rows it selects."""
    axes = rows.data.layout.axes if not rows.subsamples else (None,) * len(rows.data.arrays)
    arrays = [
        jax.ShapeDtypeStruct(
            x.shape if axis is None else (*x.shape[:axis], PROBE, *x.shape[axis:][1:]), x.dtype
        )
        for x, axis in zip(rows.data.arrays, axes, strict=True)
    ]
    args, kwargs = rows.data.layout.whole(arrays)
    static = {name: value for name, value in rows.kwargs.items() if name not in kwargs}
    indices = jax.ShapeDtypeStruct((PROBE,), jnp.arange(1).dtype)
    size = rows.num_rows if rows.subsamples else PROBE
    return args, kwargs | static, {rows.plate: (size, indices)}


def derive_whole(
    runner: Runner,
    rows: Rows,
    rng_key: Array,
    derived: Derived,
    globals_: Mapping[str, Array],
    local: Mapping[str, np.ndarray],
    num_samples: int,
) -> dict[str, np.ndarray]:
    """Return deterministic sites that have no value for each row, ``(num_samples, ...)``.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        derived: how the sites are computed.
        globals_: draws of the global sites.
        local: draws of the local sites, ``(num_samples, *batch_shape, *event_shape)``.
        num_samples: how many there are.
    """
    found: dict[str, np.ndarray] = {}
    for names, drawn in ((derived.of_globals, {}), (derived.of_all, local)):
        if names:
            given = {**globals_, **drawn}
            options = {"num_samples": num_samples, "names": names}
            found |= runner.once(quantities.derive, rows, rng_key, given, **options)
    return found
