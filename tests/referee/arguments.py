"""The arguments of a random model, and its guide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from features import Choices
from jax import Array
from kinds import ENUMERATED, OBSERVED
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from program import DATA, NUM_DATA, NUM_GROUPS, Data, Latent, PlateSpec, Program

from numpyro_vae import (
    MLP,
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)

# -- arguments ----------------------------------------------------------------------------------


def _shape(plates: tuple[PlateSpec, ...], around: tuple[str, ...]) -> tuple[int, ...]:
    """Return the batch shape of a site in some plates."""
    sizes = {plate.axis: plate.size for plate in plates if plate.name in around}
    return tuple(sizes.get(axis, 1) for axis in range(min(sizes, default=0), 0))


def draw_values(kind: str, m: np.ndarray, key: Array) -> Array:
    """Draw the values of an observed site of a kind, with ``m`` in its parameters."""
    observed, m = OBSERVED[kind], jnp.asarray(m, jnp.float32)
    fn = observed.make(m, 1.0)
    if observed.event is not None:
        shape = (*m.shape, *observed.event)
        fn = dist.Normal(m[..., None], 1.0).expand(shape).to_event(len(observed.event))
    return fn.sample(key)


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
    m = rng.normal(size=shape)
    values = np.asarray(draw_values(site.kind, m, choices.key("values", name)))
    event_dim = values.ndim - len(shape)
    found[name] = (values, event_dim)
    if site.mask_entries:
        found[f"{name}_entries"] = (rng.random(values.shape) < 0.7, event_dim)
    if site.modifiers.mask == "cells":
        found[f"{name}_mask"] = (rng.random(shape) < 0.7, 0)
    if site.obs_mask:
        found[f"{name}_obs_mask"] = (rng.random(shape) < 0.7, 0)
    return found


def draw_arguments(
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
        "group": rng.integers(0, NUM_GROUPS, NUM_DATA),
    }
    needed = {site.modifiers.scale == "rows" and "row_scale" for site in sites}
    needed |= {site.modifiers.mask == "rows" and "row_mask" for site in sites}
    needed |= {isinstance(site, Latent) and site.is_bounded and "row_scale" for site in sites}
    needed |= {"covariate"} & choices.used - {"none_argument"}
    needed |= {"grouped" in choices.used and "group"}
    for name in sorted(needed - {False}):
        data[str(name)], axes[str(name)] = by_row[str(name)], 0
    if "none_argument" in choices.used:
        data["covariate"], axes["covariate"] = None, 0
    if "constant_argument" in choices.used:
        data["constant"], axes["constant"] = rng.normal(size=3).astype(np.float32), None
    if choices.has("noise_argument"):
        data["noise"], axes["noise"] = np.ones((), np.float32), None
    for site in sites:
        if isinstance(site, Data) and site.fills:
            data[site.name] = _with_missing(site, data, axes)
    static = {"power": 3} if "static_kwarg" in choices.used else {}
    return data, axes, static | ({"num_data": NUM_DATA} if program.declares_size else {})


def _with_missing(site: Data, data: dict[str, Any], axes: dict[str, int | None]) -> np.ndarray:
    """Return the values of a site, NaN where it is masked."""
    values, name = data[site.name], site.name
    if site.modifiers.mask == "rows":
        mask, axis = data["row_mask"], axes[name] or 0
        mask = mask.reshape(-1, *[1] * (values.ndim - axis - 1))
    else:
        found = (f"{name}_{kind}" for kind in ("mask", "entries", "obs_mask"))
        mask = next(data[key] for key in found if key in data)
        mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return np.where(mask, values, np.nan).astype(values.dtype)


def as_float64(value: Any) -> Any:
    is_float = isinstance(value, np.ndarray) and value.dtype == np.float32
    return value.astype(np.float64) if is_float else value


# -- the guide, and all of it ---------------------------------------------------------------------

FAMILIES = {
    "multivariate": AutoAmortizedMultivariateNormal,
    "low_rank": partial(AutoAmortizedLowRankMultivariateNormal, rank=1),
    "flow": partial(AutoAmortizedFlow, num_layers=1, hidden_sizes=(4,)),
    "delta": AutoAmortizedDelta,
}


def _inputs(names: tuple[str, ...], axis: int, *args: Any, **kwargs: Any) -> Any:
    """Return what an encoder reads of a model's arguments: the first observed site."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given |= given.pop("batch", {})
    return jnp.nan_to_num(jnp.moveaxis(jnp.asarray(given["x0"], float), axis, 0))


def draw_guide(
    choices: Choices,
    latents: list[Latent],
    names: tuple[str, ...],
    axis: int,
    *,
    is_reparametrized: bool,
) -> Callable[..., Any]:
    options: dict[str, Any] = {"plate": DATA}
    globals_ = [site.name for site in latents if DATA not in site.plates]
    local = [site.name for site in latents if DATA in site.plates and site.kind != ENUMERATED]
    if globals_ and choices.has("condition_on"):
        options["condition_on"] = globals_[:1]
    if choices.has("inputs"):
        options["inputs"] = partial(_inputs, names, axis)
    if len(local) > 1 and not is_reparametrized and choices.has("dependencies"):
        options["dependencies"] = {local[1]: local[:1]}
    if globals_:
        chosen = choices.first(("global_delta", "global_joint"))
        if chosen is not None:
            options["global_guide"] = {"global_delta": AutoDelta}.get(chosen, AutoDiagonalNormal)
    family = choices.first(FAMILIES, "family")
    if family is None:
        options["scale"] = choices.first(("softplus", "log_variance"))
    make = AutoAmortizedNormal if family is None else FAMILIES[family]
    return partial(make, encoder=partial(MLP, hidden_sizes=(3,), activation=jnp.tanh), **options)
