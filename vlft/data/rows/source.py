"""What a table looks like to the one who unpacks it: its rows one after another, and a place for their media.

Below the readers (`arrow`, `delimited`, `tars`, `folders`) and `vlft.data.files.unpack`. Knows no file format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

LINE_BYTES = 64 << 20  # of a row; a thousand times the longest conversation
# A list of these with a single <video> tag is one video, frame by frame. Not .gif: that is a clip of its own.
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
    """What stands in the place of a row that cannot be read; `records.parse_record` refuses it with its reason.

    Attributes:
        row: what is known of it.
    """

    reason: str
    row: object = None


class Keep(Protocol):
    """Where a reader puts the media it meets, and says how far it is."""

    def file(self, content: bytes | IO[bytes]) -> str:
        """Keeps the content of a picture or video, byte for byte, and gives the absolute path it will have."""

    def done(self, amount: int) -> None:
        """So much more has been read, in the units of `Source.size`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened table.

    Attributes:
        columns: their names; None where only the rows tell.
        size: how much there is to read. unit: of it, `row` or `B`.
        rows: gives them. Bytes in them that are media are for `unpack` to keep; keys with None are left out there.
    """

    columns: tuple[str, ...] | None
    size: int
    unit: str
    rows: Callable[[Keep], Iterator[dict[str, Any] | BrokenLine]]


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = ((dict, "an object"), (list, "a list"), (str, "a string"), ((int, float), "a number"))
    return next(name for kind, name in names if isinstance(value, kind))


def home_of(path: str) -> str:
    """The folder that relative media paths of a data file start from, unless flags name one."""
    plain = path.lower().endswith((".json", *LINES))  # asked for every row, so without asking the file system
    return os.path.dirname(path) if plain or not os.path.isdir(path) else os.path.normpath(path)
