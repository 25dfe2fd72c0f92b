"""Small pictures for the page. Files are opened with the limits of vlft, decoded once, and never sent as they are."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from vlft.data.media.pictures import Unreadable, open_picture, require_file
from vlft.pages.web import picture_uri

SIDE = 160  # pixels of the longer side
MOST = 12  # pictures that are shown together
MOST_PIXELS = 50_000_000  # of a picture that is decoded for a thumbnail: 150 MB
MOST_BYTES = 256 << 20  # of a picture that is opened
WAIT = 2.0  # seconds
_ONE = threading.Lock()  # one picture is decoded at a time, whatever number of tabs ask


def thumbs(paths: Iterable[str]) -> list[dict[str, str]]:
    """Return thumbnails for the macro `strip`; files that cannot be opened, or are very large, are left out."""
    found = []
    for path in [*paths][:MOST]:
        try:
            uri = _thumb(path, _changed(path))
        except TimeoutError:
            continue  # other tabs decode; the next look shows it
        if uri:
            found.append({"alt": Path(path).name, "title": Path(path).name, "uri": uri})
    return found


@functools.lru_cache(maxsize=256)
def _thumb(path: str, changed: int) -> str:
    try:
        require_file(path, most=MOST_BYTES)  # a pipe may never end
    except Unreadable:
        return ""
    if not 0 < _pixels(path) <= MOST_PIXELS:
        return ""
    if not _ONE.acquire(timeout=WAIT):
        raise TimeoutError
    try:
        picture = open_picture(path)
        picture.thumbnail((SIDE, SIDE))
        small = picture.convert("RGB")
    except Unreadable:
        return ""
    finally:
        _ONE.release()
    return picture_uri(small, "JPEG")


def _pixels(path: str) -> int:
    """Pixels of a picture, from its header; 0 if it has none that can be read."""
    try:
        with Image.open(path) as picture:
            return picture.width * picture.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except (OSError, ValueError):  # ValueError: a null in the path
        return 0
