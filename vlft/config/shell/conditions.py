"""Decide the tests of a shell script, `[ ... ]`, `[[ ... ]]` and `((...))`, as far as their values are known."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

from vlft.config.shell.expand import Text

_NUMBERS: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": lambda left, right: left == right,
    "-ne": lambda left, right: left != right,
    "-lt": lambda left, right: left < right,
    "-le": lambda left, right: left <= right,
    "-gt": lambda left, right: left > right,
    "-ge": lambda left, right: left >= right,
}


def decide(words: Sequence[Text]) -> bool | None:
    """Return whether a test holds; None if that is not known.

    Args:
        words: the words of the test, without its brackets. Operators such as `&&` are also words.
    """
    for joiner, combine in ((("||", "-o"), either), (("&&", "-a"), both)):
        for place, word in enumerate(words):
            if place and word.text in joiner and not word.missing:
                return combine(decide(words[:place]), decide(words[place + 1 :]))
    if words and words[0].text == "!":
        inner = decide(words[1:])
        return None if inner is None else not inner
    if len(words) == 1:
        return None if words[0].missing else bool(words[0].text)
    if len(words) == 2 and words[0].text in ("-z", "-n"):
        if words[1].missing:
            # A text around a placeholder is not empty for any value of it.
            certain = re.sub(r"<[^<>]*>", "", words[1].text)
            return words[0].text == "-n" if certain else None
        return bool(words[1].text) == (words[0].text == "-n")
    if len(words) == 3 and not words[0].missing and not words[2].missing:
        left, how, right = (word.text for word in words)
        if how in ("=", "=="):
            return fnmatch.fnmatchcase(left, right)
        if how == "!=":
            return not fnmatch.fnmatchcase(left, right)
        if how in _NUMBERS and left.lstrip("-").isdigit() and right.lstrip("-").isdigit():
            return _NUMBERS[how](int(left), int(right))
    return None


def both(left: bool | None, right: bool | None) -> bool | None:
    """Return `left and right` for values that may be unknown (None)."""
    if left is False or right is False:
        return False
    return None if left is None or right is None else True


def either(left: bool | None, right: bool | None) -> bool | None:
    """Return `left or right` for values that may be unknown (None)."""
    if left is True or right is True:
        return True
    return None if left is None or right is None else False
