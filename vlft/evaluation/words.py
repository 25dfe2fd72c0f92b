"""Find the words in which one text differs from another. Pure, and fast for texts of thousands of words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

MOST_WORDS = 2000  # words of a text that are compared

# Scripts without spaces between words (kana, Han, Thai, Lao, Burmese, Khmer) are split into characters.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")


def words_of(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of the words and signs of a text, at most `MOST_WORDS`. Blanks lie between them."""
    return [match.span() for match in itertools.islice(_WORD.finditer(text), MOST_WORDS)]


def common(a: Sequence[str], b: Sequence[str]) -> list[bool]:
    """Say which words of `a` are in the longest common subsequence of `a` and `b`.

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
    found = [False] * len(a)
    row, column = len(a), len(b)
    while row and column:
        bit = 1 << (column - 1)
        if states[row - 1] & bit:
            column -= 1
        else:
            row -= 1
            if not row or states[row - 1] & bit:
                found[row] = True
                column -= 1
    return found


def marked(text: str, others: Sequence[str | None]) -> list[tuple[str, tuple[bool, ...]]]:
    """Split a text into pieces, each with whether it is missing in each of the other texts.

    Words are compared without regard to case. A blank between two words that are marked alike belongs to them.

    Args:
        text: what is split.
        others: texts to compare with; None marks nothing.

    Returns:
        (piece, marks) with a mark for each of `others`. The pieces together are the text.
    """
    spans = words_of(text)
    said = [text[start:end].casefold() for start, end in spans]
    missing = [_missing(said, other) for other in others]
    pieces = []
    start, none = 0, (False,) * len(others)
    for (begin, end), marks in _runs(spans, missing):
        if begin > start:
            pieces.append((text[start:begin], none))
        pieces.append((text[begin:end], marks))
        start = end
    if start < len(text):
        pieces.append((text[start:], none))
    return _joined(pieces)


def _missing(said: Sequence[str], other: str | None) -> list[bool]:
    if other is None:
        return [False] * len(said)
    theirs = [other[start:end].casefold() for start, end in words_of(other)]
    return [not one for one in common(said, theirs)]


def _runs(
    spans: Sequence[tuple[int, int]], missing: Sequence[Sequence[bool]]
) -> Iterator[tuple[tuple[int, int], tuple[bool, ...]]]:
    """Yield the runs of words that are marked alike, from the start of the first word to the end of the last."""
    begin = 0
    marks = [tuple(of_other[i] for of_other in missing) for i in range(len(spans))]
    for i in range(1, len(spans) + 1):
        if i == len(spans) or marks[i] != marks[begin]:
            yield (spans[begin][0], spans[i - 1][1]), marks[begin]
            begin = i


def _joined(pieces: list[tuple[str, tuple[bool, ...]]]) -> list[tuple[str, tuple[bool, ...]]]:
    joined: list[tuple[str, tuple[bool, ...]]] = []
    for text, marks in pieces:
        if joined and joined[-1][1] == marks:
            joined[-1] = (joined[-1][0] + text, marks)
        else:
            joined.append((text, marks))
    return joined
