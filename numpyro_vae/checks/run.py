"""Runs the checks one after another, and makes the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Array
from tqdm.auto import tqdm

from numpyro_vae.checks.base import AbstractCheck, NotApplicableError, Subject
from numpyro_vae.checks.calibration import Calibration
from numpyro_vae.checks.collapse import Collapse
from numpyro_vae.checks.gap import Gap
from numpyro_vae.checks.global_sites import Globals
from numpyro_vae.checks.importance import Importance
from numpyro_vae.checks.novelty import Novelty
from numpyro_vae.checks.predictive import Predictive
from numpyro_vae.checks.report import Report
from numpyro_vae.inference.datatree import require_known_dims
from numpyro_vae.inference.fingerprint import NAME
from numpyro_vae.inference.runner import Runner

Checks = str | AbstractCheck | Iterable[str | AbstractCheck] | None  # as `Posterior.check` takes

# In the order in which they run. A check's place gives it its random key, so that its numbers do
# not depend on which others run: a new check goes to the end.
CHECKS: Mapping[str, type[AbstractCheck]] = {
    check.name: check
    for check in (Importance, Gap, Calibration, Collapse, Novelty, Predictive, Globals)
}
QUICK = ("importance", "collapse", "predictive")
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
) -> Report:
    """Run checks; see `Posterior.check`."""
    chosen = choose_checks(checks)
    runner.require_like_scales()
    subject = Subject(runner, runner.read(data), rng_key)
    named = checks not in (None, "all")
    dataset, done, skipped = _compute(chosen, subject, progress_bar, named)
    if checks is None and runner.guide.global_names:
        skipped[Globals.name] = NOT_QUICK
    require_known_dims(coords or {}, runner.guide.sites, dataset.dims)
    dataset = _with_coords(dataset, coords or {})
    findings = [finding for check in done for finding in check.find(dataset)]
    return Report(dataset, tuple(findings), skipped, tuple(done))


def _compute(
    chosen: dict[int, AbstractCheck], subject: Subject, progress_bar: bool, named: bool
) -> tuple[xr.Dataset, list[AbstractCheck], dict[str, str]]:
    """Return what the checks compute, which did, and why others do not apply.

    Raises:
        NotApplicableError: if a check does not apply and was ``named``, or none applies.
    """
    known = {NAME: ([subject.plate], subject.rows.fingerprint)}
    dataset = xr.Dataset(coords=known, attrs={"num_data": subject.rows.num_rows})
    done, skipped = [], {}
    with tqdm(chosen.items(), disable=not progress_bar, unit="check") as bar:
        for place, check in bar:
            bar.set_description(f"check: {check.name}")
            try:
                if check.is_by_row and subject.runner.guide.no_density:
                    raise NotApplicableError(subject.runner.guide.no_density)
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


def choose_checks(checks: Checks) -> dict[int, AbstractCheck]:
    """Return the checks to run by their place in ``CHECKS``; those it does not list come after it.

    Raises:
        ValueError: if a name is unknown, a check is there twice, or there is none.
        TypeError: if an entry is neither a name nor a check.
    """
    entries: Iterable[Any]
    if checks is None:
        entries = QUICK
    elif isinstance(checks, str) and checks == "all":
        entries = CHECKS
    else:
        entries = (checks,) if isinstance(checks, str | AbstractCheck | type) else checks
    chosen: dict[str, AbstractCheck] = {}
    for check in map(make_check, entries):
        if check.name in chosen:
            raise ValueError(f"checks has {check.name!r} twice. Leave one of the two out.")
        chosen[check.name] = check
    if not chosen:
        raise ValueError(
            f"checks is empty, expected 'all' alone, or one or more of {list(CHECKS)}. For the "
            "quick ones leave it out."
        )
    places = dict.fromkeys((*CHECKS, *chosen))
    return {place: chosen[name] for place, name in enumerate(places) if name in chosen}


def make_check(entry: Any) -> AbstractCheck:
    """Return the check that an entry of ``checks=`` means; see `choose_checks`."""
    if isinstance(entry, AbstractCheck):
        return entry
    if isinstance(entry, str) and entry in CHECKS:
        return CHECKS[entry]()
    wrong = f"checks has {entry!r}, expected 'all' alone, one or more of {list(CHECKS)}"
    if isinstance(entry, str):
        raise ValueError(f"{wrong}, or checks with options such as Gap(max_rows=64).")
    raise TypeError(f"{wrong}, or an object such as Gap(max_rows=64).")


def _with_coords(dataset: xr.Dataset, coords: Mapping[str, Any]) -> xr.Dataset:
    """Return the dataset with coordinates for every dimension, by default numbers."""
    known = {dim: np.arange(size) for dim, size in dataset.sizes.items()}
    known |= {dim: coord for dim, coord in dataset.coords.items() if dim in known}
    known |= {dim: coord for dim, coord in coords.items() if dim in known}
    return dataset.assign_coords(known)
