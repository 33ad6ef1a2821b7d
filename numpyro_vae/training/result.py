"""What a fit returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpyro.infer.svi import SVIState

from numpyro_vae.data.labels import ColumnNames
from numpyro_vae.training.callbacks import StopReason

__all__ = ["FitResult"]


class FitResult(NamedTuple):
    """What a fit returns: what ``svi.run`` does, the history, and what `Posterior` needs to know.

    Attributes:
        params: the trained parameters of model and guide, with the networks' other state among
            them, so that they work wherever NumPyro takes ``params``.
        state: the SVI state they come from.
        losses: the negative ELBO per datum, in nats, of every step; NaN where one was skipped.
        history: arrays with an entry for each epoch: ``loss``, the mean over its steps, and
            ``validation_loss`` if there are validation data.
        stop_reason: why training stopped.
        static_kwargs: the SVI's keyword arguments that are the same in every call.
        batch_axes: the datum axis of each argument, as it was given.
        num_data: how many rows of data there were; None if the model took them whole.
        sizes: of a guide of data sets, by plate the least and the largest number of rows in memory
            that it was trained on.
        columns: of data with names, those of their columns, by the place of the argument: results
            of other data are of columns in that order.
    """

    params: dict[str, Any]
    state: SVIState
    losses: np.ndarray
    history: dict[str, np.ndarray]
    stop_reason: StopReason = StopReason.EPOCHS_DONE
    static_kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written to
    batch_axes: Any = 0
    num_data: int | None = None
    sizes: dict[str, tuple[int, int]] = {}  # noqa: RUF012 - never written to
    columns: ColumnNames = {}  # noqa: RUF012 - never written to
