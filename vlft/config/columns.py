"""Parse `--columns`: which columns or keys of a data file hold the parts of a row. Opens no data file.

question=q,answer=a,image=picture        columns by name
answer=caption,question:=What is it?     a text that is the same in every row
image=left,image=right                   several pictures, in this order
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlft.errors import ConfigError

#: Parts of a row, and whether several columns may form one.
PARTS = {
    "question": True,
    "answer": False,
    "system": False,
    "image": True,
    "video": True,
    "conversations": False,
    "objects": False,
    "id": False,
}
TEXTS = ("question", "answer", "system")  # parts that may be a constant text
_START = re.compile(r"(?:^|,)\s*([A-Za-z_]\w*)\s*(:?=)")
EXAMPLE = "Write question=COLUMN,answer=COLUMN,image=COLUMN"


@dataclass(frozen=True, kw_only=True)
class Column:
    """The source of a part of a row: a column of the data file, or a text.

    Attributes:
        part: one of `PARTS`.
        name: name of the column; a dot goes into an object (`qa.question`). None: `text` is used in every row.
        text: the constant text. None: `name` is used.
    """

    part: str
    name: str | None = None
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.part}:={self.text}" if self.name is None else f"{self.part}={self.name}"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A parsed `--columns`.

    Attributes:
        columns: the sources of all parts, in the order of `PARTS`.
    """

    columns: tuple[Column, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.columns))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        return tuple(dict.fromkeys(column.name for column in self.columns if column.name is not None))

    def of(self, part: str) -> tuple[Column, ...]:
        """Return the sources of a part; empty if the part is not mapped."""
        return tuple(column for column in self.columns if column.part == part)


def read_columns(given: object, *, where: str = "--columns") -> Columns:
    """Parse and check a `--columns`.

    Args:
        given: `question=q,answer=a`, or a mapping (from YAML): part -> column, list of columns, or `{text: ...}`.
        where: the flag or key that sets it, for messages.

    Raises:
        ConfigError: the value is neither, names an unknown part, a part twice, or no column.
    """
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)  # --config passes a mapping as JSON
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} {given}: not JSON ({error.msg}). {EXAMPLE}.") from error
    if isinstance(given, str):
        columns = tuple(_of_text(given, where))
    elif isinstance(given, Mapping):
        columns = tuple(_of_mapping(given, where))
    else:
        raise ConfigError(f"{where}: is {given!r}, not a mapping. {EXAMPLE}.")
    if not columns:
        raise ConfigError(f"{where}: names no column. {EXAMPLE}, or drop it.")
    _check(columns, where)
    # Sorted, so that mappings that differ only in the order of their parts are equal.
    return Columns(columns=tuple(sorted(columns, key=lambda column: list(PARTS).index(column.part))))


def _of_text(text: str, where: str) -> Iterator[Column]:
    starts = list(_START.finditer(text))
    if text.strip() and (not starts or text[: starts[0].start()].strip()):
        raise ConfigError(f"{where} {text!r}: is not part=column. {EXAMPLE}; parts are {', '.join(PARTS)}.")
    for start, after in itertools.zip_longest(starts, starts[1:]):
        value = text[start.end() : after.start() if after else None].strip()
        yield Column(part=start[1], text=value) if start[2] == ":=" else Column(part=start[1], name=value)


def _of_mapping(given: Mapping[Any, Any], where: str) -> Iterator[Column]:
    for part, value in given.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                yield Column(part=str(part), name=item.strip())
            elif isinstance(item, Mapping) and list(item) == ["text"] and isinstance(item["text"], str):
                yield Column(part=str(part), text=item["text"].strip())
            else:
                raise ConfigError(
                    f"{where}.{part}: is {item!r}. Name a column, a list of columns, or write {{text: ...}}."
                )


def _check(columns: tuple[Column, ...], where: str) -> None:
    parts = [column.part for column in columns]
    for column in columns:
        part = column.part
        if part not in PARTS:
            raise ConfigError(f"{where}: {part!r} is not a part of a row. Parts are {', '.join(PARTS)}.")
        if column.name == "" or column.text == "":
            raise ConfigError(f"{where}: {part} is empty. Write {part}=COLUMN.")
        if column.text is not None and part not in TEXTS:
            raise ConfigError(f"{where}: {column}: only {', '.join(TEXTS)} may be a text. Write {part}=COLUMN.")
        if parts.count(part) > 1 and not PARTS[part]:
            several = ", ".join(part for part, more in PARTS.items() if more)
            raise ConfigError(f"{where}: {part} is given twice. Several columns may form {several} only.")
    if "conversations" in parts and (other := {"question", "answer"} & set(parts)):
        raise ConfigError(
            f"{where}: conversations and {min(other)} both name the conversation. Keep conversations, or question and "
            "answer."
        )
    if ("question" in parts) != ("answer" in parts):
        there, missing = ("question", "answer") if "question" in parts else ("answer", "question")
        constant = f", or a text: '{missing}:=Describe the picture.'" if missing == "question" else ""
        raise ConfigError(f"{where}: {there} without {missing}. Add {missing}=COLUMN{constant}.")
    if columns and all(column.name is None for column in columns):
        raise ConfigError(f"{where}: reads no column, so every row would be the same. Add answer=COLUMN.")
