"""Read the right answers that a row lists beside its own: for evaluation only, they are not trained."""

from __future__ import annotations

from typing import Any

from vlft.data.rows.keys import UNREAD, is_empty

#: Keys that list right answers. The first key that a row has wins. The second one is VQA's.
KEYS = ("references", "answers")
_WANTED = 'a text, a list of texts, or of {"answer": text}, is read as the right answers of vlft eval'


def references_of(raw: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Return the listed right answers of a row, repetitions included, and (field, remark) for a list in another form.

    A metric such as VQA accuracy counts how many people gave an answer, so that an answer may be listed many times.
    """
    key = next((key for key in KEYS if not is_empty(raw.get(key))), None)
    if key is None:
        return (), []
    value = raw[key]
    entries = value if isinstance(value, list) else [value]
    texts = [one.get("answer") if isinstance(one, dict) else one for one in entries]
    if not all(isinstance(text, str) for text in texts):
        return (), [(key, f"{UNREAD} {_WANTED}")]
    return tuple(text for text in texts if isinstance(text, str)), []


def is_unread(field: str, remark: str) -> bool:
    """Whether a warning of a row says that its listed right answers are in a form that is not read."""
    return field in KEYS and remark.endswith(_WANTED)
