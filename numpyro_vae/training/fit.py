"""Training: epochs over data, validation, early stopping."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arguments import require_count, require_key
from numpyro_vae.data.arrays import ArrayData, count_rows, is_in_memory
from numpyro_vae.data.devices import Devices
from numpyro_vae.data.labels import ColumnNames, column_names, in_order
from numpyro_vae.data.sparse import as_rows
from numpyro_vae.data.stores import is_stored
from numpyro_vae.model.data_sets import DataSets
from numpyro_vae.model.missing import require_finite_observations
from numpyro_vae.model.signatures import in_form
from numpyro_vae.numpyro_internals import HANDLERS, param_transforms, set_param_transforms
from numpyro_vae.training.callbacks import (
    Callback,
    EarlyStopping,
    ProgressBar,
    StopReason,
    UndeclaredScale,
)
from numpyro_vae.training.checkpoints import Checkpoints, open_checkpoints
from numpyro_vae.training.chunks import ChunkSource
from numpyro_vae.training.convergence import warn_of_losses, warn_of_validation
from numpyro_vae.training.freezing import Freeze
from numpyro_vae.training.identity import identify
from numpyro_vae.training.options import (
    check_guide,
    check_names,
    check_objective,
    check_params,
    check_passes,
    check_start,
    check_state,
    check_stopping,
    check_supports,
    check_svi,
    settled_epoch,
    warn_of_another_model,
)
from numpyro_vae.training.progress import Progress
from numpyro_vae.training.result import FitResult
from numpyro_vae.training.simulations import Simulations, SimulationSource
from numpyro_vae.training.sources import ArraySource, IterableSource, Source, WholeSource
from numpyro_vae.training.step import Trainer, trainer_of

__all__ = ["FitResult", "fit"]

Score = Callable[[SVIState], dict[str, float]]


def fit(
    svi: SVI,
    rng_key: Array,
    data: Any,
    *,
    batch_size: int | None = None,
    num_epochs: int,
    num_data: int | None = None,
    batch_axes: Any = 0,
    validation: Any = None,
    patience: int | None = None,
    plate: str | None = None,
    init_state: SVIState | None = None,
    init_params: dict[str, Any] | None = None,
    freeze: Freeze = (),
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
    mesh: Mesh | None = None,
    callbacks: Callback | Iterable[Callback] = (),
    progress_bar: bool = True,
) -> FitResult:
    """Train a guide, and the parameters of its model, on minibatches.

    In memory an epoch is one compiled scan over a fresh permutation; on disk one of each window of
    chunks, while a thread reads the next. The model may take the rows
    of a batch, or all data and subsample in its plate. The ELBO of a batch is an unbiased
    estimate of that of all data, also where the model declares a plate of just the batch's size.
    A step that is not finite changes neither parameters, optimizer nor network state. Losses that
    were still falling when the epochs were done are warned about.
    ``KeyboardInterrupt`` ends training and returns what has been learned after the last epoch.

    Args:
        svi: model, guide, optimizer and objective.
        rng_key: the same key gives the same result, bit for bit.
        data: an array, a tuple of positional arguments of the model, or a dict of keyword
            arguments, the data along axis 0, in memory; or read in chunks, as a memmap, an array
            of Zarr or HDF5, `Columns` of Parquet, or a sparse matrix in CSR; or an iterable of such
            batches; or `Simulations`.
        batch_size: rows in a batch of in-memory data; by default 128, or all if they are fewer.
        num_epochs: passes over the data.
        num_data: for an iterable, how many data there are in all.
        batch_axes: the datum axis of each argument, as ``in_axes`` of `jax.vmap`; None alone if
            no argument has one, as with ragged groups: an epoch is then one step on all data.
        validation: in-memory data like ``data``, whose loss is computed after every epoch, always
            with the same random keys.
        patience: stop after so many epochs without a better validation loss, and return the best
            state. Epochs do not count before the schedule of an objective has ended.
        plate: the local plate's name, for a guide that does not know it.
        init_state: continue from this state.
        init_params: initial values of parameters, by name, where training does not continue.
        freeze: what stays as it is: "model", the parameters that the model declares; "guide", all
            others; "globals", those of the guide of global sites; or parameters by name; or a
            sequence of these. Where training starts anew, give their values with ``init_params``.
        checkpoint: a folder in which progress is kept, once a minute, or `Checkpoints` for another
            interval. If it has checkpoints, training goes on from the last of them, and ends with
            the very result of a fit that was not interrupted.
        mesh: the devices of a `jax.sharding.Mesh` of one axis, among which the rows of each batch
            are divided; parameters are copied to all. They must divide the batch size. Losses are
            those of one device, but for the order of sums. Where the devices belong to several
            processes, ``data`` and ``validation`` are each one's own part; see the page on
            devices.
        callbacks: one or several; each is called after every epoch with its number, the SVI state
            and the losses, and may stop training; see `numpyro_vae.training.callbacks.Callback`.
        progress_bar: whether to show one, updated once an epoch.

    Raises:
        ValueError: if the data are empty, disagree in their number or are not finite, or an
            option does not fit them; or if checkpoints are of another fit.
        FloatingPointError: if no step of an epoch is finite.

    Example:
        >>> import optax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> from numpyro_vae import AutoAmortizedNormal
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-3), Trace_ELBO())
        >>> x = np.linspace(-2.0, 2.0, 100)
        >>> result = fit(svi, jax.random.key(0), x, batch_size=32, num_epochs=5, progress_bar=False)
        >>> result.losses.shape
        (20,)
    """
    check_svi(svi)
    require_key(rng_key)
    num_epochs = require_count("num_epochs", num_epochs)
    check_stopping(patience, validation)
    check_start(init_state, init_params)
    freeze = freeze if isinstance(freeze, str) else tuple(freeze)
    watching: Any = (callbacks,) if callable(callbacks) else callbacks
    with HANDLERS:  # what runs the model
        trainer, devices = trainer_of(svi, freeze), Devices.of(mesh)
        plate = plate or getattr(svi.guide, "plate_name", None)
        check_passes(data, num_epochs)
        source = _source(trainer, data, batch_size, num_data, batch_axes, plate, devices)
        check_objective(svi, source.sites)
        init_key, order_key, validation_key = jax.random.split(rng_key, 3)
        state = devices.put(_start(svi, trainer, source, init_key, init_state, init_params))
        check_supports(trainer, source.first())
        check_guide(trainer, source.first(), source.sites, state)
        check_params(trainer, source.first())
        warn_of_another_model(svi, source.first())
        if isinstance(source, SimulationSource):
            source.require_frozen()
        columns = column_names(getattr(data, "like", data), batch_axes)
        given = (validation, batch_axes, columns, validation_key)
        score = _validator(trainer, source, devices, *given)
        settled = settled_epoch(svi.loss, state, source.num_steps, num_epochs)
        progress = Progress(state, None if patience is None else EarlyStopping(patience, settled))
    folder: Any = nullcontext()
    if checkpoint is not None:
        options = {"batch_axes": batch_axes, "patience": patience}
        start = {"rng_key": rng_key, "init_params": init_params, "init_state": init_state}
        identity = identify(trainer, source, state, options, start | {"validation": validation})
        folder = open_checkpoints(checkpoint, identity, progress, num_epochs)
    with folder, ProgressBar(num_epochs, progress.num_epochs, is_shown=progress_bar) as bar:
        progress.state = devices.put(progress.state)
        own = (UndeclaredScale(trainer, source.first()),)
        own = own if progress.stopping is None else (*own, progress.stopping)
        run = partial(source.run, rng_key=order_key)
        after = None if checkpoint is None else folder.after_epoch
        reason = _train(progress, run, score, (bar, *own, *watching), num_epochs, after)
        if reason is StopReason.INTERRUPTED:
            bar.write("Interrupted: returning the state after the last complete epoch.")
    losses, history = progress.history()
    if reason is StopReason.EPOCHS_DONE:
        warn_of_losses(losses, svi, source.sites)
    warn_of_validation(history.get("validation_loss", np.zeros(0)))
    state = devices.leave(progress.best_state())
    return FitResult(
        trainer.params(state),
        state,
        losses,
        history,
        stop_reason=reason,
        static_kwargs=dict(svi.static_kwargs),
        batch_axes=batch_axes,
        num_data=None if source.data.is_whole else source.first().num_data,
        sizes=_sizes(svi, source),
        columns=columns,
    )


def _sizes(svi: SVI, source: Source) -> dict[str, tuple[int, int]]:
    """Return by plate how many rows data sets have; of none where they are not all at hand."""
    model = getattr(svi.guide, "model", None)
    if not isinstance(model, DataSets) or not isinstance(source, ArraySource | SimulationSource):
        return {}
    args, kwargs = source.data.whole()
    return model.sizes(*args, **{**kwargs, **svi.static_kwargs})


def _train(
    progress: Progress,
    run: Callable[..., tuple[SVIState, np.ndarray]],
    score: Score,
    watching: tuple[Callback, ...],
    num_epochs: int,
    after_epoch: Callable[[], None] | None,
) -> StopReason:
    """Run the epochs that are not done yet, and return why they ended."""
    try:
        while progress.reason is None and progress.num_epochs < num_epochs:
            epoch = progress.num_epochs
            state, losses = run(progress.state, epoch=epoch)
            metrics = progress.add(state, losses, score(state))
            stops = [callback(epoch, state, metrics) for callback in watching]
            if any(stops):
                progress.reason = _reason(progress.stopping)
            if after_epoch is not None:
                after_epoch()
    except KeyboardInterrupt:
        return StopReason.INTERRUPTED
    return progress.reason or StopReason.EPOCHS_DONE


def _start(
    svi: SVI,
    trainer: Trainer,
    source: Source,
    rng_key: Array,
    init_state: SVIState | None,
    init_params: dict[str, Any] | None,
) -> SVIState:
    """Return the state to start from, and leave the SVI ready for its own methods."""
    transforms = param_transforms(svi)
    if init_state is None or transforms is None or trainer.fresh is None:
        state = trainer.init(rng_key, source.first(), init_params)
        check_names(init_params, trainer)
    if init_state is None or transforms is None:
        set_param_transforms(svi, trainer.transforms)
    else:
        trainer.transforms = transforms
    if init_state is None:
        return state
    check_state(init_state, trainer.fresh, svi)
    return init_state


def _reason(stopping: EarlyStopping | None) -> StopReason:
    """Return which of those who watch has stopped training."""
    if stopping is not None and stopping.waited >= stopping.patience:
        return StopReason.NO_IMPROVEMENT
    return StopReason.CALLBACK


def _source(
    trainer: Trainer,
    data: Any,
    batch_size: int | None,
    num_data: int | None,
    batch_axes: Any,
    plate: str | None,
    devices: Devices,
) -> Source:
    data = as_rows(data)
    if isinstance(data, Simulations):
        like = as_rows(data.like)
        if not is_in_memory(like) or is_stored(like, batch_axes):
            raise ValueError(
                "Simulations(like=) takes data in memory, not on disk or an iterable of batches. "
                "Pass some of the rows, as an array."
            )
        like = _source(trainer, data.like, batch_size, num_data, batch_axes, plate, devices)
        return SimulationSource(trainer, like, data)
    if is_in_memory(data):
        if num_data is not None:
            raise ValueError("num_data= is for iterables; arrays say how many data there are.")
        if is_stored(data, batch_axes):
            size = _size(batch_size, count_rows(data, batch_axes) * devices.num_hosts)
            return ChunkSource(trainer, data, size, batch_axes, plate, devices=devices)
        arrays = devices.together(partial(trainer.read, data, batch_axes))
        if arrays.is_whole:
            _require_one(devices, "with batch_axes=None the model takes all data at once")
            if batch_size is not None:
                raise ValueError(
                    f"batch_size is {batch_size}, but with batch_axes=None the model takes all "
                    "data at once. Leave one of them out."
                )
            return WholeSource(trainer, arrays, plate)
        size = _size(batch_size, arrays.num_data * devices.num_hosts)
        return ArraySource(trainer, arrays, size, plate, devices)
    if num_data is None or batch_size is not None:
        raise ValueError(
            f"data is an iterable of batches ({type(data).__name__}): say with num_data= how many "
            "data there are in all, and leave batch_size= to the iterable. Data themselves are an "
            "array, not a list."
        )
    num_data = require_count("num_data", num_data)
    return IterableSource(trainer, data, num_data, batch_axes, plate, devices)


def _require_one(devices: Devices, reason: str) -> None:
    if devices.mesh is not None:
        raise ValueError(
            f"mesh has {devices.number} devices of {devices.num_hosts} processes to divide rows "
            f"among, but {reason}. Leave mesh= out, or pass one of this process's devices."
        )


def _size(batch_size: int | None, num_data: int) -> int:
    """Return how many rows a batch has."""
    return min(128, num_data) if batch_size is None else require_count("batch_size", batch_size)


def _validator(
    trainer: Trainer,
    source: Source,
    devices: Devices,
    validation: Any,
    batch_axes: Any,
    columns: ColumnNames,
    rng_key: Array,
) -> Score:
    """Return a function from a state to its validation loss per datum, if there are such data."""
    if validation is None:
        return lambda state: {}
    read = partial(_read_validation, trainer, source, validation, batch_axes, columns)
    data = devices.together(read)
    batches, real = zip(*source.batches(data), strict=True)
    rows = batches[0].every(data.num_data)
    given = (trainer.reader, data, trainer.svi.static_kwargs, rows)
    devices.together(partial(require_finite_observations, *given))
    keys = jax.random.split(rng_key, len(batches))

    def score(state: SVIState) -> dict[str, float]:
        params, pairs = trainer.params(state), zip(keys, batches, strict=True)
        losses = [trainer.evaluate(key, params, batch) for key, batch in pairs]
        return {"validation_loss": float(np.average(jax.device_get(losses), weights=real))}

    return score


def _read_validation(
    trainer: Trainer, source: Source, validation: Any, batch_axes: Any, columns: ColumnNames
) -> ArrayData:
    args, _ = source.data.whole()
    validation = in_form(validation, trainer.svi.model, by_position=bool(args))
    validation = in_order(validation, batch_axes, columns, "validation data")
    data = trainer.read(validation, batch_axes, "validation")
    if data.layout != source.data.layout:
        found, expected = ([*x.layout.names] for x in (data, source.data))
        raise ValueError(
            f"validation has arrays at the arguments {found}, the data at {expected}, or other "
            "values beside them. Pass validation data in the form of the training data."
        )
    return data
