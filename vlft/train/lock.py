"""One run in a folder at a time."""

from __future__ import annotations

from pathlib import Path

from vlft.errors import CheckpointError
from vlft.files import Lock

LOCK = ".lock"


def hold(folder: Path) -> Lock:
    """The lock on a run folder, held until it is released or this process ends.

    Raises:
        CheckpointError: another process trains in it, or it cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {folder}: cannot be written ({error.strerror}). Choose a folder that can."
        ) from error
    lock = Lock(folder / LOCK)
    try:
        lock.take()
    except BlockingIOError as error:
        raise CheckpointError(
            f"--output_dir {folder}: another run is training there right now. Wait for it, or choose another."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {folder}: cannot be locked ({error.strerror}), so two runs could write there at once. "
            "Choose a folder on a file system that has flock."
        ) from error
    return lock
