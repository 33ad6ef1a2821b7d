"""Random models: by seed a program, its data and a guide, made of features with names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from arguments import as_float64, draw_arguments, draw_guide
from case import Case
from features import FEATURES, Choices
from kinds import ENUMERATED, LATENTS, OBSERVED
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from program import (
    BATCH,
    DATA,
    NUM_DATA,
    NUM_GROUPS,
    Auxiliary,
    Data,
    Deterministic,
    Factor,
    Latent,
    Modifiers,
    Param,
    PlateSpec,
    Predictor,
    Program,
    Step,
)

# -- plates -----------------------------------------------------------------------------------


def _plates(choices: Choices) -> tuple[PlateSpec, ...]:
    others = ["columns"] if choices.has("second_plate") else []
    if others and choices.has("third_plate"):
        others.append("layers")
    sizes = {DATA: NUM_DATA, "columns": 4, "layers": 2}
    names = [str(name) for name in choices.rng("dims").permutation([DATA, *others])]
    dims: dict[str, int | None] = {name: -1 - place for place, name in enumerate(names)}
    if not others and choices.has("dim_left"):
        dims[DATA] = -2
    elif not others and choices.has("implicit_dim"):
        dims[DATA] = None
    subsampled = {}
    if choices.has("subsample"):
        subsampled[DATA] = BATCH
        if others and choices.has("subsample_second"):
            subsampled["columns"] = 2
    order = [str(name) for name in choices.rng("nesting").permutation(names)]
    return tuple(PlateSpec(name, sizes[name], dims[name], subsampled.get(name)) for name in order)


def _around(choices: Choices, plates: tuple[PlateSpec, ...], feature: str, name: str) -> tuple:
    """Return the local plate, and perhaps others."""
    others = [plate.name for plate in plates if plate.name != DATA]
    chosen = {DATA}
    if others and choices.has(feature, name):
        chosen |= set(choices.some(others, name, "plates"))
    return tuple(plate.name for plate in plates if plate.name in chosen)


# -- latent sites -----------------------------------------------------------------------------


def _global_sites(choices: Choices, plates: tuple[PlateSpec, ...]) -> list[Latent]:
    if not choices.has("globals"):
        return []
    others = tuple(plate.name for plate in plates if plate.name != DATA)
    sites: list[Latent] = []
    for name in ("g0", "g1")[: choices.rng("globals").integers(1, 3)]:
        inside = others if others and choices.has("global_in_plate", name) else ()
        event = (2,) if choices.has("global_vector", name) else ()
        kind = "positive" if choices.has("global_positive", name) else "real"
        scale = 0.7 if choices.has("scale_global", name) else None
        sites.append(Latent(name, kind, inside, event, Predictor(), Modifiers(scale)))
    return sites


def _groups(choices: Choices) -> tuple[list[PlateSpec], list[Latent]]:
    """Return a plate of groups, and a site with a value for each; a row reads that of its own."""
    if not choices.has("grouped"):
        return [], []
    plate = PlateSpec("groups", NUM_GROUPS, -1)
    kind = "positive" if choices.has("global_positive", "h") else "real"
    return [plate], [Latent("h", kind, (plate.name,))]


def _event(choices: Choices, name: str) -> tuple[int, ...]:
    if choices.has("event_matrix", name):
        return (2, 3)
    return (2,) if choices.has("event_vector", name) else ()


def _local(
    choices: Choices, name: str, plates: tuple[PlateSpec, ...], earlier: list[Latent]
) -> Latent:
    around = _around(choices, plates, "nested_latent", name)
    reads = [
        site.name
        for site in earlier
        if set(site.plates) <= set(around)
        and choices.has(f"latent_reads_{'latent' if DATA in site.plates else 'global'}", name)
    ]
    entries = choices.has("mask_latent_entries", name)
    kind = "real" if entries else choices.kind(tuple(LATENTS), "real", name)
    bounded = not entries and choices.has("bounded_rows", name)
    kind = "interval" if bounded else kind
    event = () if entries or bounded else _event(choices, name)
    extra = 2 if not entries and choices.has("extra_batch", name) else None
    scaled = name if choices.has("scale_mixed", name) else "all latents"
    mask = _latent_mask(choices, name, kind)
    by_fn = mask == "rows" and choices.has("mask_method", name)
    modifiers = Modifiers(_scale(choices, "latent", scaled), mask, by_fn)
    in_group = "grouped" in choices.used and choices.has("latent_reads_group", name)
    predictor = Predictor(tuple(reads), group="h" if in_group else None)
    scope = None if entries or not choices.has("scoped", name) else "inner"
    name = name if scope is None else f"{scope}/{name}"
    return Latent(name, kind, around, event, predictor, modifiers, entries, extra, bounded, scope)


def _scale(choices: Choices, of: str, where: str) -> float | str | None:
    found = choices.first((f"scale_{of}", f"scale_{of}_rows"), where)
    return {None: None, f"scale_{of}": 0.6, f"scale_{of}_rows": "rows"}[found]


def _latent_mask(choices: Choices, name: str, kind: str) -> str | None:
    if kind == "real" and choices.has("mask_false", name):
        return "false"
    return "rows" if choices.has("mask_latent", name) else None


def _locals(
    choices: Choices, plates: tuple[PlateSpec, ...], globals_: list[Latent]
) -> list[Latent]:
    number = int(choices.rng("locals").integers(2, 5)) if choices.has("many_locals") else 1
    known = [] if choices.has("globals_last") else list(globals_)
    found: list[Latent] = []
    for place in range(number):
        found.append(_local(choices, f"z{place}", plates, [*known, *found]))
    if choices.has("enumerated"):
        reads = tuple(site.name for site in found if site.plates == (DATA,))
        scale = _scale(choices, "latent", "all latents")
        modifiers = Modifiers(scale)
        found.append(Latent("c0", ENUMERATED, (DATA,), (), Predictor(reads), modifiers))
    return found


# -- observed sites and what is made of latents -------------------------------------------------


def _observed(
    choices: Choices, name: str, plates: tuple[PlateSpec, ...], latents: list[Latent]
) -> Data:
    around = _around(choices, plates, "nested_observed", name)
    reads = tuple(site.name for site in latents if set(site.plates) <= set(around))
    predictor = Predictor(reads[:4])
    if name == "x0":
        predictor = replace(
            predictor,
            param="w" if choices.has("param") else None,
            network=choices.first(("nnx", "linen")),
            covariate=bool(choices.first(("covariate", "none_argument"))),
            constant=choices.has("constant_argument"),
            static=choices.has("static_kwarg"),
            group="h" if "grouped" in choices.used else None,
        )
    kind = choices.kind(tuple(OBSERVED), "normal", name)
    obs_mask = OBSERVED[kind].is_continuous and choices.has("obs_mask", name)
    entries = kind in ("vector", "matrix") and not obs_mask and choices.has("mask_entries", name)
    mask = None
    if not (obs_mask or entries):
        found = choices.first(("mask_rows", "mask_cells"), name)
        mask = {None: None, "mask_rows": "rows", "mask_cells": "cells"}[found]
    by_fn = mask is not None and choices.has("mask_method", name)
    modifiers = Modifiers(_scale(choices, "observed", name), mask, by_fn)
    fills = bool(mask or entries or obs_mask) and OBSERVED[kind].is_noisy
    fills = fills and choices.has("missing", name)
    return Data(name, kind, around, predictor, modifiers, entries, obs_mask, fills)


def _all_observed(
    choices: Choices, plates: tuple[PlateSpec, ...], latents: list[Latent]
) -> list[Step]:
    number = int(choices.rng("observed").integers(2, 4)) if choices.has("many_observed") else 1
    found: list[Step] = [
        _observed(choices, f"x{place}", plates, latents) for place in range(number)
    ]
    others = tuple(plate.name for plate in plates if plate.name != DATA)
    if others and choices.has("global_observed"):
        reads = tuple(site.name for site in latents if set(site.plates) <= set(others))
        found.append(Data("y", "normal", others, Predictor(reads)))
    return found


def _auxiliary(choices: Choices, latents: list[Latent]) -> list[Step]:
    reals = [s for s in latents if s.kind == "real" and not s.mask_entries and s.extra is None]
    return [
        Auxiliary(f"{site.name}_aux", site.name)
        for site in reals
        if site.modifiers.mask == "false" or choices.has("auxiliary", site.name)
    ]


def _factors(choices: Choices, plates: tuple[PlateSpec, ...], latents: list[Latent]) -> list[Step]:
    found: list[Step] = []
    if choices.has("factor"):
        around = _around(choices, plates, "nested_observed", "f")
        reads = tuple(site.name for site in latents if set(site.plates) <= set(around))
        scale = 0.5 if choices.has("factor_scaled") else None
        found.append(Factor("f", around, reads, Modifiers(scale)))
    of_globals = tuple(site.name for site in latents if not site.plates)
    if of_globals and choices.has("factor_global"):
        found.append(Factor("fg", (), of_globals))
    return found


def _deterministic(
    choices: Choices, plates: tuple[PlateSpec, ...], latents: list[Latent], observed: list[Step]
) -> list[Step]:
    local = tuple(site.name for site in latents if DATA in site.plates)
    plain = tuple(s.name for s in latents if s.plates == (DATA,) and s.extra is None)
    of_globals = tuple(site.name for site in latents if not site.plates)
    others = tuple(plate.name for plate in plates if plate.name != DATA)
    in_others = tuple(s.name for s in latents if s.plates and DATA not in s.plates)
    every = tuple(plate.name for plate in plates)
    seen = tuple(s.name for s in observed if isinstance(s, Data) and DATA in s.plates)
    around = {site.name: site.plates for site in latents}
    data = (DATA,)
    extra = any(site.extra for site in latents)
    ways = {
        "det_local": (plain, Deterministic("d_local", data, plain)),
        "det_value": (local, Deterministic("d_value", around[local[0]], local[:1], "value")),
        "det_event": (plain, Deterministic("d_event", data, plain, "event")),
        "det_scalar": (local, Deterministic("d_scalar", data, (), "scalar")),
        "det_observed": (seen, Deterministic("d_observed", data, seen[:1])),
        "det_global": (of_globals, Deterministic("d_global", (), of_globals)),
        "det_other_plate": (in_others, Deterministic("d_other", others, in_others)),
        "det_outside": (plain, Deterministic("d_outside", data, plain, inside=False)),
        "det_total": (local, Deterministic("d_total", (), local, "total")),
        "det_nested": (others and not extra, Deterministic("d_nested", every, local)),
    }
    return [step for name, (possible, step) in ways.items() if possible and choices.has(name)]


def _params(
    choices: Choices, plates: tuple[PlateSpec, ...], read_in: tuple[str, ...]
) -> list[Step]:
    """Of the rows of a plate that a step has not all of, where what reads them is in it too.

    A mean over some rows is not that over all, and neither are the model's ELBOs.
    """
    if not choices.has("param"):
        return []
    whole = (plate for plate in plates if plate.subsample is None or plate.name in read_in)
    others = tuple(plate.name for plate in whole if plate.name != DATA)
    around = others if others and choices.has("param_plate") else ()
    return [Param("w", around, choices.has("param_positive"))]


def generate(seed: int, enabled: Collection[str] = FEATURES) -> Case:
    """Return the model of a seed, made of the features that are switched on."""
    choices = Choices(seed, frozenset(enabled))
    plates = _plates(choices)
    globals_ = _global_sites(choices, plates)
    groups, by_group = _groups(choices)
    local = _locals(choices, plates, globals_)
    latents = [*globals_, *by_group, *local]
    in_order = [*by_group, *local, *globals_] if "globals_last" in choices.used else latents
    observed = _all_observed(choices, plates, latents)
    params = _params(choices, plates, observed[0].plates)
    made = _deterministic(choices, plates, latents, observed)
    made += [*_auxiliary(choices, latents), *_factors(choices, plates, latents)]
    steps = (*params, *in_order, *observed, *made)
    scale_all = 0.8 if choices.has("scale_all") else None
    method = "subsample" in choices.used and choices.has("subsample_method")
    declares = "subsample" not in choices.used and choices.has("declared_size")
    program = Program((*plates, *groups), steps, -1, scale_all, method, declares)
    data, axes, static = draw_arguments(choices, program)
    program = replace(program, axis=axes["x0"] - np.ndim(data["x0"]))
    reparam, conditioned = _reparam(choices, local), _conditioned(choices, globals_)
    as_dict = choices.has("keywords")
    is_nested = not as_dict and choices.has("nested_argument")
    names = ("batch",) if is_nested else tuple(data)
    latents = [site for site in latents if site.name not in conditioned]
    guide = draw_guide(choices, latents, names, program.axis, is_reparametrized=bool(reparam))
    if choices.has("x64"):
        data = {name: as_float64(value) for name, value in data.items()}
    return Case(
        seed,
        tuple(sorted(choices.used)),
        program,
        data if as_dict else (data,) if is_nested else tuple(data.values()),
        0
        if set(axes.values()) == {0}
        else (axes if as_dict else (axes,) if is_nested else tuple(axes.values())),
        static,
        guide,
        "x64" in choices.used,
        reparam,
        conditioned,
        tuple(dict.fromkeys((*names, "noise", *static))),
    )


def _reparam(choices: Choices, local: list[Latent]) -> dict[str, Any]:
    plain = [s for s in local if s.kind == "real" and not s.mask_entries and not s.modifiers.mask]
    plain = [site for site in plain if site.scope is None]
    found: dict[str, Any] = {}
    if plain and choices.has("reparam"):
        found[plain[-1].name] = LocScaleReparam(0.0)
    transformed = ("positive", "shifted", "ordered", "lower_cholesky")
    for site in local:
        is_plain = site.kind in transformed and not site.modifiers.mask and site.scope is None
        if is_plain and choices.has("reparam_transform", site.name):
            found[site.name] = TransformReparam()
    return found


def _conditioned(choices: Choices, globals_: list[Latent]) -> dict[str, np.ndarray]:
    """Return values that `handlers.condition` gives a global site, if any."""
    plain = [site for site in globals_ if not site.plates]
    if not plain or not choices.has("conditioned"):
        return {}
    return {plain[-1].name: np.full(plain[-1].event, 0.3, np.float32)}
