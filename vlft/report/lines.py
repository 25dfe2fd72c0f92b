"""Read the .jsonl files of a run folder, which a run may be writing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the objects of a .jsonl file, and None for any other line.

    An incomplete last line is ignored, because a run may still be writing it. A missing file has no lines.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                return
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else None
