"""The flags of vlft as tables of Markdown, from the dataclasses; examples/guides/flags.md shows them.

    python -m vlft.cli.flags_page examples/guides/flags.md        writes the tables there

A test compares. Neighbour: `vlft.cli.help`, which stores the texts of `--help`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.config.kinds import Bool, Number, Place, Word
from vlft.config.kits.common import REPLACED
from vlft.config.table import OF_TRAIN

BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"
SECTIONS = {
    "Data": (DataFlags, "Taken by `train`, `check-data`, `preview`, `plan` and `bench`."),
    "Model": (ModelFlags, "Taken by the same verbs."),
    "Training": (TrainFlags, "Flags that vlft adds to `TrainingArguments`, or to which it gives another default."),
}
NEEDED = ("data_path", "model_id")
MOST_WORDS = 8


def tables() -> str:
    """One section of Markdown for each dataclass of flags."""
    parts = []
    for title, (flags, intro) in SECTIONS.items():
        rows = [f"| {' | '.join(_row(field))} |" for field in _own(flags)]
        head = [f"## {title}", "", intro, "", "| flag | takes | default | |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def _own(flags: Any) -> Iterator[dataclasses.Field[Any]]:
    """The fields that our dataclasses declare, in their order, without those that are refused."""
    fields = {field.name: field for field in dataclasses.fields(flags)}
    ours = [one for one in flags.__mro__ if one.__module__.startswith("vlft.")]
    for name in dict.fromkeys(name for one in ours for name in one.__annotations__):
        if name in fields and name not in REPLACED:
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
    """The default in words where the help has them, else its value."""
    if field.name in NEEDED:
        return "needed"
    if words:
        return _marked(words)
    value = None if field.default is dataclasses.MISSING else field.default
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _marked(text: str) -> str:
    """Flags as code, and no cell that ends early."""
    return re.sub(r"(?<![\w`])--[a-z]\w*", lambda found: f"`{found[0]}`", text).replace("|", "\\|")


def with_tables(page: str) -> str:
    """A page with the tables in it as they are today.

    Raises:
        ValueError: it does not say where.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END} in it")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
