"""One run in a folder at a time. The lock is `flock`: it goes with the process, so a kill leaves none behind."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path
from typing import IO

from vlft.errors import CheckpointError

LOCK = ".lock"


class FolderLock:
    """The lock on a run folder.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold the folder until `release`, or until this process ends.

        Raises:
            CheckpointError: another process trains in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path / LOCK, "w")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise CheckpointError(
                f"--output_dir {self.path}: cannot be written ({error.strerror}). Choose a folder that can."
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"--output_dir {self.path}: another run is training there right now. Wait for it, or choose another."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"--output_dir {self.path}: cannot be locked ({error.strerror}), so two runs could write "
                "there at once. Choose a folder on a file system that has flock."
            ) from error
        _not_in_children(self._file)

    def release(self) -> None:
        """Give the folder back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _not_in_children(file: IO[str]) -> None:
    """Loader workers inherit the file, and outlive a killed trainer for seconds in which it would still be held."""
    inherited = weakref.ref(file)

    def close() -> None:
        if (lock := inherited()) is not None:
            lock.close()

    os.register_at_fork(after_in_child=close)
