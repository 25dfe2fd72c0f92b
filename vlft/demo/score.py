"""What a model answers to rows, and how many of its answers are right to the last character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlft.chat import open_model, question_of
from vlft.config.flags import DataFlags
from vlft.demo.story import Story
from vlft.errors import DataError
from vlft.inputs import open_rows

LONGEST = 64  # tokens, three times the longest answer of a story


def answers(model: str | Path, file: str | Path, *, batch: int = 32) -> list[str]:
    """Greedy answers to the questions of a data file, as `vlft chat MODEL` gives them.

    Args:
        model: run folder, adapter, merged or base model.
        file: rows; their own answers are not shown to the model.
        batch: rows answered together.

    Raises:
        CheckpointError: the model cannot be loaded.
        DataError: a row cannot be read.
    """
    chat = open_model(model)
    rows = open_rows([str(file)], DataFlags(), chat.family)
    if rows.bad:
        raise DataError(rows.bad[0])
    return chat.answers([question_of(sample) for sample in rows.samples], max_new_tokens=LONGEST, batch=batch)


def right(rows: Sequence[Story], said: Sequence[str]) -> list[bool]:
    """Whether each answer is the row's own."""
    return [row.answer == text for row, text in zip(rows, said, strict=True)]
