"""The forms of rows that are read: where each has its conversation. One table, which data/README.md shows, too.

    python -m vlft.data.rows.forms data/README.md        writes the table there

A form that other kits have belongs into `FORMS`. Turns are read by `vlft.data.rows.turns`; keys beside the conversation
(pictures, system turn, budgets) are the same in all forms, and `vlft.data.rows.normalise` reads them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlft.data.rows.keys import PREFIX
from vlft.data.rows.masks import Mask
from vlft.data.rows.source import kind_of
from vlft.data.rows.turns import RawTurn, plain, role_of, turns_of
from vlft.errors import RowRef

BEGIN, END = "<!-- forms: begin -->", "<!-- forms: end -->"  # around the table in data/README.md


@dataclass(frozen=True, kw_only=True)
class Form:
    """Where rows of a form have their conversation.

    Attributes:
        kits: who writes it. keys: by which it is told, all of them there.
        read: a row -> its turns.
        example: a row. remark: on how it is read.
        untagged: its kit has no tags, so that files belong to the beginning of the first human turn.
        beside: further keys that belong to it.
    """

    kits: str
    keys: tuple[str, ...]
    read: Callable[[RowRef, dict], list[RawTurn]]
    example: dict
    remark: str = ""
    untagged: bool = False
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The key under which messages name the conversation."""
        return self.keys[-1]


def form_of(raw: dict) -> Form | None:
    """The first form whose keys the row has; None where it has no conversation that is read."""
    return next((form for form in FORMS if all(raw.get(key) is not None for key in form.keys)), None)


def listed(row: RowRef, raw: dict, key: str) -> list:
    """The entries of a conversation, see `entries_of`.

    Raises:
        DataError: there are none, or it is something else.
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
    """A conversation as a list, where it is one as a JSON string or as an object of lists (older `datasets`).

    Raises:
        ValueError: the string is no JSON, or the lists are of unequal length.
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
        raise ValueError(f"holds lists of unequal length: {lengths}. Each needs one entry a turn")
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _conversation(key: str) -> Callable[[RowRef, dict], list[RawTurn]]:
    def read(row: RowRef, raw: dict) -> list[RawTurn]:
        turns = listed(row, raw, key)
        return [turn for i, one in enumerate(turns) for turn in turns_of(row, one, f"{key}[{i}]")]

    return read


def _alpaca(row: RowRef, raw: dict) -> list[RawTurn]:
    given = [key for key in ("instruction", "input") if raw.get(key)]
    for key in given:
        if not isinstance(raw[key], str):
            raise row.bad(key, f"is {kind_of(raw[key])}, not a string")
    asked = next((key for key in (*given, "instruction", "input") if raw.get(key) is not None), "instruction")
    question = "\n".join(raw[key] for key in given)
    said = [plain("user", question, asked), plain("assistant", raw["output"], "output")]
    return [*_history(row, raw.get("history")), *said]


def _two(asked: str, answered: str) -> Callable[[RowRef, dict], list[RawTurn]]:
    """A question and an answer under keys of their own: strings, or lists of turns."""

    def side(row: RowRef, raw: dict, key: str, role: str) -> list[RawTurn]:
        turns = isinstance(raw[key], list) and any(isinstance(turn, dict) for turn in raw[key])
        return _conversation(key)(row, raw) if turns else [plain(role, raw[key], key)]

    def read(row: RowRef, raw: dict) -> list[RawTurn]:
        before = side(row, raw, asked, "user")
        if before and role_of(row, before[-1]) == "assistant":
            raise row.bad(before[-1].field, f"{asked} ends in an answer, whose continuation {PREFIX}")
        # Answers among them are of the prompt, and TRL trains the completion only.
        before = [replace(turn, mask=Mask(switch=("train", False))) for turn in before]
        return [*_history(row, raw.get("history")), *before, *side(row, raw, answered, "assistant")]

    return read


def _history(row: RowRef, history: object) -> Iterator[RawTurn]:
    """`[[question, answer], ...]` of LLaMA-Factory and of ms-swift's old form."""
    if history is None or history == "":
        return
    if not isinstance(history, list):
        raise row.bad("history", f"is {kind_of(history)}, not a list of [question, answer] pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.bad(f"history[{i}]", "is no [question, answer] pair")
        yield plain("user", pair[0], f"history[{i}][0]")
        yield plain("assistant", pair[1], f"history[{i}][1]")


_QUESTION, _ANSWER = "<image>What is it?", "A cat."

# The first that fits is read; keys of the others are a warning then.
FORMS: tuple[Form, ...] = (
    Form(
        kits="LLaVA, ShareGPT, Qwen2-VL-Finetune, LLaMA-Factory `sharegpt`, InternVL",
        keys=("conversations",),
        read=_conversation("conversations"),
        example={
            "image": "cat.jpg",
            "conversations": [{"from": "human", "value": _QUESTION}, {"from": "gpt", "value": _ANSWER}],
        },
        remark="`role` and `content` are other names. A list, a JSON string, or `{from: [...], value: [...]}`",
    ),
    Form(
        kits="OpenAI, ms-swift, TRL, axolotl, LLaMA-Factory `openai` and v1",
        keys=("messages",),
        read=_conversation("messages"),
        example={
            "images": ["cat.jpg"],
            "messages": [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}],
        },
        remark="`content` may be a list of [parts](#parts)",
    ),
    Form(
        kits="ms-swift's older ShareGPT",
        keys=("conversation",),
        read=_conversation("conversation"),
        example={"images": ["cat.jpg"], "conversation": [{"human": _QUESTION, "assistant": _ANSWER}]},
        remark="pairs, or turns as above",
    ),
    Form(
        kits="the_cauldron, FineVision",
        keys=("texts",),
        read=_conversation("texts"),
        example={"images": ["cat.jpg"], "texts": [{"user": "What is it?", "assistant": _ANSWER}]},
        remark="it has no tags: its pictures stand before the first question",
        untagged=True,
    ),
    Form(
        kits="TRL",
        keys=("prompt", "completion"),
        read=_two("prompt", "completion"),
        example={
            "images": ["cat.jpg"],
            "prompt": [{"role": "user", "content": "What is it?"}],
            "completion": [{"role": "assistant", "content": _ANSWER}],
        },
        remark="two strings, or two lists of turns; without tags, pictures stand before the first question, as in TRL",
        untagged=True,
    ),
    Form(
        kits="LLaMA-Factory `alpaca`",
        keys=("instruction", "output"),
        read=_alpaca,
        example={"images": ["cat.jpg"], "instruction": _QUESTION, "input": "", "output": _ANSWER, "history": []},
        remark="`input` follows in a line of its own; `history` holds earlier `[question, answer]` pairs, trained too",
        beside=("input", "history"),
    ),
    Form(
        kits="",
        keys=("input", "output"),
        read=_alpaca,
        example={"images": ["cat.jpg"], "input": _QUESTION, "output": _ANSWER},
        beside=("history",),
    ),
    Form(
        kits="ms-swift",
        keys=("query", "response"),
        read=_two("query", "response"),
        example={"images": [{"path": "cat.jpg"}], "query": _QUESTION, "response": _ANSWER, "history": []},
        remark="`history` as above",
        beside=("history",),
    ),
    Form(
        kits="many data sets",
        keys=("prompt", "response"),
        read=_two("prompt", "response"),
        example={"image": "cat.jpg", "prompt": _QUESTION, "response": _ANSWER},
    ),
    Form(
        kits="VQA data sets",
        keys=("question", "answer"),
        read=_two("question", "answer"),
        example={"image": "cat.jpg", "question": "What is it?", "answer": _ANSWER},
        remark="without tags, pictures stand before the question",
        untagged=True,
    ),
)
KEYS = frozenset(key for form in FORMS for key in (*form.keys, *form.beside))


def table() -> str:
    """The forms as data/README.md shows them."""
    lines = ["| rows of | look like this | |", "| --- | --- | --- |"]
    for form in FORMS:
        example = json.dumps(form.example, ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| {form.kits or 'others'} | `{example}` | {form.remark} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A README with the table in it as it is today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
