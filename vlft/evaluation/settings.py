"""What `vlft eval` is asked to do. `vlft.evaluation.evaluate` does it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlft import metrics
from vlft.config.flags import DataFlags
from vlft.config.row_flags import BoxFormat
from vlft.config.thinking import Thinking

BATCH, MAX_NEW_TOKENS = 8, 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate, and how.

    Attributes:
        models: run folders, checkpoints, adapters, models or files of answers; the others are compared with the first.
        files: data files.
        data: how their rows are read.
        metrics: names, or FILE.py:FUNCTION.
        box_format: unit of the boxes in the rows; None: that of each run's rows.
        batch: most rows that are answered together. Answers do not depend on it.
        max_new_tokens: most tokens of an answer.
        limit: most rows, from the first on; None: all.
        rows: the only rows to evaluate, as absolute path of a data file -> indices; None: all.
        out: answers file of the first model; None: in the folder `eval`.
        thinking: whether models think before they answer.
        base_model: folder or hub id of an adapter's base, if it has moved.
        labels: a text file with a label on each line: they are scored by their log-probability instead of generating
            answers; None: answers are generated.
        device: where to run models; None: the GPU if there is one.
    """

    models: tuple[str, ...]
    files: tuple[str, ...]
    data: DataFlags = field(default_factory=DataFlags)
    metrics: tuple[str, ...] = metrics.DEFAULT
    box_format: BoxFormat | None = None
    batch: int = BATCH
    max_new_tokens: int = MAX_NEW_TOKENS
    limit: int | None = None
    rows: Mapping[str, frozenset[int]] | None = None
    out: Path | None = None
    thinking: Thinking = "auto"
    base_model: str | None = None
    labels: Path | None = None
    device: str | None = None

    @property
    def first_out(self) -> Path:
        """The answers file of the first model. Those of the others are beside it (`answers_file.named_beside`)."""
        data = word_of(self.files[0]) if self.rows is None else "held_out"
        return self.out or Path("eval") / f"{word_of(self.models[0])}-{data}.jsonl"


def word_of(path: str) -> str:
    """Return the last names of a path as a part of a file name: `output/run/checkpoint-30` -> `run-checkpoint-30`."""
    parts = [part for part in Path(path).expanduser().absolute().parts if part != "/"]
    last = Path(parts[-1])
    name = last.stem if last.suffix in (".json", ".jsonl", ".csv", ".parquet", ".tar") else last.name
    if name.startswith("checkpoint-") and len(parts) > 1:
        name = f"{parts[-2]}-{name}"
    return re.sub(r"[^\w.-]+", "-", name)
