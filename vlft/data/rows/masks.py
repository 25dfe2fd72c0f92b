"""Read which parts of a turn are trained, from keys of LLaMA-Factory, ms-swift, axolotl or OpenAI, or from spans.

Works on characters, not tokens.

| key | kit |
| `loss_weight` | LLaMA-Factory v1 | `loss`, `loss_scale` | ms-swift | `weight` | OpenAI |
| `train`, `training`, `train_detail`, `training_detail` | axolotl (docs/dataset-formats/conversation.qmd) |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlft.data.rows.source import kind_of
from vlft.data.sample import Role, Text
from vlft.errors import RowRef
from vlft.text import short

SWITCHES = ("loss", "loss_weight", "loss_scale", "train", "training", "weight")
DETAILS = ("train_detail", "training_detail")
KEYS = (*SWITCHES, *DETAILS)
_SPAN = ("begin_offset", "end_offset", "train")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The mask keys of a turn.

    Attributes:
        switch: (key, whether the turn is trained). None: the turn has no such key.
        detail: (key, value that lists spans). None: the turn has no such key.
    """

    switch: tuple[str, bool] | None = None
    detail: tuple[str, object] | None = None


def mask_of(row: RowRef, turn: dict, field: str) -> Mask:
    """Read the mask keys of a turn. `masked` checks later whether they fit its role and text.

    Raises:
        DataError: a weight that is not 0 or 1, or two keys that differ.
    """
    said = [(key, _switch(row, turn[key], f"{field}.{key}")) for key in SWITCHES if turn.get(key) is not None]
    for key, value in said[1:]:
        if value != said[0][1]:
            first = said[0][0]
            raise row.bad(
                f"{field}.{key}", f"is {turn[key]!r}, and {first} is {turn[first]!r}: they differ. Keep one of them"
            )
    details = [(key, turn[key]) for key in DETAILS if turn.get(key) is not None]
    if len(details) == 2 and details[0][1] != details[1][1]:
        raise row.bad(f"{field}.{DETAILS[1]}", f"differs from {DETAILS[0]}. Keep one of them")
    return Mask(switch=said[0] if said else None, detail=details[0] if details else None)


def _switch(row: RowRef, value: object, field: str) -> bool:
    if not isinstance(value, bool | int | float):
        raise row.bad(field, f"is {kind_of(value)}. Write true or false")
    if value not in (0, 1):
        raise row.bad(
            field,
            f"is {value!r}: a turn is trained (1) or not (0), and all trained tokens count equally. Write 0 or 1, or "
            "weight data sets with --data_mix",
        )
    return bool(value)


def masked(row: RowRef, mask: Mask, role: Role, texts: tuple[Text, ...], field: str, *, whole: bool) -> list[Text]:
    """Return the texts of a turn, split where training starts or stops.

    Args:
        row: the row, for messages.
        mask: the mask keys of the turn.
        role: role of the turn.
        texts: the text of the turn, in pieces.
        field: field of the turn.
        whole: whether the text is one string; offsets need that.

    Raises:
        DataError: the mask trains a turn that is not an answer, or spans do not fit the text.
    """
    spans = _spans(row, mask.detail, f"{field}.") if mask.detail else ()
    if role != "assistant":
        if mask.switch and mask.switch[1]:
            raise _no_answer(row, role, f"{field}.{mask.switch[0]}", "asks to train the turn")
        if mask.detail and any(trained for _, _, trained in spans):
            raise _no_answer(row, role, f"{field}.{mask.detail[0]}", "asks to train a part of the turn")
        return list(texts)
    if mask.switch and not mask.switch[1]:
        return [Text(text=text.text, trained=False) for text in texts]
    if not mask.detail:
        return list(texts)
    where = f"{field}.{mask.detail[0]}"
    if not spans:
        return list(texts)
    if not whole:
        raise row.bad(where, "needs a turn whose text is one string, because it counts characters. Write it as one")
    return list(_cut(row, "".join(text.text for text in texts), spans, where))


def _no_answer(row: RowRef, role: Role, field: str, what: str) -> Exception:
    turn = "a human" if role == "user" else "a system"
    return row.bad(field, f"{what}, but it is {turn} turn: only answers are trained. Write false, or drop it")


def _spans(row: RowRef, detail: tuple[str, object], at: str) -> tuple[tuple[int, int, bool], ...]:
    """Return (first, last, trained) of each span, sorted; both ends are inclusive."""
    key, value = detail
    if not isinstance(value, list):
        raise row.bad(f"{at}{key}", f"is {kind_of(value)}, not a list of spans")
    found = []
    for i, span in enumerate(value):
        field = f"{at}{key}[{i}]"
        if not isinstance(span, dict) or any(span.get(name) is None for name in _SPAN):
            raise row.bad(field, f"is not a span. Write {{{', '.join(_SPAN)}}}")
        first, last = span["begin_offset"], span["end_offset"]
        for name in _SPAN[:2]:
            number = span[name]
            whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
            if not whole or isinstance(number, bool):
                raise row.bad(f"{field}.{name}", f"is {short(repr(span[name]))}, where a whole number belongs")
        if not 0 <= first <= last:
            raise row.bad(field, f"runs from {first} to {last}. Both count characters from 0, and both are inclusive")
        found.append((int(first), int(last), _switch(row, span["train"], f"{field}.train")))
    return tuple(sorted(found))


def _cut(row: RowRef, text: str, spans: tuple[tuple[int, int, bool], ...], field: str) -> Iterator[Text]:
    """Split a text at its spans. Characters outside all spans are not trained, as in axolotl."""
    flags = [False] * len(text)
    known: list[bool | None] = [None] * len(text)
    for first, last, trained in spans:
        if last >= len(text):
            raise row.bad(
                field,
                f"a span ends at character {last:,}, and the last character of the text is {len(text) - 1:,} (counted "
                "from 0, inclusive). Count in the text as written",
            )
        for place in range(first, last + 1):
            if known[place] not in (None, trained):
                raise row.bad(
                    field, f"character {place:,} is in a span that is trained and in one that is not. Keep one of them"
                )
            known[place] = flags[place] = trained
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or flags[place] != flags[start]:
            yield Text(text=text[start:place], trained=flags[start])
            start = place
