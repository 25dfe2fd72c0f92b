"""The supported forms of rows: which keys hold the conversation. One table, which is also shown in data/README.md.

    python -m vlft.data.rows.forms data/README.md        writes the table there

To support the form of another kit, add it to `FORMS`. `vlft.data.rows.turns` reads the turns. The other keys
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
    """A form of rows: which keys hold the conversation, and how it is read.

    Attributes:
        kits: the kits that write this form.
        keys: a row has this form if it has all of these keys.
        read: function from a row to its turns.
        example: an example row.
        remark: how the row is read.
        untagged: the kit has no tags, so that files belong to the beginning of the first human turn.
        beside: further keys of the form, which are optional.
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
        """The key that messages use to name the conversation."""
        return self.keys[-1]


def form_of(raw: dict) -> Form | None:
    """Return the first form whose keys the row has. None if the row has no conversation in a supported form."""
    return next((form for form in FORMS if all(raw.get(key) is not None for key in form.keys)), None)


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
    """Reader of a question and an answer under two keys; each is a string or a list of turns."""

    def side(row: RowRef, raw: dict, key: str, role: str) -> list[RawTurn]:
        turns = isinstance(raw[key], list) and any(isinstance(turn, dict) for turn in raw[key])
        return _conversation(key)(row, raw) if turns else [plain(role, raw[key], key)]

    def read(row: RowRef, raw: dict) -> list[RawTurn]:
        before = side(row, raw, asked, "user")
        if before and role_of(row, before[-1]) == "assistant":
            raise row.bad(before[-1].field, f"{asked} ends in an answer, whose continuation {PREFIX}")
        # Answers in the prompt are not trained: TRL trains the completion only.
        before = [replace(turn, mask=Mask(switch=("train", False))) for turn in before]
        return [*_history(row, raw.get("history")), *before, *side(row, raw, answered, "assistant")]

    return read


def _history(row: RowRef, history: object) -> Iterator[RawTurn]:
    """The turns of `[[question, answer], ...]`, a key of LLaMA-Factory and of ms-swift's old form."""
    if history is None or history == "":
        return
    if not isinstance(history, list):
        raise row.bad("history", f"is {kind_of(history)}, not a list of [question, answer] pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.bad(f"history[{i}]", "is not a [question, answer] pair")
        yield plain("user", pair[0], f"history[{i}][0]")
        yield plain("assistant", pair[1], f"history[{i}][1]")


_QUESTION, _ANSWER = "<image>What is it?", "A cat."

# The first form that fits is read; keys of other forms are then a warning.
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
        remark="has no tags: the pictures come before the first question",
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
        remark="two strings, or two lists of turns; without tags, pictures come before the first question, as in TRL",
        untagged=True,
    ),
    Form(
        kits="LLaMA-Factory `alpaca`",
        keys=("instruction", "output"),
        read=_alpaca,
        example={"images": ["cat.jpg"], "instruction": _QUESTION, "input": "", "output": _ANSWER, "history": []},
        remark="`input` follows on a new line; `history` holds earlier `[question, answer]` pairs, also trained",
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
        remark="without tags, pictures come before the question",
        untagged=True,
    ),
)
KEYS = frozenset(key for form in FORMS for key in (*form.keys, *form.beside))


def table() -> str:
    """Return the table of forms as it is in data/README.md."""
    lines = ["| rows of | look like this | |", "| --- | --- | --- |"]
    for form in FORMS:
        example = json.dumps(form.example, ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| {form.kits or 'others'} | `{example}` | {form.remark} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """Return a README with its table replaced by the current one."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
