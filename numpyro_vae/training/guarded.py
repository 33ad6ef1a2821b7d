"""Steps one by one, where one may fail: it changes nothing, and is told of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import batched

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIState

from numpyro_vae.data.batch import Batch
from numpyro_vae.training.step import Trainer

CHUNK = 32  # steps between two looks at the losses
LARGE = 1e4  # data beyond this are suspected where a step fails


def guarded_steps(
    trainer: Trainer, state: SVIState, batches: Iterable[Batch], epoch: int
) -> tuple[SVIState, np.ndarray]:
    """Take steps one by one; one that is not finite changes nothing, and is warned about.

    Raises:
        FloatingPointError: if no step of the epoch is finite.
    """
    losses, where, largest = [np.zeros(0, np.float32)], "", 0.0
    for chunk in batched(batches, CHUNK):
        before, found = state, []
        for batch in chunk:
            state, loss = trainer.guarded_step(state, batch)
            found.append(loss)
        found = np.asarray(jax.device_get(found))
        if np.isnan(found).any() and not where:
            bad = int(np.isnan(found).argmax())
            step = sum(map(len, losses)) + bad
            for batch in chunk[:bad]:  # to the very state that failed
                before, _ = trainer.guarded_step(before, batch)
            where = f"step {step} of epoch {epoch}, at {trainer.culprit(before, chunk[bad])}"
            largest = _largest(chunk[bad])
        losses.append(found)
    losses = np.concatenate(losses)
    _report(losses, where, largest)
    return state, losses


def _largest(batch: Batch) -> float:
    """Return the largest absolute value of the data."""
    sizes = [jnp.abs(array.astype(float)) for array in batch.arrays if array.size]
    return max((float(jnp.nanmax(size)) for size in sizes), default=0.0)


def _report(losses: np.ndarray, where: str, largest: float) -> None:
    skipped = int(np.isnan(losses).sum())
    if not skipped:
        return
    found = f"the ELBO or its gradient was not finite in {skipped} of {len(losses)} steps"
    advice = "Look at the data and the priors there; a smaller learning rate may help."
    if largest > LARGE:
        advice = (
            f"The data are as large as {largest:.1g}, and squares of such numbers leave the range "
            "of floats: standardize the data, or write the model in larger units."
        )
    if skipped == len(losses):
        raise FloatingPointError(f"No step could be taken: {found}, first at {where}. {advice}")
    warnings.warn(f"Steps were skipped: {found}, first at {where}. {advice}", stacklevel=5)
