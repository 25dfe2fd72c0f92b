"""Metrics that compare the wording of an answer: exact_match, anls, rouge_l, cer and wer. They need no extra package.

With several right answers the best one counts.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from vlft.metrics.case import Case, Metric, mean
from vlft.metrics.names import NAMES
from vlft.metrics.sequences import common_length, edit_distance

ANLS_LEAST = 0.5  # a similarity below counts 0

# Scripts that are written without spaces between words; each of their characters is a word of rouge_l.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI ")
_ASCII_WORD = re.compile("[a-z0-9]+")


def _exact_match(case: Case) -> tuple[float, float]:
    answer = case.answer.strip()
    return float(any(answer == reference.strip() for reference in case.references)), 1.0


def _anls(case: Case) -> tuple[float, float]:
    """ANLS of a row (Biten et al., "Scene Text Visual Question Answering", 2019).

    Case and runs of spaces are ignored. As in the code of the challenges, a similarity of exactly 0.5 counts; the paper
    writes that it does not. Their code divides by the length of the longer raw text; here runs of spaces count once.
    """
    answer = _plain(case.answer)
    best = max(_similarity(answer, _plain(reference)) for reference in case.references)
    return (best if best >= ANLS_LEAST else 0.0), 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    if not longest:
        return 1.0
    # The distance is at least the difference of the lengths, so very different lengths need no count.
    if min(len(first), len(second)) / longest < ANLS_LEAST:
        return 0.0
    return 1.0 - edit_distance(first, second) / longest


def words(text: str) -> list[str]:
    """Split a text into the words that rouge_l compares.

    ASCII text is split as the package rouge_score does without stemming: lower case, runs of a-z and 0-9. That package
    drops all other letters; here a word may have letters, digits and accents of any script, and in scripts without
    spaces between words, such as Chinese, Japanese and Thai, each character is a word.
    """
    lowered = text.lower()
    if lowered.isascii():
        return _ASCII_WORD.findall(lowered)
    found: list[str] = []
    word = ""
    for character in unicodedata.normalize("NFC", lowered):
        kind = _kind(character)
        if kind == "letter" or (kind == "mark" and word):
            word += character
        elif kind == "mark" and found:
            found[-1] += character  # a mark on a character of a script without spaces
        else:
            found += [word] if word else []
            word = ""
            found += [character] if kind == "alone" else []
    return [*found, word] if word else found


@functools.cache
def _kind(character: str) -> str:
    """Return letter, mark (an accent or vowel sign of the letter before), alone (a word by itself) or gap."""
    category = unicodedata.category(character)[0]
    if category not in "LNM":
        return "gap"
    if unicodedata.name(character, "").startswith(_UNSPACED):
        return "mark" if category == "M" else "alone"
    return "mark" if category == "M" else "letter"


def _rouge_l(case: Case) -> tuple[float, float] | None:
    """ROUGE-L F1 of a row (Lin, 2004), as the package rouge_score computes it on the words of `words`."""
    references = [found for reference in case.references if (found := words(reference))]
    if not references:
        return None
    answer = words(case.answer)
    return max(2 * common_length(answer, right) / (len(answer) + len(right)) for right in references), 1.0


def _error_rate(split: Callable[[str], Sequence[str]]) -> Callable[[Case], tuple[float, float] | None]:
    """Return the `score` (errors, length of the right answer) of the reference with the lowest rate."""

    def score(case: Case) -> tuple[float, float] | None:
        answer = split(case.answer)
        references = [found for reference in case.references if (found := split(reference))]
        if not references:
            return None
        counted = [(edit_distance(answer, right), len(right)) for right in references]
        errors, length = min(counted, key=lambda one: one[0] / one[1])
        return float(errors), float(length)

    return score


def _metric(name: str, score: Callable[[Case], tuple[float, float] | None], **other: Any) -> Metric:
    return Metric(name=name, text=NAMES[name], score=score, value=mean, **other)


METRICS = (
    _metric("exact_match", _exact_match),
    _metric("anls", _anls),
    _metric("rouge_l", _rouge_l, needs="a word in its answer"),
    # Over all rows: errors of all rows by the length of all right answers, as the package jiwer computes them. To wer a
    # sentence of Chinese or Japanese is one word, as to jiwer; cer is the metric for these.
    _metric("cer", _error_rate(str.strip), higher=False, needs="text in its answer"),
    _metric("wer", _error_rate(str.split), higher=False, needs="text in its answer"),
)
