"""Build Markdown tables of vlft's flags from the dataclasses, for examples/guides/flags.md.

    python -m vlft.cli.flags_page examples/guides/flags.md        writes the tables into the page

A test compares the page with the dataclasses. Neighbour: `vlft.cli.help` stores the texts of `--help`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.kinds import Bool, Number, Place, Word
from vlft.config.kits.common import REPLACED
from vlft.config.table import OF_TRAIN
from vlft.config.training import TrainFlags

BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"
SECTIONS = {
    "Data": (DataFlags, "Flags of `train`, `check-data`, `preview`, `plan` and `bench`."),
    "Model": (ModelFlags, "Flags of the same verbs."),
    "Training": (TrainFlags, "Flags that vlft adds to `TrainingArguments`, or whose default it changes."),
}
NEEDED = ("data_path", "model_id")
MOST_WORDS = 8


def tables() -> str:
    """Return one section of Markdown for each dataclass of flags."""
    parts: list[str] = []
    listed: set[str] = set()  # a flag of two of them is listed once
    for title, (flags, intro) in SECTIONS.items():
        own = [field for field in _own(flags) if field.name not in listed]
        listed |= {field.name for field in own}
        rows = [f"| {' | '.join(_row(field))} |" for field in own]
        head = [f"## {title}", "", intro, "", "| flag | takes | default | |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def _own(flags: Any) -> Iterator[dataclasses.Field[Any]]:
    """Yield the flags that vlft's dataclasses declare, in their order, without refused ones."""
    fields = {field.name: field for field in dataclasses.fields(flags)}
    ours = [one for one in flags.__mro__ if one.__module__.startswith("vlft.") and dataclasses.is_dataclass(one)]
    for name in dict.fromkeys(name for one in ours for name in one.__annotations__):
        if name in fields and fields[name].init and name not in REPLACED:
            yield fields[name]


def _row(field: dataclasses.Field[Any]) -> tuple[str, str, str, str]:
    text, _, words = field.metadata["help"].removesuffix(")").partition(" (default: ")
    if not words:
        text = field.metadata["help"]
    return f"`--{field.name}`", _takes(field.name), _default(field, words), _marked(text)


def _takes(name: str) -> str:
    kind = OF_TRAIN[name]
    if isinstance(kind, Word) and len(kind.words) <= MOST_WORDS:
        return ", ".join(f"`{word}`" for word in kind.words)
    if isinstance(kind, Bool):
        return "`true`, `false`"
    if isinstance(kind, Number):
        return "a whole number" if kind.whole else "a number"
    if isinstance(kind, Place):
        return ", ".join([*(f"`{word}`" for word in kind.words), "paths" if kind.many == "some" else "a path"])
    return "a text"


def _default(field: dataclasses.Field[Any], words: str) -> str:
    """Return the default as the help describes it, or else its value."""
    if field.name in NEEDED:
        return "needed"
    if words:
        return _marked(words)
    value = None if field.default is dataclasses.MISSING else field.default
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _marked(text: str) -> str:
    """Mark flags as code, and escape `|`, which would end the cell."""
    return re.sub(r"(?<![\w`])--[a-z]\w*", lambda found: f"`{found[0]}`", text).replace("|", "\\|")


def with_tables(page: str) -> str:
    """Return a page with its tables replaced by the current ones.

    Raises:
        ValueError: the page lacks the comments that mark where the tables are.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END} in it")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
