"""Which checks there are, and which are meant by ``checks=``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from numpyro_vae.checks.base import AbstractCheck
from numpyro_vae.checks.calibration import Calibration
from numpyro_vae.checks.collapse import Collapse
from numpyro_vae.checks.gap import Gap
from numpyro_vae.checks.global_sites import Globals
from numpyro_vae.checks.importance import Importance
from numpyro_vae.checks.novelty import Novelty
from numpyro_vae.checks.predictive import Predictive

Checks = str | AbstractCheck | Iterable[str | AbstractCheck] | None  # as `Posterior.check` takes

# In the order in which they run. A check's place gives it its random key, so that its numbers do
# not depend on which others run: a new check goes to the end.
CHECKS: Mapping[str, type[AbstractCheck]] = {
    check.name: check
    for check in (Importance, Gap, Calibration, Collapse, Novelty, Predictive, Globals)
}
QUICK = ("importance", "collapse", "predictive")


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
