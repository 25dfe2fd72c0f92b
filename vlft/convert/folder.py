"""A folder that appears whole or not at all, and says what it was made of. Knows not what is in it."""

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
    """The record of an import that has been made already, of the same.

    Args:
        out: the folder asked for.
        made_of: what it would be made of now.

    Returns:
        None where the folder is not there, or empty.

    Raises:
        ConfigError: it holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file. Name a new folder for what is imported.")
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
            f"{out}: holds another import, of which {key} was {was}; now it is {is_now}. Name a new or empty folder."
        )
    return found


@contextlib.contextmanager
def appearing_folder(out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder to fill beside `out`, which gets its name only once the block is left without an error.

    What a killed import has left beside it is taken away first, and said so; an error leaves nothing.

    Raises:
        ConfigError: another import fills it right now, or the disk does not take it.
    """
    out = out.resolve()
    try:
        with workshop(
            out.with_name(f".{out.name}.importing"),
            interrupted=lambda: say(f"an earlier import into {out} was interrupted: starting over"),
        ) as folder:
            yield folder
            put_in_place(folder, out, last=RECORD)  # onto an empty folder too
    except BlockingIOError as error:
        raise ConfigError(f"{out}: another import is writing it right now. Wait for it, or name another folder.") from (
            error
        )
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror or error}); nothing was left there. Name a folder on a disk "
            "that has room."
        ) from error


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Say in the folder what it was made of, and what became of it."""
    write_json(folder / RECORD, record)
