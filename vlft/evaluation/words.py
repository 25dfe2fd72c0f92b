"""Find the words in which one text differs from others. Pure, and fast for texts of thousands of words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

MOST_WORDS = 2000  # words of a text that are compared

# Scripts without spaces between words (kana, Han, Thai, Lao, Burmese, Khmer) are split into characters.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a text, or a part of the first other text that the text omits there.

    Attributes:
        text: what is written.
        missing: for each of the other texts, whether its words are not there.
        omitted: the words are in the first other text alone; they do not belong to the text.
    """

    text: str
    missing: tuple[bool, ...]
    omitted: bool = False


def words_of(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of the words and signs of a text, at most `MOST_WORDS`. Blanks lie between them."""
    return [match.span() for match in itertools.islice(_WORD.finditer(text), MOST_WORDS)]


def common(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Return the places (in a, in b) of a longest common subsequence of words, in order.

    The subsequence is found with one operation on whole numbers of len(b) bits for each word of `a`.

    Source: H. Hyyrö, "Bit-parallel LCS-length computation revisited", 2004; the way back as in RapidFuzz.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(b)) - 1
    state, states = full, []
    for word in a:
        matched = state & places.get(word, 0)
        state = ((state + matched) | (state - matched)) & full
        states.append(state)
    found = []
    row, column = len(a), len(b)
    while row and column:
        bit = 1 << (column - 1)
        if states[row - 1] & bit:
            column -= 1
        else:
            row -= 1
            if not row or states[row - 1] & bit:
                column -= 1
                found.append((row, column))
    return found[::-1]


def marked(text: str, others: Sequence[str | None]) -> list[Piece]:
    """Split a text into pieces that are marked alike, and add what it omits of the first of the others.

    Words are compared without regard to case. A blank between two words that are marked alike belongs to them. Words
    of the first other text that the text replaces by words of its own are not added.

    Args:
        text: what is split.
        others: texts to compare with; None marks nothing.

    Returns:
        The pieces that are not `omitted` together are the text.
    """
    spans = words_of(text)
    said = [text[start:end].casefold() for start, end in spans]
    pairs = [None if other is None else _pairs(said, other) for other in others]
    known = [None if of_other is None else {i for i, _ in of_other} for of_other in pairs]
    marks = [tuple(of_other is not None and i not in of_other for of_other in known) for i in range(len(spans))]
    gaps = _omitted(pairs[0], len(spans), others[0]) if pairs and pairs[0] is not None and others[0] else {}
    none = (False,) * len(others)
    pieces, start = [], 0
    for i, (begin, end) in enumerate(spans):
        if i in gaps:
            pieces += [Piece(text=text[start:begin], missing=none), gaps[i]]
            start = begin
        alike = i > 0 and marks[i] == marks[i - 1]
        pieces.append(Piece(text=text[start:begin], missing=marks[i] if alike else none))
        pieces.append(Piece(text=text[begin:end], missing=marks[i]))
        start = end
    pieces += [gaps[len(spans)]] if len(spans) in gaps else []
    return _joined([*pieces, Piece(text=text[start:], missing=none)])


def _pairs(said: Sequence[str], other: str) -> list[tuple[int, int]]:
    return common(said, [other[start:end].casefold() for start, end in words_of(other)])


def _omitted(pairs: Sequence[tuple[int, int]], words: int, other: str) -> dict[int, Piece]:
    """Return what a text of `words` words omits of another text, by the word before which it is omitted."""
    theirs = words_of(other)
    found = {}
    before = (-1, -1)
    for pair in (*pairs, (words, len(theirs))):
        if pair[0] == before[0] + 1 and pair[1] > before[1] + 1:
            gone = other[theirs[before[1] + 1][0] : theirs[pair[1] - 1][1]]
            found[pair[0]] = Piece(text=gone, missing=(), omitted=True)
        before = pair
    return found


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.omitted and not joined[-1].omitted and joined[-1].missing == piece.missing:
            joined[-1] = Piece(text=joined[-1].text + piece.text, missing=piece.missing)
        elif piece.text:
            joined.append(piece)
    return joined
