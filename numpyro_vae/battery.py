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
from numpyro_vae.checks.base import Finding, NotApplicableError, Subject
from numpyro_vae.report import Report
from numpyro_vae.rowwise import Rowwise

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
    names = list(MODULES if checks is None else checks)
    unknown = sorted(set(names) - set(MODULES))
    if unknown:
        raise ValueError(f"There are no checks {unknown}, choose from {list(MODULES)}.")
    if reference is None and checks is not None and "novelty" in names:
        raise ValueError(
            "The novelty check compares data with others: pass reference=, rows like those of the "
            "training, preferably held out from it."
        )
    subject = Subject(rowwise, rowwise.read(data, batch_axes), rng_key, data, batch_axes)
    calls: dict[str, Callable[[Subject], dict[str, Any]]] = {
        "importance": partial(importance.importance, num_samples=num_samples),
        "gap": partial(gap.gap, num_samples=num_samples, max_rows=max_rows),
        "calibration": partial(
            calibration.calibration, num_simulations=num_simulations, to_data=to_data
        ),
        "collapse": collapse.collapse,
        "predictive": partial(predictive.predictive, max_rows=max_rows),
    }
    skipped = {}
    if reference is not None:
        known = rowwise.read(reference, batch_axes)
        novelty.require_reference(known)
        calls["novelty"] = partial(novelty.novelty, reference=known)
    elif "novelty" in names:
        skipped["novelty"] = "it needs data to compare with, reference="
    found: dict[str, Any] = {}
    done = []
    for number, name in enumerate(MODULES):
        if name not in names or name not in calls:
            continue
        try:
            found |= calls[name](subject.with_key(number))
        except NotApplicableError as reason:
            if checks is not None:
                raise
            skipped[name] = str(reason)
            continue
        done.append(name)
    attrs: dict[str, Any] = {"num_data": len(subject.rows.chosen)}
    if "importance" in done:
        threshold = importance.khat_threshold(num_samples)
        attrs |= {"num_samples": num_samples, "khat_threshold": threshold}
    dataset = xr.Dataset(found, attrs=attrs)
    given = coords or {}
    if "interval" in dataset.dims:
        given = {"interval": list(calibration.INTERVALS), **given}
    indexed = {dim: given.get(str(dim), np.arange(n)) for dim, n in dataset.sizes.items()}
    findings: list[Finding] = []
    for name in done:
        findings += MODULES[name].find(dataset, attrs)
    return Report(dataset.assign_coords(indexed), tuple(findings), skipped)
