"""The checks, one after another, and the report on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Array

from numpyro_vae.checks import calibration, collapse, gap, importance, novelty, predictive
from numpyro_vae.checks.base import NotApplicableError, Subject
from numpyro_vae.checks.report import Report
from numpyro_vae.inference.psis import khat_threshold
from numpyro_vae.inference.runner import Rowwise

MODULES: Mapping[str, ModuleType] = {
    "importance": importance,
    "gap": gap,
    "calibration": calibration,
    "collapse": collapse,
    "novelty": novelty,
    "predictive": predictive,
}


def run_checks(
    rowwise: Rowwise,
    rng_key: Array,
    data: Any,
    *,
    checks: Iterable[str] | None,
    num_samples: int,
    max_rows: int,
    num_simulations: int,
    reference: Any,
    to_data: Callable[[dict], Any] | None,
    batch_axes: Any,
    coords: Mapping[str, Any] | None,
) -> Report:
    """Run the checks named, or all that apply; see `Posterior.check`."""
    rowwise.require_density()
    names = _names(checks)
    for name, number in (("max_rows", max_rows), ("num_simulations", num_simulations)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1.")
    subject = Subject(rowwise, rowwise.read(data, batch_axes), rng_key, data, batch_axes)
    calls: dict[str, Callable[[Subject], dict[str, Any]]] = {
        "importance": partial(importance.importance, num_samples=num_samples),
        "gap": partial(gap.gap, num_samples=num_samples, max_rows=max_rows),
        "calibration": partial(
            calibration.calibration, num_simulations=num_simulations, to_data=to_data
        ),
        "collapse": collapse.collapse,
        "novelty": partial(
            novelty.novelty, reference=novelty.read_reference(rowwise, reference, batch_axes)
        ),
        "predictive": partial(predictive.predictive, max_rows=max_rows),
    }
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for number, name in enumerate(MODULES):
        if name not in names:
            continue
        try:
            found |= calls[name](subject.with_key(number))
        except NotApplicableError as reason:
            if checks is not None:
                raise
            skipped[name] = str(reason)
    attrs: dict[str, Any] = {"num_data": subject.rows.num_rows}
    if "importance" in names:
        threshold = khat_threshold(num_samples)
        attrs |= {"num_samples": num_samples, "khat_threshold": threshold}
    dataset = _dataset(found, attrs, coords or {})
    done = [name for name in MODULES if name in names and name not in skipped]
    findings = (finding for name in done for finding in MODULES[name].find(dataset, attrs))
    return Report(dataset, tuple(findings), skipped)


def _names(checks: Iterable[str] | None) -> list[str]:
    """Return the names of the checks to run.

    Raises:
        ValueError: if one does not exist.
    """
    names = [checks] if isinstance(checks, str) else list(MODULES if checks is None else checks)
    unknown = sorted(set(names) - set(MODULES))
    if unknown:
        raise ValueError(f"There are no checks {unknown}, choose from {list(MODULES)}.")
    return names


def _dataset(found: dict[str, Any], attrs: dict[str, Any], coords: Mapping[str, Any]) -> xr.Dataset:
    """Return all variables with coordinates for every dimension."""
    dataset = xr.Dataset(found, attrs=attrs)
    known = {"interval": list(calibration.INTERVALS), **coords}
    indexed = {dim: known.get(str(dim), np.arange(n)) for dim, n in dataset.sizes.items()}
    return dataset.assign_coords(indexed)
