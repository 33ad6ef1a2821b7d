"""Checkpoints of a fit, written while it goes on, from which it goes on after it was killed."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import jax
import numpy as np

from numpyro_vae.training.callbacks import StopReason
from numpyro_vae.training.identity import STEP, digest
from numpyro_vae.training.leaves import leaves_of, pack, unpack, with_leaves
from numpyro_vae.training.locking import FolderLock
from numpyro_vae.training.progress import Progress
from numpyro_vae.versions import versions

__all__ = ["Checkpoints"]

KEPT = 2  # the last one, and one more in case that it cannot be read
UNFINISHED = "*.orbax-checkpoint-tmp*"


@dataclass(frozen=True)
class Checkpoints:
    """Where `fit` writes checkpoints, and how often.

    A checkpoint is written by Orbax, in the background, while training goes on; so an epoch is not
    written where another one still is. The last epoch always is.

    Args:
        path: a folder, which is made if there is none. If it has checkpoints, `fit` goes on from
            the last of them.
        every_minutes: how long after the last checkpoint the next is written; 0 for every epoch.

    Raises:
        ValueError: if the time is negative.
    """

    path: str | os.PathLike[str]
    every_minutes: float = 1.0

    def __post_init__(self) -> None:
        if not self.every_minutes >= 0:
            raise ValueError(f"every_minutes is {self.every_minutes}, expected 0 or more.")


def open_checkpoints(
    wanted: str | os.PathLike[str] | Checkpoints,
    identity: dict[str, str],
    progress: Progress,
    num_epochs: int,
) -> CheckpointFolder:
    """Return the folder of a fit, and set its progress to that of the last checkpoint.

    Args:
        wanted: where, and how often.
        identity: by name what tells the fit from others.
        progress: of the fit.
        num_epochs: how many epochs are wanted in all.

    Raises:
        ValueError: if the folder has other files, checkpoints of another fit, or of a later epoch;
            or another fit writes to it.
    """
    wanted = wanted if isinstance(wanted, Checkpoints) else Checkpoints(wanted)
    folder = CheckpointFolder(wanted, identity, progress)
    try:
        folder.resume()
        if progress.num_epochs > num_epochs:
            raise ValueError(
                f"num_epochs is {num_epochs}, and {folder.path} has a checkpoint after epoch "
                f"{progress.num_epochs}. Pass a larger number, or another folder."
            )
    except Exception:
        folder.close()
        raise
    return folder


@dataclass(eq=False)
class CheckpointFolder:
    """The checkpoints of one fit; a context that writes the last epoch when it is left.

    Args:
        wanted: where, and how often.
        identity: by name what tells the fit from others.
        progress: of the fit, which `resume` sets to where it was.

    Raises:
        ValueError: if the folder has other files than checkpoints, or another fit writes to it.
    """

    wanted: Checkpoints
    identity: dict[str, str]
    progress: Progress
    written: int = 0  # the number of epochs in the last checkpoint
    complete: int = 0  # that after which all who watch have been called

    def __post_init__(self) -> None:
        self.time, self.path = monotonic(), Path(self.wanted.path).absolute()
        self._require_ours()
        self.lock = self._lock()
        self._open()

    def _lock(self) -> FolderLock | None:
        """Keep other fits out, before Orbax removes what they have not written to its end."""
        if jax.process_index():
            return None
        self.path.mkdir(parents=True, exist_ok=True)
        return FolderLock(self.path)

    def _open(self) -> None:
        """Let Orbax look at the folder, and remove what was not written to its end."""
        import orbax.checkpoint as ocp

        self.args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.path, options=options)

    def _require_ours(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file. Pass a folder for checkpoints.")
        found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        others = [x.name for x in found if not (_is_checkpoint(x) or x.match(UNFINISHED))]
        if others:
            raise ValueError(
                f"{self.path} has other files than checkpoints: {others[:3]}. Pass a folder of "
                "their own, which need not exist."
            )

    # -- reading ----------------------------------------------------------------------------------

    def resume(self) -> None:
        """Set the progress to that of the last checkpoint that can be read, if there is one.

        Raises:
            ValueError: if it is one of another fit, naming what differs.
        """
        broken = []
        for epoch in sorted(self.manager.all_steps(), reverse=True):
            try:
                info, arrays = self._read(epoch)
            except Exception as error:  # of any kind, as any file may be cut short
                broken.append((epoch, error))
                continue
            self._require_same(info)
            self._restore(info, arrays)
            break
        self.written = self.complete = self.progress.num_epochs
        for epoch, error in broken:
            after = f"after epoch {self.written}" if self.written else "anew"
            warnings.warn(
                f"The checkpoint after epoch {epoch} in {self.path} cannot be read and is removed; "
                f"training goes on {after}. ({type(error).__name__}: {str(error)[:200]})",
                stacklevel=3,
            )
            shutil.rmtree(self.path / str(epoch))
        self.manager.reload()

    def _read(self, epoch: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what a checkpoint has, if it is whole."""
        items = self.args.Composite(fit=self.args.JsonRestore(), arrays=self.args.StandardRestore())
        found = self.manager.restore(epoch, args=items)
        info, packed = found["fit"], np.asarray(found["arrays"]["packed"])
        if digest(packed) != info["digest"]:
            raise ValueError("its values are not those that were written")
        return info, unpack(packed, info["arrays"])

    def _require_same(self, info: dict[str, Any]) -> None:
        known, found = dict(info["identity"]), dict(self.identity)
        if info["versions"] != versions():  # which may compute the same in other ways
            del known[STEP], found[STEP]
        for name in (*known, *found):
            if known.get(name) != found.get(name):
                here, there = (x.get(name, "missing") for x in (known, found))
                raise ValueError(
                    f"{self.path} has checkpoints of another fit: {name} was {here}, and now is "
                    f"{there}. Give fit what it had, or checkpoints another folder."
                )

    def _restore(self, info: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        progress = self.progress
        like, stopping = progress.state, progress.stopping
        progress.state = with_leaves(like, arrays, "state")
        if stopping is not None:
            stopping.waited, stopping.best_loss = info["waited"], float(arrays["best_loss"])
            if "best 0" in arrays:
                stopping.best_state = with_leaves(like, arrays, "best")
        progress.losses, names = [arrays["losses"]], info["metrics"]
        rows = arrays["metrics"].tolist()
        progress.metrics = [dict(zip(names, row, strict=True)) for row in rows]
        progress.reason = None if info["reason"] is None else StopReason[info["reason"]]

    # -- writing ----------------------------------------------------------------------------------

    def after_epoch(self) -> None:
        """Write a checkpoint if it is time, and none is being written."""
        self.complete = self.progress.num_epochs
        is_due = monotonic() - self.time >= 60 * self.wanted.every_minutes
        if is_due and not self.manager.is_saving_in_progress():
            self._write()

    def _write(self) -> None:
        """Start writing; a checkpoint that cannot be written is warned about."""
        self._attempt(self.manager.check_for_errors)  # of the one before
        self.time = monotonic()
        packed, arrays = pack(_arrays(self.progress))
        info = _info(self.progress) | {"identity": self.identity, "arrays": arrays}
        items = self.args.Composite(
            fit=self.args.JsonSave(info | {"digest": digest(packed)}),
            arrays=self.args.StandardSave({"packed": packed}),
        )
        self.written = self.complete
        self._attempt(partial(self.manager.save, self.complete, args=items, force=True))

    def _attempt(self, write: Callable[[], Any]) -> None:
        """Write, or wait until it is done; what cannot be written is warned about."""
        try:
            write()
        except Exception as error:  # of any kind, as disks are
            with suppress(Exception):  # Orbax tells of the error again
                self.manager.close()
            self._open()
            self.written = max(self.manager.all_steps(), default=0)
            warnings.warn(
                f"A checkpoint could not be written to {self.path}: {str(error)[:300]}. Training "
                f"goes on; the last checkpoint is the one after epoch {self.written}.",
                stacklevel=4,
            )

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._attempt(self.manager.wait_until_finished)
        is_last = self.complete == self.progress.num_epochs  # not interrupted within an epoch
        if kind is None and is_last and self.written < self.complete:
            self._write()
            self._attempt(self.manager.wait_until_finished)
        self.close()

    def close(self) -> None:
        """Let others have the folder."""
        self.manager.close()
        if self.lock is not None:
            self.lock.release()


def _is_checkpoint(path: Path) -> bool:
    """Return whether Orbax has written a folder, whole or not by now."""
    return path.name.isdigit() and (path / "fit").is_dir() and (path / "arrays").is_dir()


def _arrays(progress: Progress) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint."""
    names = list(progress.metrics[0])
    metrics = np.array([[row[name] for name in names] for row in progress.metrics], np.float64)
    arrays = leaves_of(progress.state, "state")
    if progress.stopping is not None:
        arrays["best_loss"] = np.array(progress.stopping.best_loss, np.float64)
        if progress.stopping.best_state is not None:
            arrays |= leaves_of(progress.stopping.best_state, "best")
    return arrays | {"losses": np.concatenate(progress.losses), "metrics": metrics}


def _info(progress: Progress) -> dict[str, Any]:
    """Return what else a checkpoint has."""
    return {
        "versions": versions(),
        "metrics": list(progress.metrics[0]),
        "waited": 0 if progress.stopping is None else progress.stopping.waited,
        "reason": None if progress.reason is None else progress.reason.name,
    }
