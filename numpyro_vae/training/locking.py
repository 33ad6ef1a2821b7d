"""A lock on a folder, so that no two processes write into it."""

from __future__ import annotations

import os
from pathlib import Path


class FolderLock:
    """The lock of a folder, which the system releases when the process ends, however it ends.

    It is on the folder itself, so that nothing is left there. Where the system or the disk has no
    such locks, nothing is locked.

    Args:
        folder: it must exist.

    Raises:
        ValueError: if someone else holds it.
    """

    def __init__(self, folder: Path):
        self._opened: int | None = None
        try:
            import fcntl
        except ImportError:  # on Windows
            return
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(opened)
            raise ValueError(
                f"Another fit, of this process or another one, writes checkpoints to {folder} now. "
                "Wait until it has ended, or pass another folder."
            ) from None
        except OSError:  # on some disks of a network
            os.close(opened)
            return
        self._opened = opened

    def release(self) -> None:
        """Let others have the folder."""
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None
