"""What the model answered to a few rows as training went on, as a part of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlft.data.media.pictures import Unreadable, open_picture
from vlft.pages.web import picture_uri, safe
from vlft.report.read import Answered, Run

SHOWN_ANSWERS = 8  # of a row: the first, the last, and others evenly between
SHOWN_TEXT = 4000  # characters of a question or an answer
SHOWN_MEDIA = 12  # of a row
THUMB = 160  # longer side in pixels


def answers(run: Run) -> str:
    if not run.answered and not run.notes:
        return ""
    notes = "".join(f'<p class="soft">No answers: {safe(note)}.</p>' for note in run.notes)
    rows = "".join(_row(one) for one in run.answered)
    intro = '<p class="soft">Rows of the evaluation data, spread evenly over it; the likeliest answer each time.</p>'
    return f"<h2>Answers as training goes on</h2>{notes}{intro if rows else ''}{rows}"


def _row(one: Answered) -> str:
    row = one.row
    name = id_of(row)
    said = "".join(
        f'<div class="who">{safe(turn["role"])}</div><div class="said">{_text(turn["text"])}</div>'
        for turn in row.get("turns", ())
    )
    picked = _spread(one.answers, SHOWN_ANSWERS)
    lines = "".join(
        f'<tr><td>step {step:,}</td><td class="{"good" if text == row.get("right") else ""}">{_text(text)}'
        f"{' <span class=soft>(cut here)</span>' if cut else ''}</td></tr>"
        for step, text, cut in picked
    )
    some = f", {len(picked)} of {len(one.answers)} evaluations" if len(picked) < len(one.answers) else ""
    return (
        f'<section><div class="soft">{safe(row["file"])}[{row["index"]}]{safe(name)}{some}</div>'
        f'{_media(row.get("media", ()))}{said}<table class="answers"><tbody>{lines}'
        f"<tr><td>the row's own</td><td><b>{_text(row.get('right', ''))}</b></td></tr></tbody></table></section>"
    )


def id_of(row: dict[str, Any]) -> str:
    return f" (id {row['id']})" if row.get("id") is not None else ""


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _text(text: Any) -> str:
    text = str(text)
    more = f"<span class=soft> ... {len(text) - SHOWN_TEXT:,} more characters</span>" if len(text) > SHOWN_TEXT else ""
    return safe(text[:SHOWN_TEXT]) + more


def _media(media: Iterable[dict[str, Any]]) -> str:
    """Small pictures of what is still there, names of the rest."""
    shown, named = [], []
    for medium in list(media)[:SHOWN_MEDIA]:
        path = str(medium.get("path"))
        try:
            picture = open_picture(path)
        except Unreadable:
            named.append(f"{medium.get('kind')} {Path(path).name}")
            continue
        picture.thumbnail((THUMB, THUMB))
        shown.append(f'<img alt="{safe(Path(path).name)}" src="{picture_uri(picture, "JPEG")}">')
    names = f'<p class="soft">{safe(", ".join(named))}</p>' if named else ""
    return (f'<div class="strip">{"".join(shown)}</div>' if shown else "") + names
