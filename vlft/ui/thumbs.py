"""Small pictures for the page. Files are opened with the limits of vlft, decoded once, and never sent as they are."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from vlft.data.media.pictures import Unreadable, open_picture
from vlft.pages.web import picture_uri

SIDE = 160  # pixels of the longer side
MOST = 12  # pictures that are shown together


def thumbs(paths: Iterable[str]) -> list[dict[str, str]]:
    """Return thumbnails for the macro `strip`; files that cannot be opened are left out."""
    found = []
    for path in [*paths][:MOST]:
        uri = _thumb(path, _changed(path))
        if uri:
            found.append({"alt": Path(path).name, "title": Path(path).name, "uri": uri})
    return found


@functools.lru_cache(maxsize=256)
def _thumb(path: str, changed: int) -> str:
    try:
        picture = open_picture(path)
    except Unreadable:
        return ""
    picture.thumbnail((SIDE, SIDE))
    return picture_uri(picture.convert("RGB"), "JPEG")


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
