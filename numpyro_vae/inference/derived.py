"""Deterministic sites, for any rows of data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.inference import quantities
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.deterministic import Derived
from numpyro_vae.model.sites import ModelSites
from numpyro_vae.model.trace import Rows as HeldRows

PROBE = 9973  # rows of data that nothing else in a model is as many as


def derived_sites(runner: Runner, rows: Rows) -> Derived:
    """Return how the deterministic sites of a model are computed of rows."""
    guide = runner.guide
    sites = guide.reader.sites(rows.args, rows.kwargs, rows.held)
    if not sites.deterministic:
        return Derived({}, (), (), {})
    if rows.data.is_whole:
        return _divide(guide, sites, rows.args, rows.kwargs, rows.held)
    probe = _of_probe(rows)
    try:
        derived = _divide(guide, guide.reader.sites(*probe), *probe, is_probed=True)
    except Exception:  # of any kind: a model may not run with so many rows
        probe = rows.args, rows.kwargs, rows.held
        derived = _divide(guide, sites, *probe)
    return derived.with_mixed(_mixed(runner, rows, derived))


def _divide(
    guide: AbstractGuide,
    sites: ModelSites,
    args: tuple,
    kwargs: dict[str, Any],
    held: HeldRows,
    *,
    is_probed: bool = False,
) -> Derived:
    shapes = guide.reader.deterministic(args, kwargs, held)
    groups = tuple(guide.segments)
    return Derived.of(sites, shapes, guide.plate.name, groups, is_probed=is_probed)


def _mixed(runner: Runner, rows: Rows, derived: Derived) -> list[str]:
    """Return the sites of which a row has other values where the batch has other rows.

    So have a centered latent and a running sum, which are computed of all rows at once. Two rows
    are looked at, one as the first of a batch and one as the last.
    """
    if rows.num_rows < 3 or not derived.by_row or rows.is_unobserved:
        return []  # draws from the prior differ by batch, so that nothing can be compared
    key = jax.random.key(0)
    globals_ = runner.draw_globals(key, rows, 1)
    axes = tuple(derived.by_row.items())
    run = partial(runner.per_batch, quantities.predict, num_samples=1, row_axis=1, derived=axes)
    both, first, last = (
        run(rows.choose(pair), key, globals_, batch_size=2)["posterior"]
        for pair in ([0, 2], [0, 1], [1, 2])
    )

    def differ(name: str) -> bool:
        pairs = ((both[name][:, 0], first[name][:, 0]), (both[name][:, 1], last[name][:, 1]))
        return not all(np.allclose(*pair, rtol=1e-4, equal_nan=True) for pair in pairs)

    return [name for name in derived.by_row if differ(name)]


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
            given, needed = {**globals_, **drawn}, rows.in_memory() if drawn else rows
            options = {"num_samples": num_samples, "names": names}
            found |= runner.once(quantities.derive, needed, rng_key, given, **options)
    return found
