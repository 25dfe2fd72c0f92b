"""The media that a row names, as `Image` and `Video`; and how messages name a row. Opens no file."""

from __future__ import annotations

from dataclasses import dataclass

from vlft.data.access import Access, NoAccess
from vlft.data.rows import kind_of
from vlft.data.sample import Image, Video
from vlft.errors import BadRow, DataError

# A list of these with a single <video> tag is one video, frame by frame. Not .gif: that is a clip of its own.
FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
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


def images(row: RowName, value: object, places: Places) -> list[Image]:
    """What `image` of a row names: one path, a list of them, or nothing.

    Raises:
        DataError: something else, or a path that is not followed (`vlft.data.access`).
    """
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [
            Image(path=_path(row, item, f"image[{i}]", places), field=f"image[{i}]") for i, item in enumerate(value)
        ]
    return [Image(path=_path(row, value, "image", places), field="image")]


def videos(row: RowName, value: object, places: Places, *, tags: int) -> list[Video]:
    """What `video` of a row with so many `<video>` tags names: see `records.parse_record`.

    Raises:
        DataError: as `images`.
    """
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [Video(path=_path(row, value, "video", places), field="video")]
    pictures = [isinstance(item, str) and _is_frame(item) for item in value]
    if value and tags == 1 and all(pictures):
        return [Video(frames=_frames(row, value, "video", places), field="video")]
    found = []
    for i, item in enumerate(value):
        field = f"video[{i}]"
        if isinstance(item, list):
            found.append(Video(frames=_frames(row, item, field, places), field=field))
        else:
            found.append(Video(path=_path(row, item, field, places), field=field))
    return found


def _is_frame(path: str) -> bool:
    name = path.lower()
    return name.endswith(FRAME_ENDINGS) or ("://" in name and name.partition("?")[0].endswith(FRAME_ENDINGS))


def _frames(row: RowName, value: list, field: str, places: Places) -> tuple[str, ...]:
    if not value:
        raise row.bad(field, "a video of no frames. List its pictures or drop it")
    return tuple(_path(row, item, f"{field}[{i}]", places) for i, item in enumerate(value))


def _path(row: RowName, value: object, field: str, places: Places) -> str:
    if not isinstance(value, str):
        wanted = "a path" if "[" in field else "a path, a list of paths or null"
        raise row.bad(field, f"is {kind_of(value)}, where {wanted} belongs")
    if not value.strip():
        raise row.bad(field, "is an empty path. Name the file or drop the item")
    try:
        return places.access.locate(value, folder=places.folder, named=places.named)
    except NoAccess as error:
        raise row.bad(field, str(error)) from error


def refuse_many_files(row: RowName, raw: dict) -> None:
    """Refuse a row that names more than `FILES_PER_ROW` files."""
    for key in ("image", "video"):
        value = raw.get(key)
        if isinstance(value, list):
            files = sum(len(item) if isinstance(item, list) else 1 for item in value)
            if files > FILES_PER_ROW:
                raise row.bad(key, f"{files:,} files, and a row may name {FILES_PER_ROW:,} of a kind. Split the row")


def short(text: str) -> str:
    """Text out of a row, cut to what a message has room for."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
