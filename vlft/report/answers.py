"""The part of the page with the model's answers to a few rows during training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlft.data.media.pictures import Unreadable, open_picture
from vlft.pages.web import picture_uri
from vlft.report.read import Answered

SHOWN_ANSWERS = 8  # answers of a row: the first, the last, and others spread evenly between them
SHOWN_MEDIA = 12  # pictures and videos of a row
THUMB = 160  # pixels of a thumbnail's longer side


def asked_row(one: Answered) -> dict[str, Any]:
    """Return a row and its answers for the template `report.html.j2`."""
    row = one.row
    pictures, files = media_of(row.get("media", ()))
    return {
        "title": title_of(row["file"], row),
        "turns": list(row.get("turns", ())),
        "right": row.get("right", ""),
        "answers": spread(one.answers, SHOWN_ANSWERS),
        "evaluations": len(one.answers),
        "pictures": pictures,
        "files": files,
    }


def title_of(file: str, row: dict[str, Any]) -> str:
    """Return the name of a row: `train.json[7] (id x)`."""
    name = f" (id {row['id']})" if row.get("id") is not None else ""
    return f"{file}[{row['index']}]{name}"


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items: the first, the last, and others spread evenly between them."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def media_of(media: Iterable[dict[str, Any]]) -> tuple[list[dict[str, str]], list[str]]:
    """Return thumbnails of the files that can still be opened, and the names of the others."""
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
