"""The lower part of the page of an evaluation: which rows are shown, and what is shown of a row.

The page must open in a browser, so rows, characters, pictures and the pixels that are decoded for them are limited.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlft.config.thinking import thoughts_of
from vlft.data.media.pictures import Unreadable, open_thumbnail, picture_size
from vlft.evaluation.page_figures import change_of, finite, number
from vlft.evaluation.result import AnsweredRow, Evaluation
from vlft.evaluation.words import Piece, marked
from vlft.pages.web import picture_uri
from vlft.text import short

ROWS = 300  # rows of a page
FOR_FIRST = 200  # of these, rows that the first metric chooses
TEXT = 2000  # characters of a question, an answer or a reference
OMITTED = 120  # characters of what an answer omits at a place
TURNS, REFERENCES, LABELS = 4, 5, 3  # earlier turns, references and labels of a row
MOST_TEXT = 3_500_000  # bytes of all texts in the page
THUMB = 160  # pixels of a thumbnail's longer side
SHOWN_MEDIA = 6  # pictures and videos of a row
MOST_PICTURES = 5_500_000  # bytes of all thumbnails in the page
MOST_PIXELS = 1_200_000_000  # pixels of their files: some seconds of decoding


def shown_rows(found: Evaluation) -> tuple[list[dict[str, Any]], int]:
    """Return rows for the template, those that changed most first, and the number of pictures that are only named."""
    pictures, size = _Pictures(), 0
    rows: list[dict[str, Any]] = []
    for place in chosen(found):
        row = _row(found, place)
        size += _bytes(row)
        if size > MOST_TEXT and rows:
            break
        rows.append(row | pictures.of(found.rows[place]))
    return sorted(rows, key=lambda row: _order(found, row["place"])), pictures.named


def chosen(found: Evaluation) -> list[int]:
    """Return the indices of at most `ROWS` rows, without repeats, the most telling first.

    They are taken in turn from lists of the rows with the worst scores of each model, the most worse and the most
    better than the first model's, those with an empty answer or one that was cut, and those whose answers differ. The
    first metric has most of the places. If places are left, rows spread evenly over the others are added.
    """
    metrics = list(found.figures)
    taken: dict[int, None] = {}
    first = [ranking for name in metrics[:1] for ranking in _rankings(found, name)]
    _take([*first, *_odd(found)], taken, FOR_FIRST if len(metrics) > 1 else ROWS)
    _take([ranking for name in metrics[1:] for ranking in _rankings(found, name)], taken, ROWS)
    rest = [place for place in range(len(found.rows)) if place not in taken]
    left = min(ROWS - len(taken), len(rest))
    _take([[rest[i * len(rest) // left] for i in range(left)]] if left else [], taken, ROWS)
    return list(taken)


def _rankings(found: Evaluation, name: str) -> Iterator[list[int]]:
    higher = found.higher.get(name, True)
    for place in range(len(found.models)):
        scores = [_score(row, name, place) for row in found.rows]
        best = max((s if higher else -s for s in scores if s is not None), default=None)
        goodness = {i: s if higher else -s for i, s in enumerate(scores) if s is not None}
        yield sorted((i for i, good in goodness.items() if good != best), key=goodness.__getitem__)
        if place:
            changes = {i: c for i, row in enumerate(found.rows) if (c := change_of(row, name, place, higher))}
            yield sorted((i for i, change in changes.items() if change < 0), key=changes.__getitem__)
            yield sorted((i for i, change in changes.items() if change > 0), key=lambda i: -changes[i])


def _odd(found: Evaluation) -> Iterator[list[int]]:
    yield [i for i, row in enumerate(found.rows) if any(row.cut)]
    yield [i for i, row in enumerate(found.rows) if not all(map(_said, row.answers))]
    yield [i for i, row in enumerate(found.rows) if len(set(row.answers)) > 1]


def _take(rankings: Sequence[Sequence[int]], taken: dict[int, None], most: int) -> None:
    """Add rows to `taken` from each list in turn, until it has `most` or the lists have ended."""
    heads = [iter(ranking) for ranking in rankings]
    while heads and len(taken) < most:
        for head in list(heads):
            place = next((i for i in head if i not in taken), None)
            if place is None:
                heads.remove(head)
            elif len(taken) < most:
                taken[place] = None


def _order(found: Evaluation, place: int) -> tuple[float, float, int]:
    """Return the key of the page's first order: the largest change of the first metric first, then the worst score."""
    row, name = found.rows[place], next(iter(found.figures), "")
    higher = found.higher.get(name, True)
    change = (change_of(row, name, 1, higher) if len(found.models) > 1 else None) or 0.0
    score = _score(row, name, 1 if len(found.models) > 1 else 0)
    goodness = float("inf") if score is None else score if higher else -score
    return -abs(change), goodness, place


def _score(row: AnsweredRow, name: str, place: int) -> float | None:
    scores = row.scores.get(name)
    return finite(scores[place]) if scores else None


def _said(answer: str) -> str:
    """Return an answer without its thoughts and without blanks around it."""
    split = thoughts_of(answer)
    return (split[1] if split else answer).strip()


def _row(found: Evaluation, place: int) -> dict[str, Any]:
    row = found.rows[place]
    cut = row.cut or (False,) * len(row.answers)
    data = {
        "place": place,
        "scores": {name: [_score(row, name, i) for i in range(len(row.answers))] for name in row.scores},
        "changed": [answer != row.answers[0] for answer in row.answers],
        "cut": list(cut),
        "empty": [not _said(answer) for answer in row.answers],
    }
    return {
        "place": place,
        "name": row.name,
        "id": row.id,
        "data": json.dumps(data, allow_nan=False),
        "earlier": len(row.turns),
        "turns": [{"role": role, "text": text[:TEXT], "more": _more(text)} for role, text in row.turns[-TURNS:]],
        "question": {"text": row.question[:TEXT], "more": _more(row.question)},
        "references": [{"text": text[:TEXT], "more": _more(text)} for text in row.references[:REFERENCES]],
        "more_references": max(0, len(row.references) - REFERENCES),
        "answers": [_answer(found, row, i, cut=cut[i]) for i in range(len(row.answers))],
    }


def _more(text: str) -> int:
    return max(0, len(text) - TEXT)


def _answer(found: Evaluation, row: AnsweredRow, place: int, *, cut: bool) -> dict[str, Any]:
    """Return an answer in pieces, each with the CSS classes of its mark.

    `r` marks what the nearest reference does not say, `m` what the first model does not say; of two models, it also
    marks what the second does not say in the answer of the first. A piece with `gone` is what the answer omits.
    """
    thought, text = thoughts_of(row.answers[place]) or ("", row.answers[place])
    other = row.answers[0] if place else row.answers[1] if len(row.answers) == 2 else None
    shown = text[:TEXT]
    said = _said(other)[:TEXT] if other is not None else None
    split = [marked(shown, [_said(reference)[:TEXT], said]) for reference in row.references[:REFERENCES]]
    nearest = min(split or [marked(shown, [None, said])], key=_distance)
    scores = [(name, _score(row, name, place)) for name in row.scores]
    labels = sorted(row.label_scores[place].items(), key=lambda item: -item[1]) if row.label_scores else []
    return {
        "place": place,
        "model": found.models[place],
        "thought": {"text": thought[:TEXT], "more": _more(thought)},
        "pieces": [_piece(piece) for piece in nearest],
        "more": _more(text),
        "empty": not text.strip(),
        "cut": cut,
        "scores": [(name, "-" if score is None else number(score).removesuffix(".000")) for name, score in scores],
        "labels": [(name, f"{score:.2f}") for name, score in labels[:LABELS]],
    }


def _piece(piece: Piece) -> tuple[str, str]:
    if piece.omitted:
        return short(piece.text, OMITTED), "gone"
    return piece.text, " ".join(kind for kind, on in zip("rm", piece.missing, strict=True) if on)


def _distance(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.text) for piece in pieces if piece.omitted or piece.missing[0])


def _bytes(value: Any) -> int:
    """Return about the bytes that texts take in the page: escaped, and with a tag around each piece."""
    if isinstance(value, str):
        from markupsafe import escape

        return len(escape(value).encode("utf-8", "replace")) + 24
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 8


class _Pictures:
    """Makes thumbnails until the limits of a page are reached; further files are named.

    Attributes:
        named: number of pictures that are named because of a limit.
    """

    def __init__(self) -> None:
        self._bytes = MOST_PICTURES
        self._pixels = MOST_PIXELS
        self._made: dict[str, str | None] = {}
        self.named = 0

    def of(self, row: AnsweredRow) -> dict[str, Any]:
        """Return thumbnails of a row, and the names of videos and of files that cannot be shown."""
        pictures, files = [], []
        for kind, path in row.media[:SHOWN_MEDIA]:
            uri, why = (None, "") if kind == "video" else self._uri(path)
            name = Path(path).name
            if uri is not None:
                pictures.append({"alt": name, "title": path, "uri": uri})
            else:
                files.append({"kind": kind, "name": name, "path": path, "why": why})
        return {"pictures": pictures, "files": files, "more_media": max(0, len(row.media) - SHOWN_MEDIA)}

    def _uri(self, path: str) -> tuple[str | None, str]:
        """Return a thumbnail, or None and why there is none."""
        uri = self._made.get(path)
        if uri is None:
            if path in self._made:
                return None, "cannot be opened"
            if self._bytes <= 0 or self._pixels <= 0:
                self.named += 1
                return None, ""
            try:
                height, width = picture_size(path)
                self._pixels -= height * width
                uri = picture_uri(open_thumbnail(path, THUMB), "JPEG")
            except Unreadable:
                self._made[path] = None
                return None, "cannot be opened"
            self._made[path] = uri
        if len(uri) > self._bytes:
            self._bytes = 0
            self.named += 1
            return None, ""
        self._bytes -= len(uri)
        return uri, ""
