"""What the model answered to a few rows as training went on, as a part of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlft.data.media.pictures import Unreadable, open_picture
from vlft.pages.web import picture_uri
from vlft.report.read import Answered

SHOWN_ANSWERS = 8  # of a row: the first, the last, and others evenly between
SHOWN_MEDIA = 12  # of a row
THUMB = 160  # longer side in pixels


def asked_row(one: Answered) -> dict[str, Any]:
    """A row and its answers, as `report.html.j2` shows them."""
    row = one.row
    pictures, files = _media(row.get("media", ()))
    return {
        "title": title_of(row["file"], row),
        "turns": list(row.get("turns", ())),
        "right": row.get("right", ""),
        "answers": _spread(one.answers, SHOWN_ANSWERS),
        "evaluations": len(one.answers),
        "pictures": pictures,
        "files": files,
    }


def title_of(file: str, row: dict[str, Any]) -> str:
    """`train.json[7] (id x)`."""
    name = f" (id {row['id']})" if row.get("id") is not None else ""
    return f"{file}[{row['index']}]{name}"


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _media(media: Iterable[dict[str, Any]]) -> tuple[list[dict[str, str]], list[str]]:
    """Small pictures of what is still there, names of the rest."""
    pictures, files = [], []
    for medium in list(media)[:SHOWN_MEDIA]:
        path = str(medium.get("path"))
        try:
            picture = open_picture(path)
        except Unreadable:
            files.append(f"{medium.get('kind')} {Path(path).name}")
            continue
        picture.thumbnail((THUMB, THUMB))
        pictures.append({"alt": Path(path).name, "title": Path(path).name, "uri": picture_uri(picture, "JPEG")})
    return pictures, files
