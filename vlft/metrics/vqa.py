"""vqa_accuracy: the accuracy of VQAv2, TextVQA, OK-VQA and VizWiz, for rows that list the answers of several people.

Source: https://visualqa.org/evaluation.html, and for the details the evaluation code of the VQA challenge. For each
person, min(1, n / 3) where n of the other people gave the model's answer; the figure of a row is the mean over people.
"""

from __future__ import annotations

import re

from vlft.metrics.case import Case, Metric, mean
from vlft.metrics.names import NAMES

ENOUGH = 3  # people who make an answer right
_TEN = 10  # answers of a row of VQAv2

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes and colons stay: possessives, times of day
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")

# Answers that lack an apostrophe get it. These are the challenge's words; a word without a line here stays as it is.
_SHORTENED = (
    *("ain't", "aren't", "can't", "could've", "couldn't", "didn't", "doesn't", "don't", "hadn't", "hasn't", "haven't"),
    *("he'd", "he's", "how'd", "how'll", "how's", "isn't", "it'd", "it'll", "ma'am", "mightn't", "might've"),
    *("mustn't", "must've", "needn't", "not've", "o'clock", "oughtn't", "shan't", "should've", "shouldn't"),
    *("somebody'd", "somebody'll", "somebody's", "someone'd", "someone'll", "someone's", "something'd"),
    *("something'll", "that's", "there'd", "there're", "there's", "they'd", "they'll", "they're", "they've", "'twas"),
    *("wasn't", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd", "where's"),
    *("where've", "who'd", "who'll", "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't"),
    *("y'all", "you'd", "you'll", "you're", "you've", "couldn't've", "hadn't've", "he'd've", "it'd've", "mightn't've"),
    *("she'd've", "shouldn't've", "somebody'd've", "someone'd've", "something'd've", "there'd've", "they'd've"),
    *("we'd've", "who'd've", "wouldn't've", "y'all'll", "y'all'd've", "you'd've", "'ow's'at"),
)
#: The words with one apostrophe left out -> the words.
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _SHORTENED
    for place, character in enumerate(word)
    if character == "'"
}


def normalised(answer: str) -> str:
    """Return an answer as the challenge compares it: lower case, digits for small numbers, no articles, no punctuation.

    The challenge's code leaves the answers of people as they are if all are equal; here they are always normalised.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _MARKS:
        # A mark beside a space is left out; one inside a word becomes a space.
        plain = plain.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _people(case: Case) -> list[str]:
    """Return the answers of people, normalised.

    The row's own answer, which comes first, is one of theirs and not another one: also if it is spelled differently.
    """
    first, *others = map(normalised, case.references)
    another = not case.own_listed and len(others) + 1 != _TEN and first in others
    return others if another else [first, *others]


def _score(case: Case) -> tuple[float, float] | None:
    people = _people(case)
    if len(people) <= ENOUGH:  # each person is compared with the others, so 3 people cannot make an answer right
        return None
    answer = normalised(case.answer)
    same = sum(person == answer for person in people)
    shares = [min(1.0, (same - (person == answer)) / ENOUGH) for person in people]
    return sum(shares) / len(shares), 1.0


METRICS = (
    Metric(
        name="vqa_accuracy",
        text=NAMES["vqa_accuracy"],
        score=_score,
        value=mean,
        needs='the answers of at least 4 people under "answers" (VQAv2 has 10)',
    ),
)
