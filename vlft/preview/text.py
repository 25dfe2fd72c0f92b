"""Show a preview as text.

Trained tokens are green on a terminal, and between ⟦ and ⟧ elsewhere; those of a rejected answer are magenta. The pads
of a medium are folded into one.
"""

from __future__ import annotations

import json

from vlft.preview import Piece, Preview, Refused, Split
from vlft.text import printable, short

OPEN, CLOSE = "⟦", "⟧"
GREEN, MAGENTA, CYAN, YELLOW, RESET = "\x1b[1;32m", "\x1b[1;35m", "\x1b[36m", "\x1b[33m", "\x1b[0m"


#: Of a row of --method grpo.
UNTRAINED_PROMPT = "the model samples completions after this prompt; nothing of the row is trained"
CHOSEN = ("", "chosen")  # names of answers that the model learns; "" in a row with one answer
RAW_CHARACTERS = 4000  # of a refused row
RAW_TEXT = 400  # characters of one text in it


def as_text(preview: Preview | Split | Refused, *, color: bool) -> str:
    """Return the row as text for a person.

    Args:
        preview: the row, from `preview_rows`.
        color: mark trained tokens by ANSI colours instead of `OPEN` and `CLOSE`.
    """
    if isinstance(preview, Refused):
        why = f"refused: {preview.row.field}: {preview.row.reason}"
        return "\n".join([printable(preview.title), _painted(printable(why), YELLOW, color), "", raw_text(preview.raw)])
    if isinstance(preview, Split):
        shown = [as_text(sample, color=color) for sample in preview.samples]
        return "\n\n".join([printable(preview.title), *shown])
    lines = [printable(preview.title), preview.counts]
    for medium in preview.media:
        where = printable(f"{medium.field}: {medium.path}")
        lines.append(f"{medium.name}: {medium.source} -> {medium.shown}  ({where})")
    for field, remark in preview.sample.warnings:
        lines.append(_painted(f"warning: {field}: {printable(remark)}", YELLOW, color))
    if preview.is_prompt:
        lines += [UNTRAINED_PROMPT, ""]
        return "\n".join(lines) + "\n" + "".join(_piece(piece, color) for piece in preview.pieces).rstrip("\n")
    marks = _painted("in green", GREEN, color) if color else f"between {OPEN} and {CLOSE}"
    if color and any(piece.answer not in CHOSEN for piece in preview.pieces):
        marks += f", those of rejected answers {_painted('in magenta', MAGENTA, color)}"
    what = "tokens are" if preview.tokens is not None else "text is"
    lines += [f"trained {what} {marks}", ""]
    pieces = zip(("", *(piece.answer for piece in preview.pieces)), preview.pieces, strict=False)
    body = "".join(_heading(before, piece, color) + _piece(piece, color) for before, piece in pieces)
    return "\n".join(lines) + "\n" + body.rstrip("\n")


def raw_text(raw: object) -> str:
    """Return a row as it is in its file, indented. Long texts are cut, and so are rows of many."""
    text = json.dumps(_cut(raw), ensure_ascii=False, indent=2, default=str)
    return printable(short(text, RAW_CHARACTERS))


def _cut(value: object) -> object:
    if isinstance(value, dict):
        return {key: _cut(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cut(one) for one in value]
    return short(value, RAW_TEXT) if isinstance(value, str) else value


def _heading(before: str, piece: Piece, color: bool) -> str:
    """Return a line with the name of an answer before its first piece, and of other pieces nothing."""
    if piece.answer in ("", before):
        return ""
    return _painted(f"\n--- {piece.answer} ---", CYAN, color) + "\n"


def _piece(piece: Piece, color: bool) -> str:
    if piece.medium is not None:
        return _painted(f"{piece.text} x{piece.pads}", CYAN, color)
    text = printable(piece.text)
    if not piece.trained:
        return text
    return _painted(text, GREEN if piece.answer in CHOSEN else MAGENTA, True) if color else f"{OPEN}{text}{CLOSE}"


def _painted(text: str, code: str, color: bool) -> str:
    """Return text in a colour. The colour starts again in each line, because pagers drop it at line ends."""
    return "\n".join(f"{code}{line}{RESET}" if line else "" for line in text.split("\n")) if color else text
