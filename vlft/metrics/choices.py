"""accuracy: did the model choose right? Answers to multiple choice, yes or no, and classes, in the usual phrasings.

An answer and a right answer are both read as a choice: a letter, an option of the question, yes or no. What is none of
these is compared as text, without case and punctuation at its ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vlft.metrics.case import Case, Metric, mean
from vlft.metrics.names import NAMES

_AROUND = " \t\n\r.,:;!?\"'`*()[]{}“”‘’。，：；！？（）"
# "A. cat", "(A) cat", "A) cat", "A: cat" on lines of their own, or one after the other in a line.
_OPTION = re.compile(r"(?:^|[\s,;])\(?([A-Z])[.):]\s*(.+?)(?=[\s,;]\(?[A-Z][.):]\s|\n|$)", re.MULTILINE)
_LETTER = re.compile(r"[(\[]?([A-Za-z])[\]).:]*")  # the whole answer is a letter
_LETTER_FIRST = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])[.):])(?!\w)")  # "(B) cat", "B. cat"
_LEAD = re.compile(
    r"(?:the\s+)?(?:(?:correct|right|best|final|most\s+likely)\s+)?(?:answer|option|choice)\s*(?:is|would\s+be|:|=)+\s*"
    r"(?:(?:option|choice)\s+)?|答案\s*[是为：:]*\s*",
    re.IGNORECASE,
)
# A capital letter that ends there or is followed by a reason; not the "A" of "A dog", nor "B or C".
_LETTER_AFTER_LEAD = re.compile(
    r"[\s*_(\[\"'`]*([A-Z])(?:[)\]*_\"'`.:。]+|$|(?=[\s,;，]))(?!\s*(?:,|;|or\b|and\b|/|&)\s*\(?[A-Z]\b)"
    r"(?=[\s,;]*(?:$|[\n.,;:(，]|because\b|since\b|as\b)|(?<=[).:])\s*\S)"
)
_OPTION_FIRST = re.compile(r"(?:option|choice)\s+(?=[(\[]?[A-Z]\b)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Z])\)?\s*\}")
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_BOTH = re.compile(r"\b(?:yes|no)(?:\s*/\s*|[\s,]+(?:and|or|but)\s+(?:also\s+)?)(?:yes|no)\b", re.IGNORECASE)
# "not yes", "cannot say no"
_NEITHER = re.compile(r"(?:\b(?:not|never|cannot|neither)|n['’]t)(?:\s+\w+)?\s+[\"'“‘]?(?:yes|no)\b", re.IGNORECASE)


def options(question: str) -> dict[str, str]:
    """Return the options that a question lists, letter -> text without case. Empty if they are not A, B, C in order."""
    found = {letter: _plain(text) for letter, text in _OPTION.findall(question)}
    in_order = [chr(ord("A") + place) for place in range(len(found))]
    return found if len(found) > 1 and list(found) == in_order else {}


def chosen_letter(text: str, listed: Mapping[str, str]) -> str | None:
    """Return the letter that a text chooses, or None.

    Args:
        text: such as `B`, `(b)`, `B.`, `B. cat`, `The answer is B`, `\\boxed{B}`, or the text of an option. Of several
            "The answer is" the last counts.
        listed: options of the question; if there are any, other letters are no choice.
    """
    text = text.strip().strip("*_`\"' ")
    text = text[found.end() :] if (found := _OPTION_FIRST.match(text)) else text
    leads = [found.end() for found in _LEAD.finditer(text)]
    letter = _letter(text, leads)
    if letter is not None and (not listed or letter in listed):
        return letter
    wordings = {_plain(text), *(_plain(text[place:]) for place in leads[-1:])}
    if yes_no := _yes_or_no_first(text):  # "No, because ..." where an option is "No"
        wordings.add(yes_no)
    return next((letter for letter, option in listed.items() if option in wordings), None)


def _letter(text: str, leads: Sequence[int]) -> str | None:
    """Return the letter that a text names.

    Args:
        leads: where "The answer is" and its like end.
    """
    whole = _LETTER.fullmatch(text) or (_LETTER.fullmatch(text[leads[-1] :].strip()) if leads else None)
    if whole:
        return whole[1].upper()
    boxed = _BOXED.findall(text)
    if boxed:
        return boxed[-1]
    named = [found[1] for place in leads if (found := _LETTER_AFTER_LEAD.match(text, place))]
    if named:
        return named[-1]
    first = _LETTER_FIRST.match(text)
    if first:
        return (first[1] or first[2]).upper()
    alone = _LETTER_AFTER_LEAD.match(text)
    return alone[1] if alone else None


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(_AROUND).casefold()


def _yes_or_no_first(text: str) -> str | None:
    """Return the word that a text begins with, if it is yes or no; None for "yes and no"."""
    found = _YES_NO.match(text)
    return found[1].lower() if found and not _BOTH.match(text) else None


def _yes_or_no(text: str) -> str | None:
    """Return which of yes and no a text says; None if it says neither, both or "not yes"."""
    leads = [found.end() for found in _LEAD.finditer(text)]
    for start in (0, *leads[-1:]):
        if said := _yes_or_no_first(text[start:].strip(_AROUND)):
            return said
    words = {word.lower() for word in _YES_NO.findall(text)}
    return words.pop() if len(words) == 1 and not _NEITHER.search(text) else None


def _right(answer: str, reference: str, listed: Mapping[str, str]) -> bool:
    plain = _plain(reference)
    if plain and _plain(answer) == plain:
        return True
    right = chosen_letter(reference, listed)
    if right is not None:
        return chosen_letter(answer, listed) == right
    if plain in ("yes", "no"):
        return _yes_or_no(answer) == plain
    leads = [found.end() for found in _LEAD.finditer(answer)]
    return plain in (_plain(answer), *(_plain(answer[place:]) for place in leads[-1:]))


def _accuracy(case: Case) -> tuple[float, float]:
    listed = options(case.question)
    # Models that were trained with rewards write <answer>B</answer>; the last one counts.
    before, closed, _ = case.answer.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    answer = inside if closed and opened else case.answer
    return float(any(_right(answer, reference, listed) for reference in case.references)), 1.0


METRICS = (Metric(name="accuracy", text=NAMES["accuracy"], score=_accuracy, value=mean),)
