"""Read the completions that a GRPO run keeps, in the format of `vlft.train.grpo.completions`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.pages.completions import MALFORMED, described, ranked
from vlft.report.lines import objects


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A row and its completions.

    Attributes:
        row: its description: file, index, id, turns, right, media.
        steps: its completions at each step (`vlft.pages.completions.ranked`), in order.
    """

    row: dict[str, Any]
    steps: list[dict[str, Any]]


def read_completions(path: Path) -> tuple[list[Sampled], int]:
    """Return the rows in a `completions.jsonl`, and the number of lines that could not be read."""
    rows: dict[tuple[str, int], Sampled] = {}
    broken = 0
    for line in objects(path):
        try:
            if line is None:
                raise KeyError("an object")
            steps, row = ranked(line), described(line)
        except MALFORMED:
            broken += 1
        else:
            rows.setdefault((row["file"], row["index"]), Sampled(row=row, steps=[])).steps.append(steps)
    return list(rows.values()), broken
