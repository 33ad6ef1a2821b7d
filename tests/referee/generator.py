"""Random models: by seed a program, its data and a guide, made of features with names.

Each choice has a random stream of its own, so that a feature can be switched off and all else
stays as it was.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from kinds import LATENTS, OBSERVED
from numpyro import handlers
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from numpyro.infer.reparam import LocScaleReparam
from program import (
    DATA,
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

from numpyro_vae import (
    MLP,
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)

NUM_DATA, BATCH = 6, 3

# By feature, how often a model has it that may.
STRUCTURE = {
    "second_plate": 0.35,
    "third_plate": 0.3,
    "dim_left": 0.2,
    "implicit_dim": 0.2,
    "many_locals": 0.6,
    "nested_latent": 0.5,
    "event_vector": 0.25,
    "event_matrix": 0.12,
    "extra_batch": 0.08,
    "latent_reads_latent": 0.4,
    "globals": 0.5,
    "global_vector": 0.3,
    "global_positive": 0.3,
    "global_in_plate": 0.4,
    "globals_last": 0.15,
    "latent_reads_global": 0.6,
    "many_observed": 0.4,
    "nested_observed": 0.5,
    "global_observed": 0.15,
}
MODIFIERS = {
    "mask_rows": 0.15,
    "mask_cells": 0.15,
    "mask_entries": 0.2,
    "obs_mask": 0.2,
    "mask_latent": 0.12,
    "mask_latent_entries": 0.1,
    "mask_false": 0.1,
    "auxiliary": 0.1,
    "scale_latent": 0.15,
    "scale_latent_rows": 0.1,
    "scale_mixed": 0.1,
    "scale_observed": 0.15,
    "scale_observed_rows": 0.1,
    "scale_global": 0.2,
    "scale_all": 0.1,
    "factor": 0.2,
    "factor_scaled": 0.3,
    "factor_global": 0.15,
    "reparam": 0.15,
}
DETERMINISTIC = {
    "det_local": 0.3,
    "det_value": 0.2,
    "det_event": 0.2,
    "det_scalar": 0.1,
    "det_observed": 0.2,
    "det_global": 0.3,
    "det_other_plate": 0.3,
    "det_outside": 0.15,
    "det_total": 0.12,
    "det_nested": 0.3,
}
ARGUMENTS = {
    "subsample": 0.25,
    "subsample_method": 0.5,
    "subsample_second": 0.3,
    "param": 0.3,
    "param_positive": 0.3,
    "param_plate": 0.3,
    "nnx": 0.15,
    "linen": 0.15,
    "static_kwarg": 0.2,
    "none_argument": 0.15,
    "covariate": 0.2,
    "constant_argument": 0.2,
    "keywords": 0.3,
    "inputs": 0.15,
    "condition_on": 0.3,
    "dependencies": 0.2,
    "multivariate": 0.08,
    "low_rank": 0.06,
    "flow": 0.08,
    "delta": 0.06,
    "global_delta": 0.15,
    "global_joint": 0.15,
    "x64": 0.6,
}
KINDS = tuple(name for name in (*LATENTS, *OBSERVED) if name not in ("real", "normal"))
RATES = {**STRUCTURE, **MODIFIERS, **DETERMINISTIC, **ARGUMENTS}
FEATURES = (*RATES, *KINDS)


@dataclass
class Choices:
    """Random decisions of a seed, each by a name; those of features that are off come out as no.

    ``used`` gathers the features that the model has.
    """

    seed: int
    enabled: Collection[str]
    used: set[str] = field(default_factory=set)

    def rng(self, *name: Any) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(repr(name).encode())])

    def key(self, *name: Any) -> jax.Array:
        return jax.random.key(int(self.rng(*name).integers(2**31)))

    def has(self, feature: str, *where: Any) -> bool:
        found = feature in self.enabled and self.rng(feature, *where).random() < RATES[feature]
        self.used |= {feature} if found else set()
        return found

    def first(self, features: Iterable[str], *where: Any) -> str | None:
        """Return the first of features that it has, in a random order."""
        order = self.rng("first", *where).permutation(list(features))
        return next((str(name) for name in order if self.has(str(name), *where)), None)

    def kind(self, kinds: Sequence[str], base: str, *where: Any) -> str:
        """Return a kind of distribution, half of the time the base."""
        rng = self.rng("kind", *where)
        found = str(rng.choice(list(kinds)))
        if rng.random() < 0.35 or found not in self.enabled:
            return base
        self.used.add(found)
        return found

    def some(self, names: Sequence[str], *where: Any) -> tuple[str, ...]:
        """Return a subset of names that is not empty, if there are any."""
        rng = self.rng("some", *where)
        kept = [name for name in names if rng.random() < 0.5]
        return tuple(kept or names[:1])


@dataclass(frozen=True)
class Case:
    """A model with data and a guide.

    Attributes:
        seed: of the generator.
        features: those that it has.
        program: what the model does.
        data: as for `numpyro_vae.fit`.
        batch_axes: the datum axis of each.
        static_kwargs: keyword arguments that never change.
        guide: from a model to its guide.
        is_x64: whether it runs with 64 bits.
        reparam: the configuration of ``handlers.reparam``.
        names: of the model's arguments.
    """

    seed: int
    features: tuple[str, ...]
    program: Program
    data: Any
    batch_axes: Any
    static_kwargs: dict[str, Any]
    guide: Callable[..., Any]
    is_x64: bool
    reparam: dict[str, Any]
    names: tuple[str, ...]

    def model(self, *, subsamples: bool = True) -> Callable[..., Any]:
        """Return the model; without subsampling its plates hold all of their rows."""
        program = self.program
        if not subsamples:
            plates = tuple(replace(plate, subsample=None) for plate in program.plates)
            program = replace(program, plates=plates)
        model = as_model(program, self.names)
        return handlers.reparam(model, config=self.reparam) if self.reparam else model

    @property
    def subsampled(self) -> dict[str, PlateSpec]:
        return {p.name: p for p in self.program.plates if p.subsample is not None}


def as_model(program: Program, names: Sequence[str]) -> Callable[..., Any]:
    """Return a model with a signature of its own."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for name in names
    ]
    signature = inspect.Signature(parameters)

    def model(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        program.run({"noise": 1.0, "power": 2, **bound})

    model.__signature__ = signature  # ty: ignore
    return model


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


def _global_sites(choices: Choices, plates: tuple[PlateSpec, ...]) -> list[Step]:
    if not choices.has("globals"):
        return []
    others = tuple(plate.name for plate in plates if plate.name != DATA)
    sites: list[Step] = []
    for name in ("g0", "g1")[: choices.rng("globals").integers(1, 3)]:
        inside = others if others and choices.has("global_in_plate", name) else ()
        event = (2,) if choices.has("global_vector", name) else ()
        kind = "positive" if choices.has("global_positive", name) else "real"
        scale = 0.7 if choices.has("scale_global", name) else None
        sites.append(Latent(name, kind, inside, event, Predictor(), Modifiers(scale)))
    return sites


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
    event = () if entries else _event(choices, name)
    extra = 2 if not entries and choices.has("extra_batch", name) else None
    scaled = name if choices.has("scale_mixed", name) else "all latents"
    modifiers = Modifiers(_scale(choices, "latent", scaled), _latent_mask(choices, name, kind))
    return Latent(name, kind, around, event, Predictor(tuple(reads)), modifiers, entries, extra)


def _scale(choices: Choices, of: str, where: str) -> float | str | None:
    found = choices.first((f"scale_{of}", f"scale_{of}_rows"), where)
    return {None: None, f"scale_{of}": 0.6, f"scale_{of}_rows": "rows"}[found]


def _latent_mask(choices: Choices, name: str, kind: str) -> str | None:
    if kind == "real" and choices.has("mask_false", name):
        return "false"
    return "rows" if choices.has("mask_latent", name) else None


def _locals(choices: Choices, plates: tuple[PlateSpec, ...], globals_: list[Step]) -> list[Latent]:
    number = int(choices.rng("locals").integers(2, 5)) if choices.has("many_locals") else 1
    known = [] if choices.has("globals_last") else list(globals_)
    found: list[Latent] = []
    for place in range(number):
        found.append(_local(choices, f"z{place}", plates, [*known, *found]))  # type: ignore[misc]
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
        )
    kind = choices.kind(tuple(OBSERVED), "normal", name)
    obs_mask = OBSERVED[kind].is_continuous and choices.has("obs_mask", name)
    entries = kind in ("vector", "matrix") and not obs_mask and choices.has("mask_entries", name)
    mask = None
    if not (obs_mask or entries):
        found = choices.first(("mask_rows", "mask_cells"), name)
        mask = {None: None, "mask_rows": "rows", "mask_cells": "cells"}[found]
    modifiers = Modifiers(_scale(choices, "observed", name), mask)
    return Data(name, kind, around, predictor, modifiers, entries, obs_mask)


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


# -- arguments ----------------------------------------------------------------------------------


def _shape(plates: tuple[PlateSpec, ...], around: tuple[str, ...]) -> tuple[int, ...]:
    """Return the batch shape of a site in some plates."""
    sizes = {plate.axis: plate.size for plate in plates if plate.name in around}
    return tuple(sizes.get(axis, 1) for axis in range(min(sizes, default=0), 0))


def _site_arguments(
    choices: Choices, plates: tuple[PlateSpec, ...], site: Data | Latent
) -> dict[str, tuple[np.ndarray, int]]:
    """Return by name arrays of a site, and the number of their event dimensions."""
    name, shape, rng = site.name, _shape(plates, site.plates), choices.rng("data", site.name)
    found: dict[str, tuple[np.ndarray, int]] = {}
    if isinstance(site, Latent):
        if site.mask_entries:
            found[f"{name}_entries"] = (rng.random((*shape, 3)) < 0.7, 1)
        return found
    kind = OBSERVED[site.kind]
    m = jnp.asarray(rng.normal(size=shape), jnp.float32)
    fn = kind.make(m, 1.0)
    if kind.event is not None:
        fn = dist.Normal(m[..., None], 1.0).expand(shape + kind.event).to_event(len(kind.event))
    values = np.asarray(fn.sample(choices.key("values", name)))
    found[name] = (values, fn.event_dim)
    if site.mask_entries:
        found[f"{name}_entries"] = (rng.random(values.shape) < 0.7, fn.event_dim)
    if site.modifiers.mask == "cells":
        found[f"{name}_mask"] = (rng.random(shape) < 0.7, 0)
    if site.obs_mask:
        found[f"{name}_obs_mask"] = (rng.random(shape) < 0.7, 0)
    return found


def _arguments(
    choices: Choices, program: Program
) -> tuple[dict[str, Any], dict[str, int | None], dict[str, Any]]:
    """Return the data, the datum axis of each, and static keyword arguments."""
    data: dict[str, Any] = {}
    axes: dict[str, int | None] = {}
    dim = next(plate.axis for plate in program.plates if plate.name == DATA)
    sites = [step for step in program.steps if isinstance(step, Data | Latent)]
    for site in sorted(sites, key=lambda site: site.name):  # x0 before others
        for name, (values, event_dim) in _site_arguments(choices, program.plates, site).items():
            data[name] = values
            axes[name] = values.ndim - event_dim + dim if DATA in site.plates else None
    rng = choices.rng("arguments")
    by_row = {
        "covariate": rng.normal(size=NUM_DATA).astype(np.float32),
        "row_scale": rng.uniform(0.3, 1.5, NUM_DATA).astype(np.float32),
        "row_mask": rng.random(NUM_DATA) < 0.7,
    }
    needed = {site.modifiers.scale == "rows" and "row_scale" for site in sites}
    needed |= {site.modifiers.mask == "rows" and "row_mask" for site in sites}
    needed |= {"covariate"} & choices.used - {"none_argument"}
    for name in sorted(needed - {False}):
        data[str(name)], axes[str(name)] = by_row[str(name)], 0
    if "none_argument" in choices.used:
        data["covariate"], axes["covariate"] = None, 0
    if "constant_argument" in choices.used:
        data["constant"], axes["constant"] = rng.normal(size=3).astype(np.float32), None
    return data, axes, {"power": 3} if "static_kwarg" in choices.used else {}


# -- the guide, and all of it ---------------------------------------------------------------------

FAMILIES = {
    "multivariate": AutoAmortizedMultivariateNormal,
    "low_rank": partial(AutoAmortizedLowRankMultivariateNormal, rank=1),
    "flow": partial(AutoAmortizedFlow, num_layers=1, hidden_sizes=(4,)),
    "delta": AutoAmortizedDelta,
}


def _guide(choices: Choices, latents: list[Latent]) -> Callable[..., Any]:
    options: dict[str, Any] = {"plate": DATA}
    globals_ = [site.name for site in latents if DATA not in site.plates]
    local = [site.name for site in latents if DATA in site.plates]
    if globals_ and choices.has("condition_on"):
        options["condition_on"] = globals_[:1]
    if len(local) > 1 and choices.has("dependencies"):
        options["dependencies"] = {local[1]: local[:1]}
    if globals_:
        chosen = choices.first(("global_delta", "global_joint"))
        if chosen is not None:
            options["global_guide"] = {"global_delta": AutoDelta}.get(chosen, AutoDiagonalNormal)
    family = choices.first(FAMILIES, "family")
    make = AutoAmortizedNormal if family is None else FAMILIES[family]
    return partial(make, encoder=partial(MLP, hidden_sizes=(3,), activation=jnp.tanh), **options)


def _params(choices: Choices, plates: tuple[PlateSpec, ...]) -> list[Step]:
    if not choices.has("param"):
        return []
    others = tuple(plate.name for plate in plates if plate.name != DATA)
    around = others if others and choices.has("param_plate") else ()
    return [Param("w", around, choices.has("param_positive"))]


def generate(seed: int, enabled: Collection[str] = FEATURES) -> Case:
    """Return the model of a seed, made of the features that are switched on."""
    choices = Choices(seed, frozenset(enabled))
    plates = _plates(choices)
    globals_ = _global_sites(choices, plates)
    local = _locals(choices, plates, globals_)
    latents = [*globals_, *local]
    in_order = [*local, *globals_] if "globals_last" in choices.used else latents
    params = _params(choices, plates)
    observed = _all_observed(choices, plates, latents)
    made = _deterministic(choices, plates, latents, observed)
    made += [*_auxiliary(choices, latents), *_factors(choices, plates, latents)]
    steps = (*params, *in_order, *observed, *made)
    scale_all = 0.8 if choices.has("scale_all") else None
    method = "subsample" in choices.used and choices.has("subsample_method")
    program = Program(plates, steps, -1, scale_all, method)
    data, axes, static = _arguments(choices, program)
    program = replace(program, axis=axes["x0"] - np.ndim(data["x0"]))
    guide = _guide(choices, latents)
    if choices.has("x64"):
        data = {name: _as_float64(value) for name, value in data.items()}
    as_dict = choices.has("keywords")
    return Case(
        seed,
        tuple(sorted(choices.used)),
        program,
        data if as_dict else tuple(data.values()),
        0 if set(axes.values()) == {0} else axes if as_dict else tuple(axes.values()),
        static,
        guide,
        "x64" in choices.used,
        _reparam(choices, local),
        (*data, "noise", *static),
    )


def _as_float64(value: Any) -> Any:
    is_float = isinstance(value, np.ndarray) and value.dtype == np.float32
    return value.astype(np.float64) if is_float else value


def _reparam(choices: Choices, local: list[Latent]) -> dict[str, Any]:
    plain = [s for s in local if s.kind == "real" and not s.mask_entries and not s.modifiers.mask]
    return {plain[-1].name: LocScaleReparam(0.0)} if plain and choices.has("reparam") else {}
