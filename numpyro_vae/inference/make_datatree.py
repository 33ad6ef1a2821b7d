"""A DataTree of rows: in memory, or written to Zarr in parts of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_vae.inference.datatree import (
    build_datatree,
    check_names,
    choose_groups,
    choose_sites,
    tree_name,
)
from numpyro_vae.inference.gathering import Gathering, Groups
from numpyro_vae.inference.labels import require_length, with_labels
from numpyro_vae.inference.regions import (
    Identity,
    Regions,
    identify,
    path_of,
    rows_of_part,
)
from numpyro_vae.inference.runner import Runner
from numpyro_vae.training.identity import digest

if TYPE_CHECKING:
    from xarray import DataTree


def make_datatree(
    runner: Runner,
    rng_key: Array,
    data: Any,
    num_samples: int,
    num_particles: int,
    marginal: bool,
    groups: Iterable[str] | None,
    var_names: Iterable[str] | None,
    coords: Mapping[str, Any] | None,
    globals_: dict[str, Any] | None = None,
    store: str | os.PathLike[str] | None = None,
) -> DataTree:
    """Return everything ArviZ reads of some rows; see `Posterior.to_datatree`.

    Args:
        runner: the trained guide.
        rng_key: the random key.
        data: the data.
        num_samples: draws of each row.
        num_particles: local draws for each log-likelihood, and those that one is resampled from.
        marginal: whether predictions are of local latents from their prior.
        groups: those wanted.
        var_names: the latent sites that are wanted.
        coords: coordinates by dimension; by default the labels of the data.
        globals_: as many draws of the global sites, given which the rows' latents are resampled by
            importance; by default both are drawn from the guide.
        store: where to write it, part by part; by default it is made in memory.
    """
    data = runner.as_trained(data)
    rows = runner.read(data, of_prior=True)
    check_names(runner.guide.sites)
    require_length(coords or {}, rows.plate, rows.num_rows)
    gathering = Gathering.plan(
        runner,
        rows,
        rng_key,
        num_samples,
        num_particles=num_particles,
        marginal=marginal,
        groups=choose_groups(groups),
        names=choose_sites(runner, var_names),
        given=globals_,
    )
    coords = with_labels(coords, gathering, data)
    if store is not None:
        tree = write_datatree(gathering, coords, store)
    else:
        found = gathering.of_rows(rows)
        gathering.warn_of_undrawn(found)
        tree = _tree(gathering, found, gathering.complete(found), coords)
    gathering.faults.warn()
    return tree


def _tree(
    gathering: Gathering, by_row: Groups, found: Groups, coords: Mapping[str, Any]
) -> DataTree:
    """Return a tree of what is found, of which some goes by row."""
    fingerprint, sites = gathering.rows.fingerprint_of_all, gathering.runner.guide.sites
    return build_datatree(found, gathering.dims(by_row), fingerprint, sites, coords)


def write_datatree(
    gathering: Gathering, coords: Mapping[str, Any], store: str | os.PathLike[str]
) -> DataTree:
    """Write everything ArviZ reads, in parts of the rows, and return it as it is on disk.

    Args:
        gathering: what is wanted.
        coords: coordinates by dimension.
        store: where to.

    Raises:
        ValueError: if a deterministic site is of all rows at once, of which there are several
            parts, or there is other data.
    """
    import xarray as xr

    rows, plate = gathering.rows, gathering.rows.plate
    at_once = gathering.runner.rows_at_once(rows, gathering.num_samples, observed=True)
    size = rows_of_part(_row_bytes(gathering), rows.num_rows, at_once)
    size = rows.num_rows if rows.data.is_whole else size
    _require_by_row(gathering, size)

    def make(start: int, stop: int, size: int) -> DataTree:
        part = rows if size == rows.num_rows else rows.part(start, stop, size)
        found = gathering.of_rows(part)
        if not start:
            gathering.warn_of_undrawn(found)
        complete = gathering.complete(found, with_all=not start)
        return _tree(gathering, found, complete, coords_of_part(coords, plate, start, stop))

    path = path_of(store)
    identity = _identity(gathering, coords)
    Regions(path, identity, tree_name(plate), rows.num_rows, size).write(make)
    return xr.open_datatree(path, engine="zarr")


def _identity(gathering: Gathering, coords: Mapping[str, Any]) -> Identity:
    return identify(
        gathering.runner,
        gathering.rows,
        gathering.rng_key,
        kind="DataTree",
        num_samples=gathering.num_samples,
        num_particles=gathering.num_particles,
        marginal=gathering.marginal,
        groups=gathering.groups,
        var_names=sorted(gathering.names),
        coords=digest({str(dim): np.asarray(coord).tolist() for dim, coord in coords.items()}),
    )


def coords_of_part(coords: Mapping[str, Any], plate: str, start: int, stop: int) -> dict[str, Any]:
    """Return coordinates in which those of the rows are of some of them, by default numbers."""
    found = {tree_name(dim): coord for dim, coord in coords.items()}
    name = tree_name(plate)
    whole = found.get(name)
    found[name] = np.arange(start, stop) if whole is None else np.asarray(whole)[start:stop]
    return found


def _require_by_row(gathering: Gathering, part_rows: int) -> None:
    """Raise if what is wanted cannot be computed in parts."""
    if gathering.derived.of_all and part_rows < gathering.rows.num_rows:
        raise ValueError(
            f"The deterministic sites {list(gathering.derived.of_all)} are computed of all rows at "
            "once, and so cannot be written in parts. Name the others with var_names=, or leave "
            "store= out."
        )


def _row_bytes(gathering: Gathering) -> int:
    """Return about how many bytes the results of a row take."""
    runner, rows = gathering.runner, gathering.rows.some
    shapes = runner.guide.reader.deterministic(rows.args, rows.kwargs, rows.held)
    derived = sum(math.prod(shapes[name]) for name in gathering.derived.by_row) / rows.num_rows
    predicts = "posterior_predictive" in gathering.groups
    values = runner.width(observed=predicts) + derived + 2
    data = sum(array.nbytes for array in rows.data.arrays) / rows.num_rows
    return int(values * gathering.num_samples * jnp.result_type(float).itemsize + data)
