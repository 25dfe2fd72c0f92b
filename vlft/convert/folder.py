"""Write an import folder atomically, with a record of what it was made from. Independent of its content."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlft.errors import ConfigError
from vlft.files import put_in_place, workshop, write_json
from vlft.text import short

RECORD = "import.json"


def finished(out: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of an earlier import of the same files with the same options.

    Args:
        out: the folder of the import.
        made_of: the files and options of the import.

    Returns:
        The record; None if the folder does not exist or is empty.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file. Name a new folder for the import.")
    record = out / RECORD
    if not record.exists():
        there = sorted(item.name for item in out.iterdir())
        if not there:
            return None
        raise ConfigError(f"{out}: holds something else ({', '.join(there[:3])}, ...). Name a new or empty folder.")
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        before = found["made_of"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record}: cannot be read ({error}). Name a new or empty folder.") from error
    if before != made_of:
        key = next(key for key in made_of if before.get(key) != made_of[key])
        was, is_now = (short(json.dumps(values.get(key), ensure_ascii=False)) for values in (before, made_of))
        raise ConfigError(
            f"{out}: holds another import: its {key} was {was}, and now it is {is_now}. Name a new or empty folder."
        )
    return found


@contextlib.contextmanager
def appearing_folder(out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield a temporary folder next to `out`. It is renamed to `out` when the block ends without an error.

    The temporary folder of a killed import is removed first, with a message. After an error, nothing is left.

    Args:
        out: the folder of the import.
        say: function that shows a line to the user.

    Raises:
        ConfigError: another import is writing the folder, or it cannot be written.
    """
    out = out.resolve()
    try:
        with workshop(
            out.with_name(f".{out.name}.importing"),
            interrupted=lambda: say(f"an earlier import into {out} was interrupted: starting over"),
        ) as folder:
            yield folder
            put_in_place(folder, out, last=RECORD)  # `out` may exist as an empty folder
    except BlockingIOError as error:
        raise ConfigError(f"{out}: another import is writing it right now. Wait for it, or name another folder.") from (
            error
        )
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror or error}); nothing was left there. Name a folder on a disk "
            "with free space."
        ) from error


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of an import: what it was made from, and its result."""
    write_json(folder / RECORD, record)
