"""Small pictures for the page. Files are opened with the limits of vlft, decoded once, and never sent as they are."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from vlft.data.media.pictures import Unreadable, open_picture
from vlft.pages.web import picture_uri

SIDE = 160  # pixels of the longer side
MOST = 12  # pictures that are shown together
MOST_PIXELS = 50_000_000  # of a picture that is decoded for a thumbnail: 150 MB
_ONE = threading.Lock()  # one picture is decoded at a time, whatever number of tabs ask


def thumbs(paths: Iterable[str]) -> list[dict[str, str]]:
    """Return thumbnails for the macro `strip`; files that cannot be opened, or are very large, are left out."""
    found = []
    for path in [*paths][:MOST]:
        with _ONE:
            uri = _thumb(path, _changed(path))
        if uri:
            found.append({"alt": Path(path).name, "title": Path(path).name, "uri": uri})
    return found


@functools.lru_cache(maxsize=256)
def _thumb(path: str, changed: int) -> str:
    if not 0 < _pixels(path) <= MOST_PIXELS:
        return ""
    try:
        picture = open_picture(path)
    except Unreadable:
        return ""
    picture.thumbnail((SIDE, SIDE))
    return picture_uri(picture.convert("RGB"), "JPEG")


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
    except OSError:
        return 0
