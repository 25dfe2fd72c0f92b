"""Format the last line of a terminal: as many of its parts as fit into the width. `vlft.screen` draws it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

GAP = 2  # columns between two parts
NARROW, WIDE = 6, 40  # least and most columns of a bar
MARGIN = 3  # columns at the end of the line for the ^C of a terminal; without them it would begin a new line
USUAL = 80  # columns of a terminal whose size is unknown


@dataclass(frozen=True, kw_only=True)
class Part:
    """A text of the line.

    Attributes:
        text: an empty one is not shown.
        rank: on a narrow terminal the parts of the highest rank are left out first. Parts of rank 0 are never left out.
    """

    text: str
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar, which takes the columns that the texts leave.

    Attributes:
        share: of the work that is done, 0 to 1.
        rank: as of a `Part`.
    """

    share: float
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the line shows, from left to right."""

    parts: tuple[Part | Bar, ...]


def clock(seconds: float) -> str:
    """Format seconds as `h:mm:ss`."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def eta(seconds: float | None) -> str:
    """Return the text for the seconds that work still takes; None: unknown."""
    return f"ETA {'-:--:--' if seconds is None else clock(seconds)}"


def fitting(parts: Sequence[Part | Bar], width: int) -> tuple[list[Part | Bar], int]:
    """Return the parts that fit into a width, and the columns of each bar.

    If the parts of rank 0 alone are too wide, the last of them is to be cut.

    Args:
        parts: of a row.
        width: in columns.
    """
    left = [part for part in parts if isinstance(part, Bar) or part.text]
    while True:
        bars = sum(isinstance(part, Bar) for part in left)
        texts = sum(_columns(part.text) for part in left if isinstance(part, Part)) + GAP * (len(left) - 1)
        worst = max((part.rank for part in left), default=0)
        if texts + NARROW * bars <= width or not worst:
            return left, min(WIDE, (width - texts) // bars) if bars else 0
        left = [part for part in left if part.rank < worst]


def _columns(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


class Writer:
    """Formats rows for a terminal. Colours follow TERM and NO_COLOR.

    Args:
        stream: the terminal. Its size is read for each row, because a user may change it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._console: Any = None

    def text(self, row: Row) -> str:
        """Return the row with its control sequences: one line, `MARGIN` columns narrower than the terminal."""
        from rich.console import Console
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._console is None:
            self._console = Console(file=self.stream, force_terminal=True, force_jupyter=False, legacy_windows=False)
        width = max(1, columns(self.stream) - MARGIN)
        parts, bar = fitting(row.parts, width)
        grid, used = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False), 0
        cells: list[Text | ProgressBar] = []
        for part in parts:
            wide = bar if isinstance(part, Bar) else min(_columns(part.text), max(1, width - used))
            used += wide + GAP
            grid.add_column(width=wide, no_wrap=True, overflow="ellipsis")
            if isinstance(part, Bar):
                cells.append(ProgressBar(total=1.0, completed=min(1.0, part.share), width=wide))
            else:
                cells.append(Text(part.text))
        grid.add_row(*cells)
        self._console.width = width
        with self._console.capture() as captured:
            self._console.print(grid, no_wrap=True, crop=True, end="")
        return captured.get().split("\n")[0].rstrip(" ")


def columns(stream: TextIO) -> int:
    """Return the width of a terminal now."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL
    except (OSError, ValueError, AttributeError):
        return USUAL
