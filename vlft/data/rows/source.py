"""The interface between table readers and `vlft.data.files.unpack`: a stream of rows, and a place for their media.

The readers are `arrow`, `delimited`, `tars` and `folders` in `vlft.data.files`. Independent of file formats.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

LINE_BYTES = 64 << 20  # limit for a row; a thousand times the longest conversation
# A list of these with a single <video> tag is one video, frame by frame. Not .gif, which is itself a clip.
FRAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
PICTURES = (*FRAMES, ".gif")
VIDEOS = (
    *(".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".wmv", ".flv", ".3gp"),
    *(".ogv", ".vob"),
)
LINES = (".jsonl", ".ndjson")
SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus", ".aac")


@dataclass(frozen=True, kw_only=True)
class BrokenLine:
    """Stands in for a row that cannot be read. `records.parse_record` refuses it with its reason.

    Attributes:
        reason: why the row cannot be read.
        row: the parts of the row that are known.
    """

    reason: str
    row: object = None


def as_found(raw: object) -> object:
    """Return a row as it is in its file, for a report: of a `BrokenLine` the parts that are known, or its reason."""
    if isinstance(raw, BrokenLine):
        return raw.reason if raw.row is None else raw.row
    return raw


class Keep(Protocol):
    """Where a reader saves media and reports progress."""

    def file(self, content: bytes | IO[bytes]) -> str:
        """Save the content of a picture or video unchanged. Returns the absolute path that the file will have."""

    def done(self, amount: int) -> None:
        """Report that `amount` more has been read, in the units of `Source.size`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened table.

    Attributes:
        columns: names of the columns. None: only the rows have them.
        size: how much there is to read, in `unit`.
        unit: `row` or `B`.
        rows: function that yields the rows. `unpack` saves bytes in them that are media, and drops keys with None.
    """

    columns: tuple[str, ...] | None
    size: int
    unit: str
    rows: Callable[[Keep], Iterator[dict[str, Any] | BrokenLine]]


def kind_of(value: object) -> str:
    """Return the type of a JSON value as text, such as "a list"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = ((dict, "an object"), (list, "a list"), (str, "a string"), ((int, float), "a number"))
    return next(name for kind, name in names if isinstance(value, kind))


def home_of(path: str) -> str:
    """Return the folder where relative media paths of a data file start, unless a flag names one."""
    plain = path.lower().endswith((".json", *LINES))  # called for every row, so avoid a call of the file system
    return os.path.dirname(path) if plain or not os.path.isdir(path) else os.path.normpath(path)
