"""Show a preview as text.

Trained tokens are green on a terminal, and between ⟦ and ⟧ elsewhere. The pads of a medium are folded into one.
"""

from __future__ import annotations

from vlft.preview import Piece, Preview
from vlft.text import printable

OPEN, CLOSE = "⟦", "⟧"
GREEN, CYAN, YELLOW, RESET = "\x1b[1;32m", "\x1b[36m", "\x1b[33m", "\x1b[0m"


def as_text(preview: Preview, *, color: bool) -> str:
    """Return the row as text for a person.

    Args:
        preview: the row, from `preview_row`.
        color: mark trained tokens by ANSI colours instead of `OPEN` and `CLOSE`.
    """
    lines = [printable(preview.title), preview.counts]
    for medium in preview.media:
        where = printable(f"{medium.field}: {medium.path}")
        lines.append(f"{medium.name}: {medium.source} -> {medium.shown}  ({where})")
    for field, remark in preview.sample.warnings:
        lines.append(_painted(f"warning: {field}: {printable(remark)}", YELLOW, color))
    marks = _painted("in green", GREEN, color) if color else f"between {OPEN} and {CLOSE}"
    lines += [f"trained tokens are {marks}", ""]
    return "\n".join(lines) + "\n" + "".join(_piece(piece, color) for piece in preview.pieces).rstrip("\n")


def _piece(piece: Piece, color: bool) -> str:
    if piece.medium is not None:
        return _painted(f"{piece.text} x{piece.medium.tokens}", CYAN, color)
    text = printable(piece.text)
    if not piece.trained:
        return text
    return _painted(text, GREEN, True) if color else f"{OPEN}{text}{CLOSE}"


def _painted(text: str, code: str, color: bool) -> str:
    """Return text in a colour. The colour starts again in each line, because pagers drop it at line ends."""
    return "\n".join(f"{code}{line}{RESET}" if line else "" for line in text.split("\n")) if color else text
