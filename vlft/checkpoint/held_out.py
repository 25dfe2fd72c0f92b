"""The rows that a run holds out of its training data (`--eval_split`), by name: `held_out.jsonl` of the run folder.

    {"file": "/data/train.json", "index": 17}

`vlft.train` writes it, and `vlft eval --held_out` asks about these rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from vlft.errors import CheckpointError
from vlft.files import write_text

HELD_OUT = "held_out.jsonl"


def write_held_out(folder: Path, rows: Iterable[tuple[str, int]]) -> None:
    """Write the rows.

    Args:
        folder: the run folder.
        rows: data file and index in it, from 0. Files are written with absolute paths.
    """
    lines = (json.dumps({"file": os.path.abspath(file), "index": index}) for file, index in rows)
    write_text(folder / HELD_OUT, "".join(f"{line}\n" for line in lines))


def read_held_out(folder: Path) -> dict[str, frozenset[int]] | None:
    """Return absolute path of a data file -> indices of its rows that were held out; None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / HELD_OUT
    found: dict[str, set[int]] = {}
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found.setdefault(line["file"], set()).add(int(line["index"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). It holds the rows of --eval_split: repeat the run, or restore the file."
        ) from error
    return {file: frozenset(indices) for file, indices in found.items()}
