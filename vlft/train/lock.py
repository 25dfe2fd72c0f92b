"""The lock that lets only one run at a time use a folder."""

from __future__ import annotations

from pathlib import Path

from vlft.errors import CheckpointError
from vlft.files import Lock

LOCK = ".lock"


def hold(folder: Path) -> Lock:
    """Lock a run folder until the lock is released or this process ends.

    Raises:
        CheckpointError: another process trains in the folder, or it cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {folder}: cannot be written ({error.strerror}). Choose a folder that can be written."
        ) from error
    lock = Lock(folder / LOCK)
    try:
        lock.take()
    except BlockingIOError as error:
        raise CheckpointError(
            f"--output_dir {folder}: another run is training there right now. Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {folder}: cannot be locked ({error.strerror}), so two runs could write there at once. "
            "Choose a folder on a file system that supports flock."
        ) from error
    return lock
