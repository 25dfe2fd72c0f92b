"""Prepare rows to be written back to a file, with the tags that `--missing_tags first` added. Opens no file."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from vlft.data.rows.conversation import entries_of


def written(raw: object, added: Sequence[tuple[str, str]]) -> object:
    """Return the row with the added tags in its text, so that it trains the same without the flag.

    Args:
        raw: the row as in its file.
        added: (field, tags) from `Sample.added`.
    """
    if not added or not isinstance(raw, dict):
        return raw
    row = copy.deepcopy(raw)
    for field, tags in added:
        at: list[Any] = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", field)]
        if len(at) > 1:
            row[at[0]] = entries_of(row[at[0]])  # convert a JSON string or an object of lists to a list
        owner: Any = row
        for step in at[:-1]:
            owner = owner[step]
        said = owner[at[-1]]
        owner[at[-1]] = [{"type": "text", "text": tags}, *said] if isinstance(said, list) else f"{tags}{said}"
    return row
