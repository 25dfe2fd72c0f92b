"""Map rows with any columns to the plain form (`conversations`, `image`, `video`), as `--columns` sets it.

Opens no file. `vlft.data.rows.records` checks the mapped rows.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vlft.config.columns import Column, Columns
from vlft.data.rows.forms import FORMS, PAIR_FORMS
from vlft.data.rows.keys import MEDIA_KEYS, OWN_MEDIA_KEYS
from vlft.data.rows.media_refs import is_one_video
from vlft.data.rows.source import BrokenLine, kind_of
from vlft.errors import ConfigError

# Part of a row -> names that data sets use for it, most likely first. Used for the `--columns` that a message suggests.
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
# Next to a question and an answer, these most likely belong to the question.
CONTEXT = ("choices", "options", "context", "hint", "passage", "a", "b", "c", "d")
LISTED = 40  # columns that a message names
CELL = 1 << 20  # characters; longer cells are not parsed as Python literals
_TAGS = {"image": re.compile(r"<image>"), "video": re.compile(r"<video>")}


def mapped(raw: object, columns: Columns) -> object:
    """Map a row to the plain form.

    The result keeps all columns that the mapping does not read. If the question is built from columns and has no tags,
    the tags of the row's pictures and videos are put before it.

    Args:
        raw: the row as its file has it. A value that is not an object is returned unchanged.
        columns: the mapping.
    """
    if not isinstance(raw, dict):
        return raw
    found: dict[str, Any] = {}
    try:
        for part in dict.fromkeys(column.part for column in columns.columns):
            found[part] = _part(part, raw, columns.of(part))
    except _NotMapped as error:
        return BrokenLine(reason=str(error), row=raw)
    read = {column.name for column in columns.columns}
    row = {key: value for key, value in raw.items() if key not in read}
    for kind, names in MEDIA_KEYS.items():
        if kind in found:  # drop the other name of the list: a row with both is refused
            twins = names[:OWN_MEDIA_KEYS]
            row = {key: value for key, value in row.items() if key not in twins} | {kind: found[kind]}
    row |= {part: found[part] for part in ("id", "objects", "conversations") if found.get(part) is not None}
    if "conversations" in found:
        row.pop("messages", None)
    if "question" in found:
        for form in FORMS:  # drop other conversations; halves of one stay, and give a warning
            if len(form.keys) == 1:
                row.pop(form.name, None)
        asked = _tags(row, found["question"]) + found["question"]
        row["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": found["answer"]}]
    if "system" in found:
        row["system"] = found["system"]
    return {key: value for key, value in row.items() if value is not None}


class _NotMapped(Exception):
    """A row that cannot be mapped. The message says why."""


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
        raise _NotMapped(f"{names}, the {part} by --columns, is empty. Fill it in, or drop the row")
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
        return "\n".join(value)  # choices, one per line
    if not isinstance(value, str):
        raise _NotMapped(f"{column.name}, the {part} by --columns, is {kind_of(value)}, not text. Name another column")
    return value


def _tags(row: dict, question: str) -> str:
    """Return tags for the row's media of each kind for which the question has no tag."""
    tags = ""
    for kind, names in MEDIA_KEYS.items():
        value = next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
        if value is not None and not _TAGS[kind].search(question):
            several = isinstance(value, list) and not (kind == "video" and is_one_video(value))
            tags += f"<{kind}>\n" * (len(value) if several else 1)
    return tags


def value_at(raw: dict, name: str) -> Any:
    """Return the value of a row under a name or a dotted name (`qa.question`, `texts.0.user`); None if it has none."""
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
    """Parse a list or an object that a cell holds as text, in JSON or Python syntax. Other values are unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if len(value) > CELL:
        return value
    try:
        return ast.literal_eval(value.strip())  # parses literals only: calls and looks up nothing
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value


# ---- a whole file


def missing(columns: Columns, keys: Collection[str]) -> list[str]:
    """Return the columns that the mapping reads but that are not among the keys of the rows."""
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
            text = f" For a text that is the same in every row, write '{column.part}:={names[0]}'."
    raise ConfigError(
        f"{path}: --columns {columns}: no row has {' or '.join(map(repr, names))}. Its columns are {_names(keys)}."
        + text
    )


def check_names(path: str, keys: Sequence[str], *, pairs: bool = False) -> None:
    """Refuse a table without `--columns` if the names of its columns do not show what the conversation is.

    Args:
        path: the table, for messages.
        keys: names of its columns.
        pairs: whether its rows are read as preference rows.

    Raises:
        ConfigError: no column holds a conversation, or several may. The message suggests a `--columns`.
    """
    found = [form.keys for form in FORMS if set(form.keys) <= set(keys)]
    preferred = [form.keys for form in PAIR_FORMS if set(form.keys) <= set(keys)]
    if any(len(names) == 1 for names in found) or (pairs and preferred):
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
        f"{path}: {why}. Its columns are {_names(keys)}. Say what each column holds, for example:\n"
        f"  --columns {shlex.quote(suggestion(keys, others))}\n"
        "  Or rename the columns as in data/README.md."
        + ("\n  Or train on chosen and rejected answers: --method dpo, orpo or simpo." if _both(keys) else "")
    )


def _both(keys: Sequence[str]) -> bool:
    return {"chosen", "rejected"} <= set(keys)


def suggestion(keys: Sequence[str], context: Sequence[str] = ()) -> str:
    """Suggest a `--columns` for a table with these columns, guessed from their names."""
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
