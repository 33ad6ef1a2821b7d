"""Runs the checks one after another, and makes the report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import xarray as xr
from jaxtyping import Array
from tqdm.auto import tqdm

from numpyro_vae.checks.base import AbstractCheck, NotApplicableError, Subject
from numpyro_vae.checks.choose import Checks, choose_checks
from numpyro_vae.checks.global_sites import Globals
from numpyro_vae.checks.report import Report
from numpyro_vae.checks.stored import (
    StoredChecks,
    report_of,
    require_applicable,
    with_coords,
)
from numpyro_vae.inference.datatree import require_known_dims
from numpyro_vae.inference.labels import require_length, with_row_labels
from numpyro_vae.inference.runner import Runner

NOT_QUICK = (
    "it takes longer; pass checks='globals' and the rows of the fit to judge the guide of the "
    "global latents"
)


def run_checks(
    runner: Runner,
    rng_key: Array,
    data: Any,
    checks: Checks,
    *,
    progress_bar: bool,
    coords: Mapping[str, Any] | None,
    store: str | os.PathLike[str] | None = None,
) -> Report:
    """Run checks; see `Posterior.check`."""
    chosen = choose_checks(checks)
    runner.require_like_scales()
    data = runner.as_trained(data)
    subject = Subject(runner, runner.read(data), rng_key)
    if checks is None and not runner.guide.local_sites:
        chosen = choose_checks("globals")
    named = checks not in (None, "all")
    judges_globals = checks is not None or not runner.guide.local_sites
    others = {} if judges_globals or not runner.guide.global_names else {Globals.name: NOT_QUICK}
    coords = with_row_labels(coords, data, runner.batch_axes, subject.plate)
    require_length(coords, subject.plate, subject.rows.num_rows)
    if store is not None:
        stored = StoredChecks(chosen, subject, progress_bar, named, coords, others)
        dataset, done, skipped = stored.write(store)
    else:
        dataset, done, skipped = _compute(chosen, subject, progress_bar, named)
        require_known_dims(coords, runner.guide.sites, dataset.dims)
        dataset = with_coords(dataset, coords)
    return report_of(dataset, done, skipped | others)


def _compute(
    chosen: dict[int, AbstractCheck], subject: Subject, progress_bar: bool, named: bool
) -> tuple[xr.Dataset, list[AbstractCheck], dict[str, str]]:
    """Return what the checks compute, which did, and why others do not apply.

    Raises:
        NotApplicableError: if a check does not apply and was ``named``, or none applies.
    """
    dataset, done, skipped = subject.empty(), [], {}
    with tqdm(chosen.items(), disable=not progress_bar, unit="check") as bar:
        for place, check in bar:
            bar.set_description(f"check: {check.name}")
            try:
                require_applicable(check, subject)
                found = check.compute(subject.with_key(place))
            except NotApplicableError as reason:
                if named:
                    raise
                skipped[check.name] = str(reason)
                continue
            dataset = dataset.assign(found.variables).assign_attrs(found.attrs)
            done.append(check)
    if not done:
        raise NotApplicableError(next(iter(skipped.values())))
    return dataset, done, skipped
