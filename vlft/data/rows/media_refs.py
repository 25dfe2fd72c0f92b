"""The media that a row names, as `Image` and `Video`. Opens no file; of a folder of frames it reads the names."""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

from vlft.data.rows.access import LONGEST_PATH, Access, NoAccess
from vlft.data.rows.embedded import ending_of
from vlft.data.rows.source import FRAMES as FRAME_ENDINGS
from vlft.data.rows.source import PICTURES, VIDEOS, kind_of
from vlft.data.sample import Image, Overrides, Video
from vlft.errors import RowRef
from vlft.text import short

OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # files that systems leave in folders
MEDIA_ENDINGS = (*PICTURES, *VIDEOS)
FILES_PER_ROW = 10_000  # of a kind; each costs a token at least, so no context holds as many

# Keys of an object that names a file, and those beside them that say nothing of where it is.
ADDRESS_KEYS = (
    "bytes",
    "base64",
    "data",
    "source",
    "path",
    "url",
    "image",
    "image_url",
    "video",
    "video_url",
    "file_name",
)
_BESIDE = ("type", "detail", "format", "mime_type", "media_type")
# JPEG, PNG, GIF and WebP in base64 begin so; "/9j/" looks like an absolute path.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
_BASE64_LEAST = 64  # characters; the smallest picture there is has more


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where relative paths start, that folder in messages, and what may be named."""

    access: Access
    folder: str
    named: str


def images(row: RowRef, value: object, places: Places, *, key: str, overrides: Overrides) -> list[Image]:
    """What a row lists under `image` or `images`: one picture, a list of them, or nothing.

    Args:
        key: under which it lists them.
        overrides: of all of them.

    Raises:
        DataError: something else, or a path that is not followed (`vlft.data.rows.access`).
    """
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [picture(row, item, f"{key}[{i}]", places, overrides) for i, item in enumerate(value)]
    return [picture(row, value, key, places, overrides)]


def picture(row: RowRef, value: object, field: str, places: Places, overrides: Overrides) -> Image:
    """One still.

    Raises:
        DataError: as `images`.
    """
    return Image(path=_path(row, value, field, places), field=field, overrides=overrides)


def videos(row: RowRef, value: object, places: Places, *, tags: int, key: str, overrides: Overrides) -> list[Video]:
    """What a row with so many `<video>` tags lists under `video` or `videos`: see `records.parse_record`.

    Raises:
        DataError: as `images`.
    """
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [clip(row, value, key, places, overrides)]
    if tags == 1 and is_one_video(value):
        return [clip(row, value, key, places, overrides)]
    return [clip(row, item, f"{key}[{i}]", places, overrides) for i, item in enumerate(value)]


def clip(row: RowRef, value: object, field: str, places: Places, overrides: Overrides) -> Video:
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


def is_one_video(value: object) -> bool:
    """Whether what a row lists as videos may be the frames of one: all of it ends as pictures do."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and _is_frame(item) for item in value)


def _is_frame(path: str) -> bool:
    name = path.lower()
    return name.endswith(FRAME_ENDINGS) or ("://" in name and name.partition("?")[0].endswith(FRAME_ENDINGS))


def _in_folder(row: RowRef, value: object, folder: str, field: str) -> list[str]:
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
    return [os.path.join(str(local(address(value))), name) for name in names]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which numbers in names count as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _frames(row: RowRef, value: list, field: str, places: Places) -> tuple[str, ...]:
    if not value:
        raise row.bad(field, "a video of no frames. List its pictures or drop it")
    return tuple(_path(row, item, f"{field}[{i}]", places) for i, item in enumerate(value))


def _path(row: RowRef, value: object, field: str, places: Places) -> str:
    try:
        value = local(address(value))
    except NotAnAddress as error:
        raise row.bad(field, str(error)) from error
    if not isinstance(value, str):
        wanted = "a path" if "[" in field else "a path, a list of paths or null"
        raise row.bad(field, f"is {kind_of(value)}, where {wanted} belongs")
    if not value.strip():
        raise row.bad(field, "is an empty path. Name the file or drop the item")
    try:
        return places.access.locate(value, folder=places.folder, named=places.named)
    except NoAccess as error:
        raise row.bad(field, str(error)) from error


class NotAnAddress(Exception):
    """Why a value names no file; the message names no row."""


def address(value: object) -> object:
    """A path or address in its object, as kits write it, by itself; anything else as it is.

    Read are `{"path": ..., "bytes": ...}` of Hugging Face's image columns, `{"url": ...}` of OpenAI, `{"base64": ...}`
    of axolotl, `{"type": "base64", "media_type": ..., "data": ...}` of Anthropic, and objects with one of
    `ADDRESS_KEYS`.

    Raises:
        NotAnAddress: it names several files.
    """
    if isinstance(value, list):
        return [address(item) for item in value]
    if not isinstance(value, dict) or not value or not value.keys() <= {*ADDRESS_KEYS, *_BESIDE}:
        return value
    given = [(key, value[key]) for key in ADDRESS_KEYS if value.get(key) not in (None, "")]
    if not given:
        return None
    (key, found), *others = given
    if key in ("bytes", "base64", "data"):  # beside them, a path says where they came from
        return found if not isinstance(found, str) or found[:5].lower() == "data:" else f"data:;base64,{found}"
    for other, differing in others:
        if differing != found:
            raise NotAnAddress(
                f'names two files: {short(repr(found))} under "{key}" and {short(repr(differing))} under "{other}". '
                "Keep one of them"
            )
    return address(found) if isinstance(found, dict) else found


def local(value: object) -> object:
    """`file:` addresses as the paths they stand for, and bare base64 as the `data:` address of its picture."""
    if isinstance(value, list):
        return [local(item) for item in value]
    if not isinstance(value, str):
        return value
    for start in ("file:///", "file://localhost/"):
        if value[: len(start)].lower() == start:
            path = value[len(start) - 1 :]
            # RFC 8089 has them percent-encoded, and qwen-vl-utils 0.0.14 takes them to the letter.
            return path if "%" not in path or os.path.exists(path) else unquote(path)
    return f"data:;base64,{value}" if _is_base64(value) else value


def _is_base64(value: str) -> bool:
    """Whether it is a picture's content and no path: of base64's letters only, and it begins as pictures do."""
    if len(value) < _BASE64_LEAST or not _BASE64.fullmatch(value):
        return False
    if len(value) <= LONGEST_PATH:
        return value.startswith(_BASE64_STARTS)
    try:
        return ending_of(base64.b64decode(value[:64])) != ".bin"
    except binascii.Error:
        return False


def refuse_many_files(row: RowRef, key: str, value: object, others: int = 0) -> None:
    """Refuse a row that names more than `FILES_PER_ROW` files under `key`, with `others` of the kind besides."""
    listed = value if isinstance(value, list) else []
    files = others + sum(len(item) if isinstance(item, list) else 1 for item in listed)
    if files > FILES_PER_ROW:
        raise row.bad(key, f"{files:,} files, and a row may name {FILES_PER_ROW:,} of a kind. Split the row")
