"""What is called after each epoch of a fit, and what ships with it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

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
    """

    def __init__(self, patience: int):
        self.patience, self.waited = patience, 0
        self.best_loss = np.inf
        self.best_state: SVIState | None = None

    def __call__(self, epoch: int, state: SVIState, metrics: Mapping[str, float]) -> bool:
        """Compare with the best epoch."""
        loss = metrics["validation_loss"]
        self.waited += 1
        if self.best_state is None or loss < self.best_loss or np.isnan(self.best_loss):
            self.best_loss, self.best_state, self.waited = loss, state, 0
        return self.waited >= self.patience


class ProgressBar:
    """Shows the epochs that are done, and the losses of the last.

    Args:
        num_epochs: how many there will be.
        is_shown: whether it shows anything.
    """

    def __init__(self, num_epochs: int, *, is_shown: bool):
        self.bar = tqdm(total=num_epochs, disable=not is_shown, unit="epoch")

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
