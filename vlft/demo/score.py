"""Score a model's answers to rows: the share that is right to the last character.

For a model you trained on the demo's rows:

    python -m vlft.demo.score MODEL demo-out/data/held_out.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vlft.chat import open_model, question_of
from vlft.config.flags import DataFlags
from vlft.demo.story import Story
from vlft.setup import open_rows

LONGEST = 64  # tokens, three times the longest answer of a story


def answers(model: str | Path, file: str | Path, *, batch: int = 32) -> list[str]:
    """Greedy answers to the questions of a data file, the same as those of `vlft chat MODEL`.

    Args:
        model: run folder, adapter, merged or base model.
        file: of rows; the model does not see their own answers.
        batch: number of rows answered together.

    Raises:
        CheckpointError: the model cannot be loaded.
        DataError: a row cannot be read.
    """
    chat = open_model(model, device="cpu")  # as in training, so that answers are the same on every machine
    rows = open_rows([str(file)], DataFlags(), chat.family)
    return chat.answers([question_of(sample) for sample in rows], max_new_tokens=LONGEST, batch=batch)


def right(rows: Sequence[Story], said: Sequence[str]) -> list[bool]:
    """Whether each answer equals the row's own."""
    return [row.answer == text for row, text in zip(rows, said, strict=True)]


def shares(model: str | Path, file: str | Path) -> dict[str, tuple[int, float]]:
    """Kind of row -> the number of such rows in a data file, and the share that is answered exactly.

    Args:
        model: run folder, adapter, merged or base model.
        file: of the demo's rows.

    Raises:
        CheckpointError: the model cannot be loaded.
        DataError: a row cannot be read.
    """
    records = json.loads(Path(file).read_text(encoding="utf-8"))
    kinds: dict[str, list[bool]] = {}
    for record, said in zip(records, answers(model, file), strict=True):
        kind = "videos" if "video" in record else "stories"
        kinds.setdefault(kind, []).append(record["conversations"][-1]["value"] == said)
    return {kind: (len(hits), sum(hits) / len(hits)) for kind, hits in kinds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="run folder, adapter, merged or base model")
    parser.add_argument("file", help="rows of the demo")
    flags = parser.parse_args()

    from transformers.utils import logging

    logging.disable_progress_bar()
    for kind, (rows, share) in shares(flags.model, flags.file).items():
        print(f"{kind:<8} {share:.1%} of {rows}")
