"""Read the turns of a conversation from the keys of a row: a list of turns, or a question and its answer.

`vlft.data.rows.forms` says which keys a form of rows has, and `vlft.data.rows.turns` reads one turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from vlft.data.rows.keys import PREFIX
from vlft.data.rows.masks import Mask
from vlft.data.rows.source import kind_of
from vlft.data.rows.turns import RawTurn, plain, role_of, turns_of
from vlft.errors import RowRef


def listed(row: RowRef, raw: dict, key: str) -> list:
    """Return the entries of a conversation as a list; `entries_of` lists the accepted types.

    Raises:
        DataError: the conversation is empty, or is not a list.
    """
    try:
        value = entries_of(raw[key])
    except ValueError as error:
        raise row.bad(key, str(error)) from error
    if not isinstance(value, list):
        raise row.bad(key, f"is {kind_of(value)}, not a list of turns")
    if not value:
        raise row.bad(key, "is empty. A row needs a human turn and a gpt turn")
    return value


def entries_of(value: Any) -> Any:
    """Convert a conversation to a list if it is a JSON string, or an object of lists (older `datasets`).

    Any other value is returned unchanged.

    Raises:
        ValueError: the string is not JSON, or the lists have different lengths.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"is a string that is not JSON: {error}. Write a list of turns") from error
    if not isinstance(value, dict) or not value or not all(isinstance(items, list) for items in value.values()):
        return value
    lengths = {name: len(items) for name, items in value.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"holds lists of different lengths: {lengths}. Each needs one entry per turn")
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def conversation(key: str) -> Callable[[RowRef, dict], list[RawTurn]]:
    """Return the reader of a list of turns under a key."""

    def read(row: RowRef, raw: dict) -> list[RawTurn]:
        turns = listed(row, raw, key)
        return [turn for i, one in enumerate(turns) for turn in turns_of(row, one, f"{key}[{i}]")]

    return read


def instruction(row: RowRef, raw: dict) -> list[RawTurn]:
    """Read `instruction` and `input` of the alpaca form as a question, after the turns of `history`."""
    given = [key for key in ("instruction", "input") if raw.get(key)]
    for key in given:
        if not isinstance(raw[key], str):
            raise row.bad(key, f"is {kind_of(raw[key])}, not a string")
    asked = next((key for key in (*given, "instruction", "input") if raw.get(key) is not None), "instruction")
    question = "\n".join(raw[key] for key in given)
    return [*history(row, raw.get("history")), plain("user", question, asked)]


def alpaca(row: RowRef, raw: dict) -> list[RawTurn]:
    """Read the alpaca form: `instruction`, `input` and `output`."""
    return [*instruction(row, raw), plain("assistant", raw["output"], "output")]


def side(row: RowRef, raw: dict, key: str, role: str) -> list[RawTurn]:
    """Read a key that holds a string, or a list of turns."""
    turns = isinstance(raw[key], list) and any(isinstance(turn, dict) for turn in raw[key])
    return conversation(key)(row, raw) if turns else [plain(role, raw[key], key)]


def question(asked: str) -> Callable[[RowRef, dict], list[RawTurn]]:
    """Return the reader of a question under a key: a string or a list of turns, after the turns of `history`."""

    def read(row: RowRef, raw: dict) -> list[RawTurn]:
        before = side(row, raw, asked, "user")
        if before and role_of(row, before[-1]) == "assistant":
            raise row.bad(before[-1].field, f"{asked} ends in an answer, whose continuation {PREFIX}")
        # Answers in the prompt are not trained: TRL trains the completion only.
        before = [replace(turn, mask=Mask(switch=("train", False))) for turn in before]
        return [*history(row, raw.get("history")), *before]

    return read


def two(asked: str, answered: str) -> Callable[[RowRef, dict], list[RawTurn]]:
    """Return the reader of a question and an answer under two keys; each is a string or a list of turns."""

    def read(row: RowRef, raw: dict) -> list[RawTurn]:
        return [*question(asked)(row, raw), *side(row, raw, answered, "assistant")]

    return read


def history(row: RowRef, given: object) -> Iterator[RawTurn]:
    """The turns of `[[question, answer], ...]`, a key of LLaMA-Factory and of ms-swift's old form."""
    if given is None or given == "":
        return
    if not isinstance(given, list):
        raise row.bad("history", f"is {kind_of(given)}, not a list of [question, answer] pairs")
    for i, pair in enumerate(given):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.bad(f"history[{i}]", "is not a [question, answer] pair")
        yield plain("user", pair[0], f"history[{i}][0]")
        yield plain("assistant", pair[1], f"history[{i}][1]")
