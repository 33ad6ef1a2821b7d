"""Training: epochs over data, validation, early stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.infer.svi import SVIState
from tqdm.auto import trange

from numpyro_vae.data.arrays import ArrayData, is_in_memory
from numpyro_vae.model.missing import FiniteObservations
from numpyro_vae.model.sites import read_model
from numpyro_vae.training.sources import ArraySource, IterableSource, WholeSource
from numpyro_vae.training.step import Trainer

__all__ = ["FitResult", "fit"]

Score = Callable[[SVIState], float]
Source = ArraySource | WholeSource | IterableSource


class FitResult(NamedTuple):
    """What a fit returns: what ``svi.run`` does, and the history.

    Attributes:
        params: the trained parameters of model and guide, with the networks' other state among
            them, so that they work wherever NumPyro takes ``params``.
        state: the SVI state they come from.
        losses: the negative ELBO per datum, in nats, of every step; NaN where one was skipped.
        history: arrays with an entry for each epoch: ``loss``, the mean over its steps, and
            ``validation_loss`` if there are validation data.
    """

    params: dict[str, Any]
    state: SVIState
    losses: np.ndarray
    history: dict[str, np.ndarray]


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
    progress_bar: bool = True,
) -> FitResult:
    """Train a guide, and the parameters of its model, on minibatches.

    In memory an epoch is one compiled scan over a fresh permutation; the model may take the rows
    of a batch, or all data and subsample in its plate. The ELBO of a batch is an unbiased
    estimate of that of all data, also where the model declares a plate of just the batch's size.
    A step that is not finite changes neither parameters, optimizer nor network state.
    ``KeyboardInterrupt`` ends training and returns what has been learned after the last epoch.

    Args:
        svi: model, guide, optimizer and objective.
        rng_key: the same key gives the same result, bit for bit.
        data: an array, a tuple of positional arguments of the model, or a dict of keyword
            arguments, the data along axis 0; or an iterable of such batches.
        batch_size: rows in a batch of in-memory data; by default 128, or all if they are fewer.
        num_epochs: passes over the data.
        num_data: for an iterable, how many data there are in all.
        batch_axes: the datum axis of each argument, as ``in_axes`` of `jax.vmap`; None alone if
            no argument has one, as with ragged groups: an epoch is then one step on all data.
        validation: in-memory data like ``data``, whose loss is computed after every epoch, always
            with the same random keys.
        patience: stop after so many epochs without a better validation loss, and return the best
            state.
        plate: the local plate's name, for a guide that does not know it.
        init_state: continue from this state.
        init_params: initial values of parameters, by name.
        progress_bar: whether to show one, updated once an epoch.

    Raises:
        ValueError: if the data are empty, disagree in their number or are not finite, or an
            option does not fit them.
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
    _check_options(num_epochs, patience, validation)
    plate = plate or getattr(svi.guide, "plate_name", None)
    source = _source(svi, data, batch_size, num_data, batch_axes, plate)
    _check_objective(svi, *source.trainer.read(source.first()))
    init_key, order_key, validation_key = jax.random.split(rng_key, 3)
    if init_state is None or svi.constrain_fn is None:  # a state from elsewhere needs the latter
        fresh = source.trainer.init(init_key, source.first(), init_params)
        init_state = init_state or fresh
    progress = _Progress(init_state)
    score = _validator(svi, source, validation, batch_axes, validation_key)
    with trange(num_epochs, disable=not progress_bar, unit="epoch") as epochs:
        try:
            for epoch in epochs:
                progress.advance(*source.run(progress.state, order_key, epoch), score)
                epochs.set_postfix_str(progress.describe(), refresh=False)
                if patience is not None and progress.epochs_since_best >= patience:
                    break
        except KeyboardInterrupt:
            epochs.write("Interrupted: returning the state after the last complete epoch.")
    return progress.result(source.trainer, best=patience is not None)


class _Progress:
    """What training has reached: the state, the best one, and the history."""

    def __init__(self, state: SVIState):
        self.state = self.best_state = state
        self.epochs_since_best = 0
        self.losses = [np.zeros(0, np.float32)]
        self.history: dict[str, list[float]] = {}

    def advance(self, state: SVIState, losses: np.ndarray, score: Score | None) -> None:
        """Take in an epoch."""
        self.state = state
        self.losses.append(losses)
        self.history.setdefault("loss", []).append(float(np.nanmean(losses)))
        if score is None:
            return
        scores = self.history.setdefault("validation_loss", [])
        scores.append(score(state))
        self.epochs_since_best += 1
        if not min(scores[:-1], default=np.inf) <= scores[-1]:
            self.best_state, self.epochs_since_best = state, 0

    def describe(self) -> str:
        """Return the last epoch's losses, for a progress bar."""
        return ", ".join(f"{name} {values[-1]:.4f}" for name, values in self.history.items())

    def result(self, trainer: Trainer, *, best: bool) -> FitResult:
        """Return the last state, or the best one."""
        state = self.best_state if best else self.state
        history = {name: np.array(values) for name, values in self.history.items()}
        return FitResult(trainer.params(state), state, np.concatenate(self.losses), history)


def _check_options(num_epochs: int, patience: int | None, validation: Any) -> None:
    if num_epochs < 1:
        raise ValueError(f"num_epochs is {num_epochs}, expected at least 1.")
    if patience is not None and (patience < 1 or validation is None):
        raise ValueError(
            f"patience is {patience} with validation data "
            f"{'missing' if validation is None else 'given'}; early stopping needs validation= "
            "data and a patience of at least 1 epoch."
        )


def _check_objective(svi: SVI, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise if the model has sites to enumerate, and the objective would draw from their prior."""
    sites = read_model(svi.model, args, {**kwargs, **svi.static_kwargs}).sites.values()
    enumerated = [site.name for site in sites if site.is_enumerated]
    enumerates = svi.loss.can_infer_discrete and not isinstance(svi.loss, TraceGraph_ELBO)
    if enumerated and not enumerates:
        raise ValueError(
            f"The model's sites {enumerated} are to be enumerated, which "
            f"{type(svi.loss).__name__} does not do. Train with numpyro.infer.TraceEnum_ELBO()."
        )


def _source(
    svi: SVI,
    data: Any,
    batch_size: int | None,
    num_data: int | None,
    batch_axes: Any,
    plate: str | None,
) -> Source:
    if is_in_memory(data):
        if num_data is not None:
            raise ValueError("num_data= is for iterables; arrays say how many data there are.")
        arrays = ArrayData.read(data, batch_axes)
        if arrays.is_whole:
            if batch_size is not None:
                raise ValueError(
                    f"batch_size is {batch_size}, but with batch_axes=None the model takes all "
                    "data at once. Leave one of them out."
                )
            return WholeSource(svi, arrays, plate)
        return ArraySource(svi, arrays, batch_size or min(128, arrays.num_data), plate)
    if num_data is None or batch_size is not None:
        raise ValueError(
            f"data is an iterable of batches ({type(data).__name__}): say with num_data= how many "
            "data there are in all, and leave batch_size= to the iterable."
        )
    return IterableSource(svi, data, num_data, batch_axes, plate)


def _validator(
    svi: SVI, source: Source, validation: Any, batch_axes: Any, rng_key: Array
) -> Score | None:
    """Return a function from a state to the validation loss per datum, or None."""
    if validation is None:
        return None
    data = ArrayData.read(validation, batch_axes, "validation")
    if data.layout != source.data.layout:
        raise ValueError(
            f"validation has the structure {data.layout}, the data {source.data.layout}. Pass "
            "validation data in the form of the training data."
        )
    FiniteObservations(svi.model, svi.static_kwargs).require(data)
    batches, real = zip(*source.batches(data), strict=True)
    keys = jax.random.split(rng_key, len(batches))

    def score(state: SVIState) -> float:
        params = source.trainer.params(state)
        losses = [
            source.trainer.evaluate(key, params, batch)
            for key, batch in zip(keys, batches, strict=True)
        ]
        return float(np.average(jax.device_get(losses), weights=real))

    return score
