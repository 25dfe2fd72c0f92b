"""Convert the media that a row names to `Image` and `Video`. Opens no file; lists folders of frames."""

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

OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # files that operating systems put into folders
MEDIA_ENDINGS = (*PICTURES, *VIDEOS)
FILES_PER_ROW = 10_000  # of a kind; each costs at least one token, so that no context holds as many

# Keys of an object that name a file, and other keys of such an object that do not say where the file is.
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
_UNUSED_KEYS = ("type", "detail", "format", "mime_type", "media_type")
# How JPEG, PNG, GIF and WebP start in base64; "/9j/" looks like an absolute path.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
_BASE64_LEAST = 64  # characters; even the smallest picture has more


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the files of a row are.

    Attributes:
        access: which files rows may name.
        folder: where relative paths start.
        named: the name of that folder in messages.
    """

    access: Access
    folder: str
    named: str


def images(row: RowRef, value: object, places: Places, *, key: str, overrides: Overrides) -> list[Image]:
    """Return the pictures that a row lists under `image` or `images`: one, a list of them, or none.

    Args:
        row: the row, for messages.
        value: the value of the key.
        places: where the files are.
        key: the key that lists them.
        overrides: budgets for all of them.

    Raises:
        DataError: a value of another type, or a path that is not followed (`vlft.data.rows.access`).
    """
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [picture(row, item, f"{key}[{i}]", places, overrides) for i, item in enumerate(value)]
    return [picture(row, value, key, places, overrides)]


def picture(row: RowRef, value: object, field: str, places: Places, overrides: Overrides) -> Image:
    """Return one picture.

    Raises:
        DataError: the value is not a path, or the path is not followed.
    """
    return Image(path=_path(row, value, field, places), field=field, overrides=overrides, folder=places.folder)


def videos(row: RowRef, value: object, places: Places, *, tags: int, key: str, overrides: Overrides) -> list[Video]:
    """Return the videos that a row lists under `video` or `videos`. `records.parse_record` describes the values.

    Args:
        row: the row, for messages.
        value: the value of the key.
        places: where the files are.
        tags: how many `<video>` tags the row has.
        key: the key that lists them.
        overrides: budgets for all of them.

    Raises:
        DataError: a value of another type, or a path that is not followed.
    """
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [clip(row, value, key, places, overrides)]
    if tags == 1 and is_one_video(value):
        return [clip(row, value, key, places, overrides)]
    return [clip(row, item, f"{key}[{i}]", places, overrides) for i, item in enumerate(value)]


def clip(row: RowRef, value: object, field: str, places: Places, overrides: Overrides) -> Video:
    """Return one video: a file, a list of frames, or a folder of frames.

    All frames of a list or a folder are used, and `fps` is their rate. The other frame budgets of the row have no
    effect on them.

    Raises:
        DataError: a value of another type, a path that is not followed, or a folder that holds other files.
    """
    if isinstance(value, list):
        frames = _frames(row, value, field, places)
    else:
        path = _path(row, value, field, places)
        if not os.path.isdir(path):
            return Video(path=path, field=field, overrides=overrides, folder=places.folder)
        frames = _frames(row, _in_folder(row, value, path, field), field, places)
    kept = Overrides(min_pixels=overrides.min_pixels, max_pixels=overrides.max_pixels, fps=overrides.fps)
    return Video(frames=frames, field=field, overrides=kept, folder=places.folder)


def is_one_video(value: object) -> bool:
    """Return whether a value may be the frames of one video: a list of paths with the endings of pictures."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and _is_frame(item) for item in value)


def _is_frame(path: str) -> bool:
    name = path.lower()
    return name.endswith(FRAME_ENDINGS) or ("://" in name and name.partition("?")[0].endswith(FRAME_ENDINGS))


def _in_folder(row: RowRef, value: object, folder: str, field: str) -> list[str]:
    """Return the frames in a folder in natural order: frame_2 before frame_10. Paths start as the row writes them."""
    try:
        names = sorted(os.listdir(folder), key=_natural)
    except OSError as error:
        raise row.bad(field, f"{folder}: cannot be read ({error.strerror}). Check its permissions") from error
    names = [name for name in names if not name.startswith(".") and name.lower() not in OF_SYSTEMS]
    if not names:
        raise row.bad(
            field, f"{folder}: a folder without pictures is a video without frames. Add frames, or name a video file"
        )
    for name in names:
        if not name.lower().endswith(FRAME_ENDINGS) or os.path.isdir(os.path.join(folder, name)):
            raise row.bad(
                field,
                f"{folder}: a folder of frames holds pictures only, and {name} does not have the ending of a picture. "
                "Move it elsewhere, or list the frames",
            )
    if len(names) > FILES_PER_ROW:
        raise row.bad(field, f"{folder}: {len(names):,} frames, and a row may name {FILES_PER_ROW:,}. Split the video")
    return [os.path.join(str(local(address(value))), name) for name in names]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares numbers in names as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _frames(row: RowRef, value: list, field: str, places: Places) -> tuple[str, ...]:
    if not value:
        raise row.bad(field, "a video without frames. List its pictures or drop it")
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
    """A value that names no file. The message says why; it does not name the row."""


def address(value: object) -> object:
    """Unwrap a path or address from the object that kits write around it. Any other value is returned unchanged.

    Supported are `{"path": ..., "bytes": ...}` of Hugging Face's image columns, `{"url": ...}` of OpenAI,
    `{"base64": ...}` of axolotl, `{"type": "base64", "media_type": ..., "data": ...}` of Anthropic, and objects with
    one of `ADDRESS_KEYS`.

    Raises:
        NotAnAddress: the object names several files.
    """
    if isinstance(value, list):
        return [address(item) for item in value]
    if not isinstance(value, dict) or not value or not value.keys() <= {*ADDRESS_KEYS, *_UNUSED_KEYS}:
        return value
    given = [(key, value[key]) for key in ADDRESS_KEYS if value.get(key) not in (None, "")]
    if not given:
        return None
    (key, found), *others = given
    if key in ("bytes", "base64", "data"):  # next to them, a path says where the content came from
        return found if not isinstance(found, str) or found[:5].lower() == "data:" else f"data:;base64,{found}"
    for other, differing in others:
        if differing != found:
            raise NotAnAddress(
                f'names two files: {short(repr(found))} under "{key}" and {short(repr(differing))} under "{other}". '
                "Keep one of them"
            )
    return address(found) if isinstance(found, dict) else found


def local(value: object) -> object:
    """Convert a `file:` address to its path, and bare base64 to a `data:` address. Other values are unchanged."""
    if isinstance(value, list):
        return [local(item) for item in value]
    if not isinstance(value, str):
        return value
    for start in ("file:///", "file://localhost/"):
        if value[: len(start)].lower() == start:
            path = value[len(start) - 1 :]
            # RFC 8089 percent-encodes them; qwen-vl-utils 0.0.14 reads them literally.
            return path if "%" not in path or os.path.exists(path) else unquote(path)
    return f"data:;base64,{value}" if _is_base64(value) else value


def _is_base64(value: str) -> bool:
    """Return whether a string is the content of a picture, not a path: base64 that starts like a picture."""
    if len(value) < _BASE64_LEAST or not _BASE64.fullmatch(value):
        return False
    if len(value) <= LONGEST_PATH:
        return value.startswith(_BASE64_STARTS)
    try:
        return ending_of(base64.b64decode(value[:64])) != ".bin"
    except binascii.Error:
        return False


def refuse_many_files(row: RowRef, key: str, value: object, others: int = 0) -> None:
    """Refuse a row with more than `FILES_PER_ROW` files of a kind: those in `value`, and `others` in parts."""
    listed = value if isinstance(value, list) else []
    files = others + sum(len(item) if isinstance(item, list) else 1 for item in listed)
    if files > FILES_PER_ROW:
        raise row.bad(key, f"{files:,} files, and a row may name {FILES_PER_ROW:,} of a kind. Split the row")
