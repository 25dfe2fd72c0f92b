"""Rows of any columns -> rows in the plain form (`conversations`, `image`, `video`), as `--columns` says.

Knows neither files nor what a row must hold: `vlft.data.rows.records` says that afterwards.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vlft.config.columns import Column, Columns
from vlft.data.rows.forms import FORMS
from vlft.data.rows.keys import MEDIA_KEYS, OWN_MEDIA_KEYS
from vlft.data.rows.media_refs import is_one_video
from vlft.data.rows.source import BrokenLine, kind_of
from vlft.errors import ConfigError

# Names under which other data sets keep a part of a row, likeliest first; for the line that a refusal suggests.
LIKELY = {
    "question": ("question", "prompt", "query", "instruction", "problem", "input", "q", "user", "human"),
    "answer": (
        *("answer", "response", "output", "completion", "solution", "caption", "text", "txt", "label", "cls", "a"),
        *("description", "target", "reply", "assistant", "gpt", "answers"),
    ),
    "image": (
        *(
            "image",
            "images",
            "img",
            "picture",
            "photo",
            "image_path",
            "img_path",
            "image_file",
            "file_name",
            "filename",
        ),
        *("path", "jpg", "png"),
    ),
    "video": ("video", "videos", "clip", "video_path", "mp4"),
    "system": ("system", "system_prompt"),
    "id": ("id", "question_id", "key"),
}
# Beside a question and an answer, these most likely belong to the question.
CONTEXT = ("choices", "options", "context", "hint", "passage", "a", "b", "c", "d")
LISTED = 40  # columns that a message names
CELL = 1 << 20  # characters of a cell that may be a list written as Python does
_TAGS = {"image": re.compile(r"<image>"), "video": re.compile(r"<video>")}


def mapped(raw: object, columns: Columns) -> object:
    """A row in the plain form.

    Columns that are read are gone from it, all others stay. Where the question is built of columns and has no tags,
    those of the row's pictures and videos stand at its start.

    Args:
        raw: the row as its file has it; what is no object is handed back.
    """
    if not isinstance(raw, dict):
        return raw
    found: dict[str, Any] = {}
    try:
        for part in dict.fromkeys(column.part for column in columns.columns):
            found[part] = _part(part, raw, columns.of(part))
    except _Wrong as error:
        return BrokenLine(reason=str(error), row=raw)
    read = {column.name for column in columns.columns}
    row = {key: value for key, value in raw.items() if key not in read}
    for kind, names in MEDIA_KEYS.items():
        if kind in found:  # two names for one list would be refused
            twins = names[:OWN_MEDIA_KEYS]
            row = {key: value for key, value in row.items() if key not in twins} | {kind: found[kind]}
    row |= {part: found[part] for part in ("id", "objects", "conversations") if found.get(part) is not None}
    if "conversations" in found:
        row.pop("messages", None)
    if "question" in found:
        for form in FORMS:  # another conversation; halves of one stay, and are a warning
            if len(form.keys) == 1:
                row.pop(form.name, None)
        asked = _tags(row, found["question"]) + found["question"]
        row["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": found["answer"]}]
    if "system" in found:
        row["system"] = found["system"]
    return {key: value for key, value in row.items() if value is not None}


class _Wrong(Exception):
    """Why a row cannot be mapped."""


def _part(part: str, raw: dict, columns: Sequence[Column]) -> Any:
    if part in ("image", "video"):
        values = [listed(value_at(raw, column.name or "")) for column in columns]
        if len(values) == 1:
            return values[0]
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        return [item for item in flat if item not in (None, "")]
    if part in ("id", "objects", "conversations"):
        value = value_at(raw, columns[0].name or "")
        return value if part == "id" else listed(value)
    texts = [_text(part, raw, column) for column in columns]
    text = "\n".join(text for text in texts if text)
    if not text and part != "system":
        names = " and ".join(str(column.name) for column in columns)
        raise _Wrong(f"{names}, the {part} by --columns, is empty. Fill it in, or drop the row")
    return text or None


def _text(part: str, raw: dict, column: Column) -> str:
    if column.name is None:
        return column.text or ""
    value = value_at(raw, column.name)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if part == "question" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)  # choices, one a line
    if not isinstance(value, str):
        raise _Wrong(f"{column.name}, the {part} by --columns, is {kind_of(value)}, not text. Name another column")
    return value


def _tags(row: dict, question: str) -> str:
    """Tags for the row's media, for a question that has none of the kind."""
    tags = ""
    for kind, names in MEDIA_KEYS.items():
        value = next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
        if value is not None and not _TAGS[kind].search(question):
            several = isinstance(value, list) and not (kind == "video" and is_one_video(value))
            tags += f"<{kind}>\n" * (len(value) if several else 1)
    return tags


def value_at(raw: dict, name: str) -> Any:
    """What a row has under a name, or under a dotted one: `qa.question`, `texts.0.user`; None where nothing is."""
    if name in raw:
        return raw[name]
    value: Any = raw
    for step in name.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def listed(value: Any) -> Any:
    """A list or an object that a cell holds as text, as JSON or as Python writes them; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if len(value) > CELL:
        return value
    try:
        return ast.literal_eval(value.strip())  # reads values only: nothing is called or looked up
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value


# ---- a whole file


def missing(columns: Columns, keys: Collection[str]) -> list[str]:
    """Columns that are read and that no row has, by the keys of all rows."""
    return [name for name in columns.names if name not in keys and name.partition(".")[0] not in keys]


def refuse_missing(path: str, columns: Columns, names: Sequence[str], keys: Iterable[str]) -> None:
    """Refuse columns that no row of a file has.

    Raises:
        ConfigError: `names` is not empty.
    """
    if not names:
        return
    text = ""
    for column in columns.columns:
        if column.name == names[0] and column.part in ("question", "answer", "system"):
            text = f" For a text that is the same in every row: '{column.part}:={names[0]}'."
    raise ConfigError(
        f"{path}: --columns {columns}: no row has {' or '.join(map(repr, names))}. Its columns are {_names(keys)}."
        + text
    )


def check_names(path: str, keys: Sequence[str]) -> None:
    """Refuse a table whose columns do not tell what its conversation is, when there is no `--columns`.

    Raises:
        ConfigError: no column holds a conversation, or several may; the message has a line to try.
    """
    found = [form.keys for form in FORMS if set(form.keys) <= set(keys)]
    if any(len(names) == 1 for names in found):
        return
    if ("instruction", "output") in found:
        found = [names for names in found if names != ("input", "output")]
    others = sorted(key for key in keys if key.lower() in CONTEXT)
    if len(found) == 1 and not others:
        return
    if len(found) == 1:
        why = f"{' and '.join(found[0])} may be the conversation, but {', '.join(others)} may belong to the question"
    elif found:
        why = f"several columns may be the conversation ({', '.join(map(' and '.join, found))})"
    else:
        why, others = "no column is a conversation", []
    raise ConfigError(
        f"{path}: {why}. Its columns are {_names(keys)}. Say which column is what, for example:\n"
        f"  --columns {shlex.quote(suggestion(keys, others))}\n"
        "  Or name the columns as data/README.md has them."
    )


def suggestion(keys: Sequence[str], context: Sequence[str] = ()) -> str:
    """A `--columns` for a table of these columns, as far as their names tell."""
    lower = {key.lower(): key for key in reversed(keys)}
    picked: dict[str, list[str]] = {}
    taken: set[str] = set()
    for part, names in LIKELY.items():
        found = next((lower[name] for name in names if name in lower and lower[name] not in taken), None)
        if found is not None:
            picked[part] = [found]
            taken.add(found)
    shown = "video" in picked and "image" not in picked
    asked = [f"question:=Describe the {'video' if shown else 'picture'}."]
    if "question" in picked:
        asked = [f"question={name}" for name in [*picked["question"], *(c for c in context if c not in taken)]]
    elif "answer" in picked and picked["answer"][0].lower() in ("label", "cls"):
        asked = [f"question:=What is in the {'video' if shown else 'picture'}?"]
    left = [key for key in keys if key not in taken]
    if not picked.keys() & {"question", "answer"} and len(left) > 1:
        asked = [f"question={left.pop(0)}"]
    words = [f"{part}={picked[part][0]}" for part in ("image", "video", "system", "id") if part in picked]
    return ",".join([f"answer={picked.get('answer', [*left, 'COLUMN'])[0]}", *words, *asked])


def _names(keys: Iterable[str]) -> str:
    names = list(keys)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "") or "none"
