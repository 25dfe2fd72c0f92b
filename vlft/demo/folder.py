"""The demo's output folder: mark it, lock it, and refuse a folder that cannot be used."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlft.errors import ConfigError
from vlft.files import Lock, write_json

MARK = "vlft-demo.json"
NEEDED_BYTES = 150 * 1024 * 1024


@contextmanager
def claimed(out: Path, what: dict[str, Any]) -> Iterator[None]:
    """Mark and lock a folder for one demo within this context.

    Args:
        out: a folder that is new, empty, or marked with the same settings.
        what: the demo's settings, which are the mark.

    Raises:
        ConfigError: the folder holds something else, another demo uses it, its disk is full or it cannot be written.
    """
    mark = out / MARK
    try:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out}: is a file. Use a folder.")
        if out.is_dir() and any(out.iterdir()):
            _same(out, mark, what)
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if free < NEEDED_BYTES:
            raise ConfigError(
                f"--out {out}: {free >> 20:,} MiB are free there, the demo needs {NEEDED_BYTES >> 20}. Free some space "
                "or use a folder on another disk."
            )
        try:
            with Lock(out):
                if not mark.exists():
                    write_json(mark, what)
                yield
        except BlockingIOError:
            raise ConfigError(
                f"--out {out}: another vlft demo is running there. Wait for it, or use another folder."
            ) from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EPERM, errno.EDQUOT, errno.ENOTDIR):
            raise
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}{f': {error.filename}' if error.filename else ''}). "
            "Use a folder that can: vlft demo --out DIR"
        ) from error


def _same(out: Path, mark: Path, mine: dict[str, Any]) -> None:
    """Refuse a folder that is not marked with the settings of this demo."""
    try:
        there = json.loads(mark.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise ConfigError(
            f"--out {out}: holds something that is not part of a demo ({next(iter(out.iterdir())).name}). Use a new or "
            "empty folder."
        ) from None
    for key, value in mine.items():
        if there.get(key) != value:
            raise ConfigError(
                f"--out {out}: holds a demo with {key} {there.get(key)}, this one has {key} {value}. Remove the "
                "folder, or use another."
            )
