"""Write the rows that can be trained to one file, and the refused rows to `quarantine.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlft.check import Check
from vlft.data.files.index import RowIndex
from vlft.data.rows.source import BrokenLine, home_of
from vlft.data.rows.write_back import written
from vlft.errors import ConfigError
from vlft.files import appearing

QUARANTINE = "quarantine.jsonl"
ENDINGS = (".json", ".jsonl")


def refuse_target(out: str, index: RowIndex) -> None:
    """Raise an error before a long check if `--fix` could not write its result.

    Raises:
        ConfigError: the ending is not that of a data file, the file already exists, or media paths of the rows would
            lead elsewhere from its folder.
    """
    target = Path(out)
    if target.suffix not in ENDINGS:
        raise ConfigError(f"--fix {out}: not a data file. Use a name that ends in .json or .jsonl.")
    if target.exists():
        raise ConfigError(f"--fix {out}: already exists. Use a new file, or remove it.")
    if (kept := target.parent / QUARANTINE).exists():
        raise ConfigError(f"--fix {out}: {kept} already exists, and refused rows go there. Rename or remove it.")
    folders = {file.image_folder for file in index.files}
    if len(folders) > 1:
        some = " and ".join(str(folder) for folder in list(folders)[:2])
        raise ConfigError(
            f"--fix {out}: media paths in this file would start from one folder, but the data sets use several "
            f"({some}). Fix them one by one: vlft check-data FILE --image_folder DIR --fix OUT"
        )
    for file in index.files:
        folder = os.path.abspath(home_of(file.name) or ".")
        if file.image_folder is None and folder != os.path.dirname(os.path.abspath(out)):
            raise ConfigError(
                f"--fix {out}: without --image_folder, media paths start from {folder}, where {file.name} is. Write "
                "OUT into that folder, or pass --image_folder."
            )


def write_clean(checked: Check, out: str) -> Path:
    """Write the rows that can be trained to one file, and all refused rows to `quarantine.jsonl` beside it.

    Rows are written unchanged, except for the tags that `--missing_tags first` added. Rows of `--eval_path` are not
    written: a row that is trained can no longer be used to evaluate.

    Args:
        checked: the check.
        out: a new `.json` or `.jsonl` file.

    Returns:
        path of the file with the refused rows.

    Raises:
        ConfigError: a file cannot be written.
    """
    try:
        with appearing(out) as file:
            array = out.endswith(".json")
            file.write(b"[\n" if array else b"")
            for number, place in enumerate(checked.good[checked.good < checked.training].tolist()):
                file.write((b",\n" if array else b"\n") if number else b"")
                file.write(_line(_as_trained(checked.index, place)))
            file.write(b"\n]\n" if array else b"\n")
        return write_quarantine(checked, Path(out).parent)
    except OSError as error:
        raise ConfigError(
            f"--fix {out}: cannot be written ({error.strerror}). Use a file in another folder."
        ) from error


def write_quarantine(checked: Check, folder: Path) -> Path:
    """Write refused rows with their reasons: `file`, `index`, `id`, `field`, `reason`, `row`.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / QUARANTINE
    with appearing(path) as file:
        for entry in _refused(checked):
            file.write(_line(entry) + b"\n")
    return path


def _as_trained(index: RowIndex, place: int) -> object:
    raw = index.raw(place)
    return written(raw, index[place].added) if index.flags.missing_tags == "first" else raw


def _refused(checked: Check) -> Iterator[dict[str, Any]]:
    places = {file.name: place for place, file in enumerate(checked.index.files)}
    for row in checked.found.bad:
        raw = checked.index.files[places[row.file]].raw(row.index)
        yield {
            "file": row.file,
            "index": row.index,
            "id": row.id,
            "field": row.field,
            "reason": row.reason,
            "row": (raw.reason if raw.row is None else raw.row) if isinstance(raw, BrokenLine) else raw,
        }


def _line(value: object) -> bytes:
    # Lone surrogates stay escaped: UTF-8 cannot encode them, and they may be the reason for the refusal.
    text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
