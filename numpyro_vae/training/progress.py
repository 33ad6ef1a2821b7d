"""How far a fit is: all that its next epoch depends on, and its history."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpyro.infer.svi import SVIState

from numpyro_vae.training.callbacks import EarlyStopping, StopReason


def _no_losses() -> list[np.ndarray]:
    return [np.zeros(0, np.float32)]


@dataclass
class Progress:
    """How far a fit is, after an epoch.

    Attributes:
        state: the SVI state.
        stopping: early stopping, which has the best state; None without.
        losses: those of the steps, by epoch.
        metrics: those of each epoch, by name.
        reason: why training has stopped, if it has before all epochs were done.
    """

    state: SVIState
    stopping: EarlyStopping | None = None
    losses: list[np.ndarray] = field(default_factory=_no_losses)
    metrics: list[dict[str, float]] = field(default_factory=list)
    reason: StopReason | None = None

    @property
    def num_epochs(self) -> int:
        """How many epochs are done."""
        return len(self.metrics)

    def add(
        self, state: SVIState, losses: np.ndarray, scores: dict[str, float]
    ) -> dict[str, float]:
        """Take in an epoch, and return its metrics."""
        self.state = state
        self.losses.append(losses)
        self.metrics.append({"loss": float(np.nanmean(losses)), **scores})
        return self.metrics[-1]

    def history(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the losses of all steps, and by metric its value in each epoch."""
        names = self.metrics[0] if self.metrics else ()
        by_name = {name: np.array([found[name] for found in self.metrics]) for name in names}
        return np.concatenate(self.losses), by_name

    def best_state(self) -> SVIState:
        """Return the best state on validation data, if early stopping knows it, or the last."""
        best = None if self.stopping is None else self.stopping.best_state
        return self.state if best is None else best
