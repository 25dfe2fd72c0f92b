"""Group rows by kind of fault: two rows have the same kind if their reasons differ only in values.

Values are numbers, file names, sizes and quoted texts. The text of a kind keeps every value that all of its rows share,
and shows the range or some of the values where they differ, so nothing that a reader needs is hidden. Used for the
terminal and for the page; it depends on nothing but `BadRow`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vlft.errors import BadRow

VALUES = 3  # different values of a slot that are shown
VALUE = 60  # characters of a value that differs between rows

# The order matters: a size holds numbers, a path may hold anything, and the "." of 2.5 begins no extension.
_VALUE = re.compile(
    r"""
      (?P<name>
          "[^"\n]*" | (?<!\w)'[^'\n]*'(?!\w) | `[^`\n]*`                           # a quoted text
        | (?<![\w.])\d+x\d+(?:x\d+)*(?!\w)                                         # a size
        | (?<![\w<])[A-Za-z][\w+.-]*://[^\s,;)]*[^\s,;).:]                         # an address
        | (?<![\w<])[^\s,;:()<>"'`]*/[^\s,;:()<>"'`]*[^\s,;:()<>"'`.]              # a path
        | (?<![\w<])[^\s,;:()<>"'`\[\]/]*[^\s,;:()<>"'`\[\]/.]\.[A-Za-z]\w{1,4}(?![\w.])  # a name with an extension
        | \b0x[0-9a-f]+\b
      )
    | (?P<number>(?<![A-Za-z_])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)
    """,
    re.VERBOSE,
)
# A file name before ": " may have blanks in it, so it is recognised by its ending, which no other name in it has.
_FILE = re.compile(r"""(?:(?!:[ ]|\.[A-Za-z]\w{0,5}[ ,;])[^\n"'])+\.[A-Za-z]\w{0,5}(?=:[ ])""")
_BETWEEN = (", ", " and ", " or ")  # between the names of a list


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A piece of a reason. Its sort is `name`, `number` or, for what is the same in the whole kind, `text`."""

    sort: str
    text: str


@dataclass(kw_only=True)
class _Kind:
    shape: list[_Part]
    values: list[dict[str, None]]  # of each part, the different texts in order of appearance
    rows: list[BadRow] = field(default_factory=list)


def by_kind(rows: Iterable[BadRow]) -> list[tuple[str, list[BadRow]]]:
    """Group rows with the same fault.

    Returns:
        (text of the kind, its rows in the given order) of each kind, the kind with the most rows first. The text of
        a kind of one row is the row's reason.
    """
    kinds: dict[str, _Kind] = {}
    for row in rows:
        parts = _parts(row.reason)
        kind = kinds.setdefault(_key(parts), _Kind(shape=parts, values=[{} for _ in parts]))
        for part, values in zip(parts, kind.values, strict=True):
            values[part.text] = None
        kind.rows.append(row)
    ordered = sorted(kinds.values(), key=lambda kind: -len(kind.rows))  # stable: as they appear
    return [(_text(kind), kind.rows) for kind in ordered]


def kind_key(reason: str) -> str:
    """Return a key that is equal for reasons of the same kind. It is not meant to be read; `by_kind` returns texts."""
    return _key(_parts(reason))


def _parts(reason: str) -> list[_Part]:
    """Split a reason into texts and values. A list of names is one value."""
    reason = reason.replace("\0", "\ufffd")  # keys are joined by it
    if (file := _FILE.match(reason)) is None:
        return _values(reason)
    parts = [_Part(sort="name", text=file[0])]
    base = re.split(r"[/\\]", file[0])[-1]
    rest = reason[file.end() :]
    while " " in base and base in rest:  # a message may repeat it without its folder
        before, _, rest = rest.partition(base)
        parts += [*_values(before), _Part(sort="name", text=base)]
    return [*parts, *_values(rest)]


def _values(text: str) -> list[_Part]:
    parts: list[_Part] = []
    end = 0
    for found in _VALUE.finditer(text):
        between = text[end : found.start()]
        sort = str(found.lastgroup)
        if sort == "name" and between in _BETWEEN and parts and parts[-1].sort == "name":
            parts[-1] = _Part(sort="name", text=parts[-1].text + between + found[0])
        else:
            parts += [_Part(sort="text", text=between), _Part(sort=sort, text=found[0])]
        end = found.end()
    return [*parts, _Part(sort="text", text=text[end:])]


def _key(parts: Sequence[_Part]) -> str:
    """Join the parts, with a placeholder for each value. Without the final s of words, as in 1 tag and 2 tags."""
    return "\0".join(re.sub(r"(?<=\w)s\b", "", part.text) if part.sort == "text" else part.sort for part in parts)


def _text(kind: _Kind) -> str:
    return "".join(_shown(part.sort, list(values)) for part, values in zip(kind.shape, kind.values, strict=True))


def _shown(sort: str, values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    if sort == "text":
        return max(values, key=len)
    if sort == "number":
        return f"{min(values, key=_number)} to {max(values, key=_number)}"
    more = f" and {len(values) - VALUES:,} more" if len(values) > VALUES else ""
    values = [values[0], *(_beside(values[0], value) for value in values[1:])]
    joint = "; " if any(between in value for value in values for between in _BETWEEN) else ", "
    return joint.join(_short(value) for value in values[:VALUES]) + more


def _beside(first: str, path: str) -> str:
    """Return a path without its folder if that is the folder of the first path, which is shown in full."""
    folder = first[: first.rfind("/") + 1]
    name = path.removeprefix(folder)
    return name if folder and "/" not in name else path


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _short(value: str) -> str:
    """Shorten a value in its middle; the end of a path says the most."""
    if len(value) <= VALUE:
        return value
    return f"{value[: VALUE // 3]}…{value[-(VALUE - VALUE // 3 - 1) :]}"
