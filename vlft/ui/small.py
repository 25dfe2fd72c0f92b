"""Read small files that anybody may have put into a folder. Pipes and devices, which may never end, are not opened."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

MOST_BYTES = 64 << 20
MOST_NUMBER = 1 << 53  # larger steps are no steps, and have no exact float64


def opened(path: str | Path) -> IO[bytes]:
    """Open a regular file to read. Opening never waits.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def head(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Return the first `most` bytes of a regular file.

    Raises:
        OSError: the errors of `opened`.
    """
    with opened(path) as file:
        return file.read(most)


def tail(path: str | Path, most: int) -> bytes:
    """Return the last `most` bytes of a regular file.

    Raises:
        OSError: the errors of `opened`.
    """
    with opened(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def document(path: str | Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return a JSON object in a file; {} if there is none that can be read, or the file is larger."""
    try:
        found = json.loads(head(path, most))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def step_of(line: Any) -> int:
    """Return the step of a line of a log.

    Raises:
        KeyError, TypeError, ValueError: it has none.
    """
    value = line["step"]
    if not isinstance(value, int | float) or not 0 <= value < MOST_NUMBER:  # NaN is refused as well
        raise ValueError(f"step {str(value)[:40]!r}")
    return int(value)
