"""Text for people: visible control characters, numbers with their nouns, tables. Independent of the content."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

PLAIN_WIDTH = 10_000  # columns of output to a file or a pipe
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
WRAPPED = 16  # least columns of wrapped text in a table

_TABLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}  # Unicode's control pictures
_TABLE |= {0x7F: 0x2421}
_TABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)  # 8-bit controls; lone surrogates


def printable(text: str) -> str:
    """Make control characters visible, so that a row cannot control the terminal. Newlines and tabs stay."""
    return text.translate(_TABLE)


def plural(number: float, noun: str) -> str:
    """Return the noun for a number: `row` for 1, `rows` for 0 and 2, `processes`."""
    if number == 1:
        return noun
    return f"{noun}{'es' if noun.endswith(('s', 'x', 'sh', 'tch')) else 's'}"


def counted(number: float, noun: str, *, zero: str = "0") -> str:
    """Format a number with its noun: `1 row`, `12,345 rows`, `2 processes`, `0.5 epochs`; `zero` is written for 0."""
    if number == 0:
        return f"{zero} {plural(number, noun)}"
    return f"{number:,} {plural(number, noun)}" if isinstance(number, int) else f"{number:.6g} {plural(number, noun)}"


def bytes_of(size: str) -> int:
    """Read a size as transformers writes it: `5GB` (10^9 bytes each), `200MB`, `1.5GB`, or a number of bytes.

    Raises:
        ValueError: it is no such size, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", size, re.IGNORECASE)
    count = 0 if found is None else int(float(found[1]) * _UNITS[(found[2] or "").upper()])
    if count < 1:
        raise ValueError(f"{size!r} is no size. Use a number with KB, MB, GB or TB, such as 5GB")
    return count


def gib(size: float) -> str:
    """Format a number of bytes: `12.3 GiB`, and below one GiB `0.4 MB` (10^6 bytes)."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 1e6:,.1f} MB"


def short(text: str, most: int = 200) -> str:
    """Cut text to at most `most` characters, and add `...` if it was longer."""
    return text if len(text) <= most else f"{text[:most]}..."


def short_path(path: str, most: int = 80) -> str:
    """Cut the start of a path that has more than `most` characters: its end says the most."""
    return path if len(path) <= most else f"...{path[-most:]}"


def error_text(error: BaseException, *, most: int = 300) -> str:
    """Return a library error's message on one line, or the name of its type if the message is empty."""
    return short(" ".join(str(error).split()).rstrip(".") or type(error).__name__, most)


def scaled(value: float) -> str:
    """Format a large number: `12,345`, `12.3 M`, `1.20 G`; `-` if it is not finite."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value / 1e6:,.1f} M" if abs(value) < 1e9 else f"{value / 1e9:,.2f} G"


def label(value: float) -> str:
    """Format a number in few characters, for the labels of an axis: `12k`, `1.5M`, `2e-05`."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Format a duration: `3.2 s`, `95 s`, `9 min 50 s`, `12 min`, `3 h 05 min`, `2 days 5 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} days {hours % 24} h"


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, soft: Collection[int] = (), indent: int = 0, last: str = ""
) -> str:
    """Format a table for the terminal. The first column is left-aligned, the others are right-aligned.

    If stdout is no terminal, the table is plain text and its lines are never wrapped. On a terminal the heads are bold,
    cells that are too wide are wrapped, and NO_COLOR is honoured. If its numbers do not fit into the terminal, each row
    becomes a sentence with the heads in it.

    Args:
        heads: one for each column. If all are empty, the line of heads is left out.
        rows: text of the cells; control characters are made visible.
        soft: indices of rows that are less important, from 0; they are dimmed.
        indent: spaces before each line.
        last: "left" also left-aligns the last column.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(heads), header_style="bold")
    needed = indent
    for place, head in enumerate(heads):
        left = place == 0 or (last == "left" and place == len(heads) - 1)
        # Numbers are never wrapped.
        drawn.add_column(Text(printable(head)), justify="left" if left else "right", no_wrap=not left, overflow="fold")
        longest = max(cell_len(cells[place]) for cells in [heads, *rows])
        needed += 2 + (min(WRAPPED, longest) if left else longest)
    for place, cells in enumerate(rows):
        drawn.add_row(*(Text(printable(cell)) for cell in cells), style="dim" if place in soft else None)
    if terminal_width() < needed and all(heads):
        return "\n".join(line for cells in rows for line in _in_words(heads, cells, indent))
    styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    console = Console(file=io.StringIO(), force_terminal=styled, force_jupyter=False)
    # Without heads, a narrower terminal wraps the lines. rich would leave out columns.
    console.width = max(terminal_width(), needed)
    with console.capture() as captured:
        console.print(Padding(drawn, (0, 0, 0, indent), expand=False))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _in_words(heads: Sequence[str], cells: Sequence[str], indent: int) -> list[str]:
    """Return a row of a table as a sentence, in lines that fit into the terminal. Cells that hold `-` are left out."""
    facts = [f"{head} {printable(cell)}" for head, cell in zip(heads[1:], cells[1:], strict=True) if cell != "-"]
    start, width = " " * indent, max(indent + WRAPPED, terminal_width())
    whole = f"{printable(cells[0])}: {', '.join(facts)}"
    return textwrap.wrap(
        whole,
        width,
        initial_indent=start,
        subsequent_indent=f"{start}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def terminal_width() -> int:
    """Return the columns of stdout; `PLAIN_WIDTH` if it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
