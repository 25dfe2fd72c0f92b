"""json_valid and json_fields: answers that must be JSON objects or lists, as in reading receipts and forms.

A code fence around the whole answer is left out. Text before or after the JSON makes it invalid, since a program that
reads the answer would fail on it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

from vlft.metrics.case import Case, Metric, mean
from vlft.metrics.names import NAMES

_FENCE = "```"
_LANGUAGE = re.compile(r"[\w-]*")


def parsed(text: str) -> dict[str, Any] | list[Any] | None:
    """Return the JSON object or list that a text is, or None. NaN and Infinity are no JSON."""
    text = text.strip()
    if text.startswith(_FENCE) and text.endswith(_FENCE):
        text = _LANGUAGE.sub("", text[len(_FENCE) : -len(_FENCE)], count=1)
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def _refuse(word: str) -> None:
    raise ValueError(word)


def leaves(tree: Any) -> Counter[Hashable]:
    """Return the fields of a JSON document, counted: (path, kind, value) of each leaf.

    An empty object or list is a leaf. In a path, an entry of a list has its position. Numbers are equal if their values
    are (1 and 1.0); strings if they are without the spaces around them; true is not 1.
    """
    return Counter(_walk(tree))


def _walk(whole: Any) -> Iterator[Hashable]:
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), whole)]
    while waiting:
        path, tree = waiting.pop()
        inside = (
            list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
        )
        if inside:
            waiting += [((*path, key), value) for key, value in inside]
        elif isinstance(tree, dict | list):
            yield path, type(tree).__name__, None
        elif isinstance(tree, str):
            yield path, "text", tree.strip()
        elif tree is None or isinstance(tree, bool):
            yield path, "word", str(tree)
        else:
            yield path, "number", tree


def _json_valid(case: Case) -> tuple[float, float] | None:
    if not any(parsed(reference) is not None for reference in case.references):
        return None
    return float(parsed(case.answer) is not None), 1.0


def _json_fields(case: Case) -> tuple[float, float] | None:
    """F1: fields of the right answer that are missing or differ count as misses, and so do further fields."""
    references = [leaves(tree) for reference in case.references if (tree := parsed(reference)) is not None]
    if not references:
        return None
    tree = parsed(case.answer)
    if tree is None:
        return 0.0, 1.0
    answer = leaves(tree)
    return max(2 * (answer & right).total() / (answer.total() + right.total()) for right in references), 1.0


METRICS = (
    Metric(name="json_valid", text=NAMES["json_valid"], score=_json_valid, value=mean, needs="JSON as its answer"),
    Metric(name="json_fields", text=NAMES["json_fields"], score=_json_fields, value=mean, needs="JSON as its answer"),
)
