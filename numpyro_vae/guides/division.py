"""Whether the rows of a guide have posteriors of their own, and if not, why."""

from __future__ import annotations

from numpyro_vae.guides.reading import GuideReading
from numpyro_vae.model.plan import GuidePlan
from numpyro_vae.model.sites import ModelSites, Plate


def require_sites(reading: GuideReading, plan: GuidePlan) -> None:
    """Raise ValueError if a guide lacks a latent site of the model."""
    latent = {*plan.globals, *(site.name for site in plan.local)}
    missing = sorted(latent - reading.sites.keys())
    if missing:
        raise ValueError(
            f"The guide has no sites {missing}, which are latent in the model; it has "
            f"{sorted(reading.sites)}. Declare them in the guide, by the same names."
        )


def require_same_rows(reading: GuideReading, sites: ModelSites, plate: Plate) -> None:
    """Raise ValueError if a guide of the whole has other rows than the data."""
    for name, site in sites.sites.items():
        known = reading.sites.get(name)
        if known is None or plate.name not in site.plates or site.is_observed:
            continue
        shape = site.batch_shape + site.event_shape
        if known.shape != shape:
            raise ValueError(
                f"The guide has site {name!r} with shape {known.shape}, and the model with {shape} "
                f"for these data: the guide knows the rows of plate {plate.name!r} that it was "
                "trained with. Pass those; an amortized guide takes any."
            )


def why_joint(reading: GuideReading, plan: GuidePlan) -> str:
    """Return why the local posteriors of a guide are not independent given its global sites.

    Args:
        reading: what the guide holds.
        plan: what the model does.
    """
    local, plate = {site.name for site in plan.local}, plan.plate.name
    if not local and plan.sites.enumerated(plate):
        return ""  # as nothing of a row is left to the guide
    if not local:
        return (
            "The model has no latent sites in a plate, so there are no posteriors of rows; what "
            "can be said is said of the whole by the globals check and repair_globals."
        )
    outside = sorted(name for name in local if plate not in reading.sites[name].plates)
    joint = sorted(
        {
            other
            for name in local
            for other in reading.origins(name)
            if _is_auxiliary(reading, other)
        }
    )
    turned = sorted(name for name in plan.globals if reading.origins(name) & local)
    if not (outside or joint or turned):
        return ""
    why = f"the sites {outside} of the guide lie outside of plate {plate!r}"
    if turned:
        why = f"the guide draws the global sites {turned} given the local ones"
    if joint:
        why = f"the guide draws the local sites {sorted(local)} jointly for all rows, from {joint}"
    return (
        f"The rows have no posteriors of their own: {why}. So there are no weights of each row, "
        "nor checks or repairs of it; what can be said is said of the whole by the globals check "
        "and repair_globals. For checks by row use AutoNormal, or an amortized guide."
    )


def _is_auxiliary(reading: GuideReading, name: str) -> bool:
    return name in reading.sites and reading.sites[name].is_auxiliary
