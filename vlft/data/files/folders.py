"""Read folders of pictures or videos as rows: with a metadata file, or with one folder per class.

These are the `imagefolder` and `videofolder` of Hugging Face `datasets`. The files stay where they are; rows hold
their paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from vlft.data.files.arrow import arrow_source
from vlft.data.files.delimited import delimited_source
from vlft.data.rows.source import LINE_BYTES, PICTURES, VIDEOS, BrokenLine, Keep, Source
from vlft.errors import ConfigError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE, FILES = "file_name", "file_names"


def metadata_of(folder: str) -> str | None:
    """Return the metadata file of a folder, if it has one that names files.

    Raises:
        ConfigError: the folder has several, or one that cannot be read.
    """
    found = [path for name in METADATA if os.path.isfile(path := os.path.join(folder, name)) and _names_files(path)]
    if len(found) > 1:
        raise ConfigError(
            f"{folder}: holds {' and '.join(map(os.path.basename, found))}. Keep one, or pass one of them directly."
        )
    return found[0] if found else None


def _names_files(file: str) -> bool:
    columns = _opened(file).columns
    return columns is None or any(column.endswith((FILE, FILES)) for column in columns)


def _opened(file: str) -> Source:
    if file.endswith(".csv"):
        return delimited_source(file, [file])
    return arrow_source(file, [file]) if file.endswith(".parquet") else _lines(file)


def metadata_source(path: str, file: str) -> Source:
    """Open a folder's metadata file as a table. Its `file_name` columns become `image` or `video`.

    Raises:
        ConfigError: the file cannot be read.
    """
    source = _opened(file)

    def rows(keep: Keep) -> Iterator[dict[str, Any] | BrokenLine]:
        for row in source.rows(keep):
            yield row if isinstance(row, BrokenLine) else _renamed(row)

    return Source(columns=None, size=source.size, unit=source.unit, rows=rows)


def _lines(file: str) -> Source:
    def rows(keep: Keep) -> Iterator[dict[str, Any] | BrokenLine]:
        with open(file, "rb") as lines:
            number = 0
            while line := lines.readline(LINE_BYTES + 1):
                number += 1
                keep.done(len(line))
                if len(line) > LINE_BYTES:
                    raise ConfigError(f"{file}, line {number}: more than {LINE_BYTES:,} bytes. Split the row.")
                if line.strip():
                    yield _object(line, number)

    return Source(columns=None, size=os.path.getsize(file), unit="B", rows=rows)


def _object(line: bytes, number: int) -> dict[str, Any] | BrokenLine:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        return BrokenLine(reason=f"line {number}: not JSON in UTF-8: {error}. Fix the line")
    return row if isinstance(row, dict) else BrokenLine(reason=f"line {number}: is no object. Fix the line")


def _renamed(row: dict[str, Any]) -> dict[str, Any] | BrokenLine:
    """Rename `file_name`, `image_file_name` and `file_names` of a row to `image`, `mask_file_name` to `mask`."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        new = key
        if value is not None and key in (FILE, FILES):
            first = value[0] if isinstance(value, list) and value else value
            clip = isinstance(first, str) and first.lower().endswith(VIDEOS)
            new = "video" if clip else "image"
        elif key.endswith((f"_{FILE}", f"_{FILES}")):
            new = key.removesuffix(f"_{FILES}").removesuffix(f"_{FILE}")
        if new in found and found[new] is not None:
            return BrokenLine(reason=f'both "{key}" and "{new}" name its {new}. Keep one of the columns', row=row)
        found[new] = value
    return found


def classes_of(folder: str) -> dict[str, list[str]]:
    """Return the subfolders that hold pictures or videos, each with its files; sorted."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        below = os.path.join(folder, name)
        if name[0] != "." and os.path.isdir(below):
            files = [
                os.path.join(name, os.path.relpath(os.path.join(at, file), below))
                for at, _, files in os.walk(below)
                for file in files
                if file.lower().endswith((*PICTURES, *VIDEOS)) and file[0] != "."
            ]
            if files:
                found[name] = sorted(files)
    return found


def classes_source(path: str, classes: dict[str, list[str]]) -> Source:
    """Make a table with one row for each file of the class folders: its path, and the folder's name as `label`."""
    kinds = {_kind(file) for files in classes.values() for file in files}

    def rows(keep: Keep) -> Iterator[dict[str, Any] | BrokenLine]:
        for label, files in classes.items():
            for file in files:
                yield {_kind(file): file, "label": label}
                keep.done(1)

    size = sum(map(len, classes.values()))
    return Source(columns=(*sorted(kinds), "label"), size=size, unit="row", rows=rows)


def _kind(file: str) -> str:
    return "video" if file.lower().endswith(VIDEOS) else "image"


def loose_media(names: Sequence[str]) -> list[str]:
    """Return the files among these that are pictures or videos."""
    return [name for name in names if name.lower().endswith((*PICTURES, *VIDEOS))]
