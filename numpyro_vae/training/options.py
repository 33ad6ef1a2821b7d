"""What `fit` is given beside data, and whether it fits: errors that say what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from jaxtyping import Array, Int
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState

from numpyro_vae.data.batch import Batch
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.guides.reading import DATA, read_guide
from numpyro_vae.model.provenance import LOOKED_UP
from numpyro_vae.model.reading import ModelReader, Reading
from numpyro_vae.model.sites import ModelSites
from numpyro_vae.model.supports import Outside, explain
from numpyro_vae.numpyro_internals import enumerates
from numpyro_vae.objectives import ForwardKL
from numpyro_vae.objectives.base import AbstractObjective
from numpyro_vae.training.step import Trainer


def check_svi(svi: Any) -> None:
    """Raise unless this is an SVI of a guide and an objective, and not of their classes.

    Raises:
        TypeError: naming the part.
    """
    if not isinstance(svi, SVI):
        raise TypeError(
            f"svi is of type {type(svi).__name__}, expected numpyro.infer.SVI. Pass "
            "SVI(model, guide, optimizer, Trace_ELBO())."
        )
    for part, found, arguments in (("guide", svi.guide, "model"), ("objective", svi.loss, "")):
        if isinstance(found, type):
            raise TypeError(
                f"The {part} of the SVI is the class {found.__name__}, expected an object. Give "
                f"the SVI {found.__name__}({arguments})."
            )


def check_stopping(patience: int | None, validation: Any) -> None:
    """Raise if early stopping has nothing to look at."""
    if patience is not None and (patience < 1 or validation is None):
        raise ValueError(
            f"patience is {patience} with validation data "
            f"{'missing' if validation is None else 'given'}; early stopping needs validation= "
            "data and a patience of at least 1 epoch."
        )


def check_passes(data: Any, num_epochs: int) -> None:
    """Raise if data that can be passed over only once are to be passed over more often."""
    if isinstance(data, Iterator) and num_epochs > 1:
        raise ValueError(
            f"data is a {type(data).__name__}, which can be iterated over only once, and num_epochs"
            f" is {num_epochs}. Pass what can be iterated over anew in each epoch, such as a list "
            "or a data loader."
        )


def check_start(init_state: Any, init_params: dict[str, Any] | None) -> None:
    """Raise if it is unclear where to start, or ``init_state`` is no state."""
    if init_state is None:
        return
    if init_params is not None:
        raise ValueError(
            f"init_params= names {sorted(init_params)}, but training continues from init_state=, "
            "which has values of all parameters. Leave one of them out."
        )
    if not all(hasattr(init_state, name) for name in SVIState._fields):
        remedy = "result.state" if hasattr(init_state, "state") else "the state of a result"
        raise TypeError(
            f"init_state is of type {type(init_state).__name__}, expected an SVIState. Pass "
            f"{remedy}; parameters alone go into init_params=."
        )


def check_objective(svi: SVI, sites: ModelSites) -> None:
    """Raise if the model has sites to enumerate, and the objective would draw from their prior."""
    enumerated = [site.name for site in sites.sites.values() if site.is_enumerated]
    if enumerated and not (enumerates(svi.loss) or isinstance(svi.loss, ForwardKL)):
        raise ValueError(
            f"The model's sites {enumerated} are to be enumerated, which "
            f"{type(svi.loss).__name__} does not do. Train with numpyro.infer.TraceEnum_ELBO()."
        )
    off = [name for name in enumerated if sites.sites[name].is_improper]
    if off and enumerates(svi.loss):
        raise ValueError(
            f"The sites {off} are to be enumerated, and switched off by a mask of False. "
            f"{type(svi.loss).__name__} ignores that, so that what scores them elsewhere would "
            "count twice. Leave out the mask, and their log_prob where else it is added."
        )
    stacked = [name for name in enumerated if sites.is_stacked(name)]
    if stacked and enumerates(svi.loss):
        raise ValueError(
            f"The sites {stacked} are to be enumerated inside a scan, where "
            f"{type(svi.loss).__name__} does not sum over them but returns another number. Train "
            "the guide with ForwardKL on Simulations, or sum over the steps in the model, by the "
            "forward algorithm in a numpyro.factor. Weights, checks and repair do sum over them."
        )


def settled_epoch(loss: ELBO, state: SVIState, num_steps: int, num_epochs: int) -> int:
    """Return the first epoch after which the objective changes no more.

    Args:
        loss: the objective.
        state: where training starts.
        num_steps: the steps of an epoch.
        num_epochs: how many are to come.

    Raises:
        ValueError: if it still changes when training ends.
    """
    if not isinstance(loss, AbstractObjective) or not num_epochs:
        return 0
    start = int(state.optim_state[0])
    end = start + num_epochs * num_steps
    settled = loss.settles_at(end)
    if settled > end:
        raise ValueError(
            f"The schedule of {type(loss).__name__} outlasts training: it changes until step "
            f"{settled:,}, and training ends after step {end:,} ({num_epochs} epochs of {num_steps}"
            f" steps{f', from step {start:,}' if start else ''}). Pass num_epochs="
            f"{-(-(settled - start) // num_steps)} or more, or a schedule that ends by then."
        )
    return max(0, -(-(settled - start) // num_steps) - 1)


def check_names(init_params: dict[str, Any] | None, trainer: Trainer) -> None:
    """Raise if initial values are given to parameters that do not exist."""
    states = trainer.fresh.mutable_state or {}  # which are among the params of a result
    unknown = sorted(set(init_params or {}) - {*trainer.transforms, *states})
    if unknown:
        raise ValueError(
            f"init_params= names {unknown}; model and guide have the parameters "
            f"{sorted(trainer.transforms)}. Name some of these."
        )


def check_state(state: SVIState, fresh: SVIState, svi: SVI) -> None:
    """Raise unless a state has the parameters and the optimizer of an SVI.

    Args:
        state: where training is to continue.
        fresh: a first state of this SVI, or its shapes.
        svi: the SVI.

    Raises:
        ValueError: naming the first parameter that differs, or the optimizer.
    """
    parts = [(one.optim_state, one.mutable_state) for one in (state, fresh)]
    if _shapes(parts[0]) == _shapes(parts[1]):
        return
    try:
        found, expected = (_shapes(jax.eval_shape(svi.get_params, one)) for one in (state, fresh))
    except Exception:  # of any kind: the state of another optimizer holds who knows what
        found = expected = {}
    for path in sorted({*found, *expected}):
        if found.get(path) != expected.get(path):
            here, there = (shapes.get(path, "missing") for shapes in (found, expected))
            raise ValueError(
                f"init_state belongs to another guide or model: the shape of parameter {path} is "
                f"{here} in it, and {there} in model and guide. Pass a state of this SVI."
            )
    raise ValueError(
        "init_state belongs to another optimizer, or to networks with other state. Pass a state of "
        "this SVI, or start from its parameters with init_params=."
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


# -- observed values outside their support ---------------------------------------------------------

_CHECKS: WeakKeyDictionary[Trainer, Callable[..., Any]] = WeakKeyDictionary()


def check_supports(trainer: Trainer, batch: Batch) -> None:
    """Raise if the model observes values to which it gives no density, whatever is learned.

    Args:
        trainer: of the fit.
        batch: any rows of data in memory, all of which are looked at, or else these.

    Raises:
        ValueError: naming the site, its support and the first row.
    """
    if trainer not in _CHECKS:
        found = partial(_outside, trainer.reader, trainer.svi.static_kwargs)
        _CHECKS[trainer] = jax.jit(found)
    devices = batch.layout.devices
    order = jnp.asarray(batch.indices)[None]
    if batch.cuts or batch.fills_plate:
        size, num_data = (x // devices.num_hosts for x in (len(batch.indices), batch.num_data))
        steps = -(-num_data // size)
        rows = np.minimum(np.arange(steps * size), num_data - 1).reshape(steps, size)
        order = devices.divide(devices.numbers(rows, num_data), axis=1)
    for name, outside in _CHECKS[trainer](batch, order).items():
        bad = devices.fetch(outside.values)
        if bad.any():
            local = bad.shape == order.shape
            rows = np.unique(devices.fetch(order)[bad]) if local else None
            raise ValueError(_message(name, outside, batch.plate, rows))


def _message(name: str, outside: Outside, plate: str, rows: np.ndarray | None) -> str:
    where = ""
    if rows is not None:
        where = f" in {len(rows)} rows of plate {plate!r}, the first of them row {rows[0]}"
    found, remedy = explain(name, outside.distribution, outside.support, where)
    return f"The {found}. {remedy}."


def _outside(
    reader: ModelReader,
    static_kwargs: dict[str, Any],
    batch: Batch,
    order: Int[Array, "num_steps batch"],
) -> dict[str, Outside]:
    """Return by observed site which rows have values outside the support, in the order given."""
    keys = [jax.random.key(seed) for seed in range(2)]

    def of_rows(rows: Array) -> dict[str, Outside]:
        args, kwargs = batch.at(rows).arguments()
        held = {batch.plate: (batch.num_data, rows)} if batch.fills_plate else {}
        kwargs = {**kwargs, **static_kwargs}
        one, other = (reader.read(args, kwargs, held, key) for key in keys)
        return {
            name: _by_row(one, name, batch.plate, other.outside[name].bounds)
            for name in one.outside
        }

    return jax.lax.map(of_rows, order)


def _by_row(reading: Reading, name: str, plate: str, bounds: Any) -> Outside:
    """Return in which rows a site has such values, in none if the bounds are drawn themselves."""
    outside, site = reading.outside[name], reading.sites.sites[name]
    pairs = zip(jax.tree.leaves(outside.bounds), jax.tree.leaves(bounds), strict=True)
    fixed = jnp.array([(one == other).all() for one, other in pairs]).all()
    values = outside.values[None]
    if plate in site.plates:
        values = jnp.moveaxis(outside.values, site.axis(reading.sites.plates[plate]), 0)
    return replace(outside, values=values.any(tuple(range(1, values.ndim))) & fixed, bounds=None)


def check_guide(trainer: Trainer, batch: Batch, sites: ModelSites, state: SVIState) -> None:
    """Raise if a guide of some rows would be taken for one of each batch.

    A guide that does not look at the data, as ``AutoNormal``, has parameters for as many rows as a
    batch has, and would use them for each batch in turn. One that looks up its plate's rows, as a
    guide of a model that selects rows itself does, has some for each row.

    Raises:
        ValueError: naming the guide and the sizes.
    """
    guide, size = trainer.svi.guide, len(batch.indices)
    if isinstance(guide, AmortizedGuide) or size == batch.num_data:
        return
    args, kwargs = batch.arguments()
    kwargs = {**kwargs, **trainer.svi.static_kwargs}
    try:
        reading = read_guide(guide, trainer.params(state), args, kwargs, batch.rows)
    except Exception:  # of any kind: what training needs of a guide is not for this to say
        return
    local = [site.name for site in sites.local(batch.plate) if site.name in reading.sites]
    reads = frozenset().union(*map(reading.origins, local))
    if DATA in reads or any(name.startswith(LOOKED_UP) for name in reads):
        return
    own = {name: reading.params[name] for name in reads & reading.params.keys()}
    joint = any(reading.sites[name].is_auxiliary for name in reads & reading.sites.keys())
    if joint or any(size in shape for shape in own.values()):
        raise ValueError(
            f"The guide does not look at the data: its parameters {own} are of the {size} rows of "
            f"a batch, and would be those of each batch in turn, of {batch.num_data} rows. Use an "
            "amortized guide; or train on all rows at once, with batch_axes=None; or, if the model "
            "selects rows itself by subsample_size=, with another batch_size."
        )


def check_params(trainer: Trainer, batch: Batch) -> None:
    """Raise if parameters of some rows of the model would be taken for those of each batch.

    Raises:
        ValueError: naming a parameter and the sizes.
    """
    size = len(batch.indices)
    if size == batch.num_data or not (batch.cuts or _has_rows(batch, size)):
        return
    shapes = _shapes_of_params(trainer, batch, batch.indices)
    if not any(size in shape for shape in shapes.values()):
        return
    twice = _shapes_of_params(trainer, batch, jnp.concatenate([batch.indices, batch.indices]))
    for name, shape in shapes.items():
        if twice[name] != shape:
            raise ValueError(
                f"The model's parameter {name!r} has shape {shape}, with a value for each of the "
                f"{size} rows of a batch, and would be that of each batch in turn, of "
                f"{batch.num_data} rows. Make it a latent site; or train on all rows at once, "
                "with batch_axes=None; or, if the model's plate selects rows itself by "
                "subsample_size=, and so those of a parameter with event_dim=, with another "
                "batch_size."
            )


def _has_rows(batch: Batch, size: int) -> bool:
    """Return whether the arrays of a batch that the model takes whole have its rows alone."""
    pairs = zip(batch.arrays, batch.layout.axes, strict=True)
    return all(axis is None or array.shape[axis] == size for array, axis in pairs)


def _shapes_of_params(trainer: Trainer, batch: Batch, rows: Array) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters, without networks, given rows of a batch."""
    args, kwargs = batch.layout.rows(batch.arrays, rows)
    held = {batch.plate: (batch.num_data, jnp.arange(len(rows)))} if batch.fills_plate else {}
    reading = trainer.reader.abstract(args, {**kwargs, **trainer.svi.static_kwargs}, held)
    values = {name: param.value for name, param in reading.params.items()}
    return {name: value.shape for name, value in values.items() if hasattr(value, "shape")}


def warn_of_another_model(svi: SVI, batch: Batch) -> None:
    """Warn if an amortized guide was made for another model than the one that is trained.

    Its posterior, and so weights and checks, are of the model that the guide was made for.
    """
    guide = svi.guide
    if not isinstance(guide, AmortizedGuide) or guide.model is svi.model:
        return
    args, kwargs = batch.arguments()
    try:
        programs = [
            _program(model, args, {**kwargs, **svi.static_kwargs})
            for model in (svi.model, guide.model)
        ]
    except Exception:  # of any kind: what training needs of a model is not for this to say
        return
    if programs[0] != programs[1]:
        warnings.warn(
            "The model of SVI is another one than the guide was made for, so that predictions, "
            "importance weights and checks would not be of what is trained. Pass the same model to "
            "both, as in SVI(model, AutoAmortizedNormal(model), ...).",
            UserWarning,
            stacklevel=3,
        )


def _program(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[str, list]:
    """Return as text what is computed for a model's densities, and the constants in it."""

    def densities(rng_key: Array) -> list[Any]:
        with handlers.block():
            trace = handlers.trace(handlers.seed(model, rng_key)).get_trace(*args, **kwargs)
        sites = (site for site in trace.values() if site["type"] == "sample")
        return [(site["fn"].log_prob(site["value"]), site["scale"]) for site in sites]

    program = jax.make_jaxpr(densities)(jax.random.key(0))
    constants = [np.asarray(constant).tobytes() for constant in program.consts]
    needed, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return re.sub(r" at 0x[0-9a-f]+", "", str(needed)), constants
