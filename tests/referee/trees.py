"""What a DataTree has of a case, compared with the draws and the data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import xarray as xr
from program import DATA, Data
from reference import is_latent, is_local, rows_in_front
from subject import Subject, close

SAMPLED = ("chain", "draw")
ENGINES = ("h5netcdf", "netcdf4")


def datatree(subject: Subject) -> None:
    """A DataTree has every variable with its dimensions, and can be saved."""
    tree, trace = subject.tree, subject.trace
    for name, site in trace.items():
        if is_latent(site):
            _latent(tree["posterior"], name, site, subject.draws[name])
    for step in subject.case.program.steps:
        if isinstance(step, Data) and DATA in step.plates:
            _observed(tree, f"{step.name}_observed" if step.obs_mask else step.name, trace)
    if subject.has_density:
        for group in ("log_likelihood", "sample_stats"):
            for name, found in tree[group].data_vars.items():
                assert found.dims == (*SAMPLED, DATA), f"{name}: dimensions {found.dims}"
                assert np.isfinite(found.values).all(), f"{name} is not finite"
    _constants(tree, subject)
    _saved(tree, ENGINES[subject.case.seed % 2])


def variable_of(name: str) -> str:
    """Return the name of a site in a DataTree, which knows no scopes."""
    return name.replace("/", ".")


def _latent(posterior: xr.Dataset, name: str, site: dict, draws: np.ndarray) -> None:
    name = variable_of(name)
    assert name in posterior, f"{name} is not in the posterior"
    found = posterior[name]
    expected = draws
    if is_local(site):
        rows = rows_in_front(draws, site, site["fn"].event_dim)
        expected = np.moveaxis(np.asarray(rows), 0, 1)
    _dimensions(found, name, site, SAMPLED)
    close(found.values[0], expected, f"{name} in the posterior")


def _dimensions(found: xr.DataArray, name: str, site: dict, leading: tuple[str, ...]) -> None:
    """The rows come first, and each plate around a site is a dimension of its size."""
    if is_local(site):
        leading = (*leading, DATA)
    assert found.dims[: len(leading)] == leading, f"{name}: dimensions {found.dims}"
    for frame in site["cond_indep_stack"]:
        assert found.sizes.get(frame.name) == frame.size, f"{name}: sizes {dict(found.sizes)}"
    batch = len(site["fn"].batch_shape)
    given = set(found.dims) - {*SAMPLED, *(frame.name for frame in site["cond_indep_stack"])}
    assert all(dim.startswith(f"{name}_") for dim in given), f"{name}: dimensions {found.dims}"
    assert found.ndim >= batch + len(leading) - is_local(site), f"{name}: dimensions {found.dims}"


def _observed(tree: xr.DataTree, name: str, trace: dict) -> None:
    site = trace[name]
    event_dim = site["fn"].event_dim
    for group, leading in (("observed_data", ()), ("posterior_predictive", SAMPLED)):
        assert name in tree[group], f"{name} is not in {group}"
        _dimensions(tree[group][name], name, site, leading)
    shape = np.broadcast_shapes(np.shape(site["value"]), site["fn"].shape())
    rows = rows_in_front(np.broadcast_to(site["value"], shape), site, event_dim)
    close(tree["observed_data"][name].values, rows, f"{name} in observed_data")


def _constants(tree: xr.DataTree, subject: Subject) -> None:
    """The model's other arguments with a value for each row."""
    given: dict[str, Any] = dict(zip(subject.case.names, subject.args, strict=False))
    given |= subject.kwargs
    for name in ("covariate", "row_scale", "row_mask", "group"):
        if given.get(name) is not None:
            found = tree["constant_data"][name]
            assert found.dims == (DATA,), f"{name}: dimensions {found.dims}"
            np.testing.assert_array_equal(found.values, given[name])


def _saved(tree: xr.DataTree, engine: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.nc"
        tree.to_netcdf(path, engine=engine)
        with az.from_netcdf(path) as read:
            for group in tree.children:
                xr.testing.assert_equal(read[group].to_dataset(), tree[group].to_dataset())
