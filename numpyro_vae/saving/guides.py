"""What a manifest says of a guide, and the guide that is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.model.data_sets import DataSets
from numpyro_vae.saving.codec import CannotStoreError, Json, pack, told, unpack
from numpyro_vae.saving.registry import GUIDES, name_of

YOURS = "yours"  # in the place of an option that has to be passed again: what it was


def describe_guide(guide: AmortizedGuide) -> Json:
    """Return the class of a guide, and the options that it was made with.

    Raises:
        TypeError: if the class is none of this library's.
    """
    name = name_of(type(guide))
    if name not in GUIDES:
        raise TypeError(
            f"The guide is of the class {told(type(guide))}, which is not one of {list(GUIDES)}, "
            "and so cannot be made again. Use one of these, with a family of your own if need be."
        )
    options = {option: store_option(value) for option, value in _options(guide).items()}
    return {"class": name, "options": options, "family": store_option(guide.family)}


def _options(guide: AmortizedGuide) -> dict[str, Any]:
    """Return the arguments of the constructor, but for the model, and what it brings with it."""
    model = guide.model
    of_model = (model.encoder, model.inputs) if isinstance(model, DataSets) else ()
    found = {
        "encoder": None if guide.encoder in of_model else guide.encoder,
        "inputs": None if guide.inputs in of_model else guide.inputs,
        "plate": guide.plate_name,
        "segments": guide.segments,
        "condition_on": guide.condition_on,
        "dependencies": guide.dependencies,
        "global_guide": guide.global_guide,
        "create_plates": guide.create_plates,
        "prefix": guide.prefix,
    }
    if type(guide) is AmortizedGuide:
        return found | {"family": guide.family}
    family: Any = guide.family
    for field in dataclasses.fields(family):
        option = "scale" if field.name == "parameterization" else field.name
        found[option] = getattr(family, field.name)
    return found


def store_option(value: Any) -> Json:
    """Return a value as JSON, or of one that has none what it is."""
    try:
        return pack(value)
    except CannotStoreError:
        return {YOURS: told(value)}


def restore_options(
    path: str, what: str, known: Mapping[str, Json], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return options, those among them that could not be stored as they are given now.

    Args:
        path: of the folder, for messages.
        what: they are options of.
        known: what was stored.
        given: what is passed again.

    Raises:
        TypeError: if an option is not given that has to be, or does not exist.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"{path} has no {what} {unknown}, only {sorted(known)}. Leave them out.")
    again = {name: value for name, value in known.items() if _is_yours(value)}
    missing = {name: value[YOURS] for name, value in again.items() if name not in given}
    if missing:
        listed = ", ".join(f"{name}= ({found})" for name, found in missing.items())
        raise TypeError(
            f"{path} holds no code, so that {what} which are your own have to be passed again: "
            f"{listed}."
        )
    return {name: given[name] if name in given else unpack(known[name]) for name in known}


def _is_yours(stored: Json) -> bool:
    return isinstance(stored, dict) and YOURS in stored


def make_guide(
    path: str, model: Callable[..., Any], known: Json, given: Mapping[str, Any]
) -> AmortizedGuide:
    """Return a guide like the one that was described.

    Args:
        path: of the folder, for messages.
        model: its model.
        known: what `describe_guide` returned.
        given: options that are passed again.

    Raises:
        TypeError: if an option is not given that has to be, or does not exist.
        ValueError: naming an option that is given and was another one.
    """
    options = restore_options(path, "options of the guide", known["options"], given)
    make: Callable[..., AmortizedGuide] = GUIDES[known["class"]]
    guide = make(model, **options)
    found = describe_guide(guide)
    require_same_options(path, known["options"], found["options"])
    require_same_options(path, {"family": known["family"]}, {"family": found["family"]})
    return guide


def require_same_options(path: str, known: Mapping[str, Json], found: Mapping[str, Json]) -> None:
    """Raise ValueError if an option is another than it was; of code nothing is known."""
    for name, value in known.items():
        if not _is_yours(value) and found[name] != value:
            raise ValueError(
                f"{path} was saved with {name}={value}, and now it is {found[name]}. Leave it out, "
                "or pass what the posterior was trained with."
            )
