"""What is called after each epoch of a fit, and what ships with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from numpyro_vae.data.batch import Batch
from numpyro_vae.guides.auto import AutoAmortizedNormal
from numpyro_vae.guides.network import is_headless
from numpyro_vae.model.plates import all_rows, minibatch
from numpyro_vae.numpyro_internals import in_one_thread
from numpyro_vae.training.step import Trainer

__all__ = ["Callback", "StopReason"]


class StopReason(Enum):
    """Why training stopped."""

    EPOCHS_DONE = "all epochs are done"
    NO_IMPROVEMENT = "the validation loss has not improved for `patience` epochs"
    INTERRUPTED = "KeyboardInterrupt"
    CALLBACK = "a callback stopped it"


@runtime_checkable
class Callback(Protocol):
    """A function that `fit` calls on the host after each epoch.

    Example:
        >>> def stop_below(epoch, state, metrics):
        ...     return metrics["loss"] < 1.0
    """

    def __call__(self, epoch: int, state: SVIState, metrics: Mapping[str, float]) -> bool | None:
        """Look at an epoch, and return True to stop training.

        Args:
            epoch: its number, from 0.
            state: the SVI state after it.
            metrics: ``loss``, the mean over its steps of the negative ELBO per datum, and
                ``validation_loss`` if there are validation data.
        """
        ...


class EarlyStopping:
    """Stops when the validation loss has not improved for some epochs, and keeps the best state.

    Args:
        patience: how many epochs.
        first: the epoch to begin with, as the objective still changes before it.
    """

    def __init__(self, patience: int, first: int = 0):
        self.patience, self.first, self.waited = patience, first, 0
        self.best_loss = np.inf
        self.best_state: SVIState | None = None

    def __call__(self, epoch: int, state: SVIState, metrics: Mapping[str, float]) -> bool:
        """Compare with the best epoch."""
        if epoch < self.first:
            return False
        loss = metrics["validation_loss"]
        self.waited += 1
        if self.best_state is None or loss < self.best_loss or np.isnan(self.best_loss):
            self.best_loss, self.best_state, self.waited = loss, state, 0
        return self.waited >= self.patience


class ProgressBar:
    """Shows the epochs that are done, and the losses of the last.

    Args:
        num_epochs: how many there will be.
        done: how many there have been.
        is_shown: whether it shows anything.
    """

    def __init__(self, num_epochs: int, done: int = 0, *, is_shown: bool):
        self.bar = tqdm(total=num_epochs, initial=done, disable=not is_shown, unit="epoch")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def __call__(self, epoch: int, state: SVIState, metrics: Mapping[str, float]) -> None:
        """Show an epoch."""
        text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def write(self, text: str) -> None:
        """Write a line above the bar."""
        self.bar.write(text)


class UndeclaredScale:
    """Warns after the first epoch if an encoder's own scale seems to be none of what it is read as.

    An encoder that returns ``(loc, raw_scale)`` to a guide without ``scale=`` is read as one of
    log-scales. These are negative nearly everywhere where priors are of unit scale, as posteriors
    are narrower; standard deviations never are.

    Args:
        trainer: of the fit.
        batch: the rows to look at.
    """

    def __init__(self, trainer: Trainer, batch: Batch):
        self.trainer, self.batch = trainer, batch

    def __call__(self, epoch: int, state: SVIState, metrics: Mapping[str, float]) -> None:
        """Look at the first epoch."""
        guide = self.trainer.svi.guide
        if epoch or not isinstance(guide, AutoAmortizedNormal) or guide.scale_is_declared:
            return
        params = self.trainer.params(state)
        if not is_headless(params, guide.prefix):
            return
        kwargs = self.trainer.svi.static_kwargs
        compiled = in_one_thread(jax.jit(partial(_raw_scale, guide, kwargs)))
        raw_scale = guide.compiled.setdefault((_raw_scale, self.trainer), compiled)
        if (np.asarray(raw_scale(params, self.batch)) >= 0).all():
            warnings.warn(
                "The encoder returns a pair (loc, raw_scale), and after an epoch raw_scale is "
                "negative nowhere in a batch. The guide reads it as log(scale), as no scale= was "
                'given. If it is a standard deviation, pass scale="scale" to the guide; if it is '
                'a log-scale, pass scale="log_scale".',
                stacklevel=3,
            )


def _raw_scale(
    guide: AutoAmortizedNormal, static_kwargs: dict[str, Any], params: dict[str, Any], batch: Batch
) -> Array:
    """Return what an encoder of pairs returns in the second place."""
    args, kwargs = batch.arguments()
    hold: Any = all_rows()
    if batch.fills_plate:
        hold = minibatch(plate=batch.plate, num_data=batch.num_data, indices=batch.indices)
    encoding = guide.encode_rows(hold, params, args, {**kwargs, **static_kwargs})
    return encoding.features["joint"][1]
