"""The media that a row names, as `Image` and `Video`; and how messages name a row. Opens no file; of a folder of frames
it reads the names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vlft.data.access import Access, NoAccess
from vlft.data.rows import kind_of
from vlft.data.sample import Image, Overrides, Video
from vlft.errors import BadRow, DataError

# A list of these with a single <video> tag is one video, frame by frame. Not .gif: that is a clip of its own.
FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # files that systems leave in folders
FILES_PER_ROW = 10_000  # of a kind; each costs a token at least, so no context holds as many
SHOWN = 200  # characters of what a row holds, in messages


@dataclass(frozen=True, kw_only=True)
class RowName:
    """Which row is being parsed, for its messages."""

    file: str
    index: int
    id: str | None

    def bad(self, field: str, reason: str) -> DataError:
        return DataError(BadRow(file=self.file, index=self.index, id=self.id, field=field, reason=reason))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where relative paths start, that folder in messages, and what may be named."""

    access: Access
    folder: str
    named: str


def images(row: RowName, value: object, places: Places, *, key: str, overrides: Overrides) -> list[Image]:
    """What a row lists under `image` or `images`: one picture, a list of them, or nothing.

    Args:
        key: under which it lists them.
        overrides: of all of them.

    Raises:
        DataError: something else, or a path that is not followed (`vlft.data.access`).
    """
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [picture(row, item, f"{key}[{i}]", places, overrides) for i, item in enumerate(value)]
    return [picture(row, value, key, places, overrides)]


def picture(row: RowName, value: object, field: str, places: Places, overrides: Overrides) -> Image:
    """One still.

    Raises:
        DataError: as `images`.
    """
    return Image(path=_path(row, value, field, places), field=field, overrides=overrides)


def videos(row: RowName, value: object, places: Places, *, tags: int, key: str, overrides: Overrides) -> list[Video]:
    """What a row with so many `<video>` tags lists under `video` or `videos`: see `records.parse_record`.

    Raises:
        DataError: as `images`.
    """
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [clip(row, value, key, places, overrides)]
    if value and tags == 1 and all(isinstance(item, str) and _is_frame(item) for item in value):
        return [clip(row, value, key, places, overrides)]
    return [clip(row, item, f"{key}[{i}]", places, overrides) for i, item in enumerate(value)]


def clip(row: RowName, value: object, field: str, places: Places, overrides: Overrides) -> Video:
    """One video: a file, or its frames, which are all taken, whatever a row says of fps: a list of them, or a folder.

    Raises:
        DataError: as `images`.
    """
    if isinstance(value, list):
        frames = _frames(row, value, field, places)
    else:
        path = _path(row, value, field, places)
        if not os.path.isdir(path):
            return Video(path=path, field=field, overrides=overrides)
        frames = _frames(row, _in_folder(row, value, path, field), field, places)
    size = Overrides(min_pixels=overrides.min_pixels, max_pixels=overrides.max_pixels)
    return Video(frames=frames, field=field, overrides=size)


def _is_frame(path: str) -> bool:
    name = path.lower()
    return name.endswith(FRAME_ENDINGS) or ("://" in name and name.partition("?")[0].endswith(FRAME_ENDINGS))


def _in_folder(row: RowName, value: object, folder: str, field: str) -> list[str]:
    """The frames in a folder, named as the row names it, in their natural order: frame_2 before frame_10."""
    try:
        names = sorted(os.listdir(folder), key=_natural)
    except OSError as error:
        raise row.bad(field, f"{folder}: cannot be read ({error.strerror}). Look at its permissions") from error
    names = [name for name in names if not name.startswith(".") and name.lower() not in OF_SYSTEMS]
    if not names:
        raise row.bad(field, f"{folder}: a folder without pictures, so a video of no frames. Fill it, or name a video")
    for name in names:
        if not name.lower().endswith(FRAME_ENDINGS) or os.path.isdir(os.path.join(folder, name)):
            raise row.bad(
                field,
                f"{folder}: a folder of frames holds pictures only, and {name} is none by its name. "
                "Move it elsewhere, or list the frames",
            )
    if len(names) > FILES_PER_ROW:
        raise row.bad(field, f"{folder}: {len(names):,} frames, and a row may name {FILES_PER_ROW:,}. Split the video")
    return [os.path.join(str(_file(value)), name) for name in names]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which numbers in names count as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _frames(row: RowName, value: list, field: str, places: Places) -> tuple[str, ...]:
    if not value:
        raise row.bad(field, "a video of no frames. List its pictures or drop it")
    return tuple(_path(row, item, f"{field}[{i}]", places) for i, item in enumerate(value))


def _path(row: RowName, value: object, field: str, places: Places) -> str:
    value = _file(value)
    if not isinstance(value, str):
        wanted = "a path" if "[" in field else "a path, a list of paths or null"
        raise row.bad(field, f"is {kind_of(value)}, where {wanted} belongs")
    if not value.strip():
        raise row.bad(field, "is an empty path. Name the file or drop the item")
    try:
        return places.access.locate(value, folder=places.folder, named=places.named)
    except NoAccess as error:
        raise row.bad(field, str(error)) from error


def _file(value: object) -> object:
    """`{"bytes": ..., "path": ...}`, as Hugging Face's image columns have it, as a path or an embedded picture."""
    if not isinstance(value, dict) or not value or not value.keys() <= {"bytes", "path"}:
        return value
    content = value.get("bytes")
    if content is None:
        return value.get("path")
    return f"data:;base64,{content}" if isinstance(content, str) else content


def refuse_many_files(row: RowName, key: str, value: object, others: int = 0) -> None:
    """Refuse a row that names more than `FILES_PER_ROW` files under `key`, with `others` of the kind besides."""
    listed = value if isinstance(value, list) else []
    files = others + sum(len(item) if isinstance(item, list) else 1 for item in listed)
    if files > FILES_PER_ROW:
        raise row.bad(key, f"{files:,} files, and a row may name {FILES_PER_ROW:,} of a kind. Split the row")


def short(text: str) -> str:
    """Text out of a row, cut to what a message has room for."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
