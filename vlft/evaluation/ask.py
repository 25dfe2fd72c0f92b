"""Ask models about rows: open their settings, then load them one after another. The only part that needs torch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vlft.answering import Answer, answers_by_place
from vlft.answering.opened import Loaded, Opened, enough_memory, open_settings
from vlft.config.row_flags import BoxFormat
from vlft.config.thinking import CLOSE, OPEN, Thinking
from vlft.errors import BadRow
from vlft.evaluation.sources import ModelSource
from vlft.model.generate import Sampling
from vlft.scoring import label_scores_by_place
from vlft.screen import count, stage
from vlft.setup.asked import Asked

__all__ = ["Opened", "Said", "ask", "opened", "score"]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model said to a row.

    Attributes:
        place: of the row among those that were asked.
        text: the whole answer, with thoughts; of scored labels the most likely one.
        cut: whether the answer reached the limit of tokens.
        scores: label -> log-probability; empty for a generated answer.
    """

    place: int
    text: str
    cut: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)


def opened(source: ModelSource, *, thinking: Thinking, box_format: BoxFormat | None) -> Opened:
    """Open the settings of a model. Raises the errors of `open_settings`."""
    stage(f"opening {source.name}")
    return open_settings(source.name, base_model=source.base_model, thinking=thinking, box_format=box_format)


def ask(
    model: Opened,
    name: str,
    rows: Sequence[Asked],
    lengths: Sequence[int],
    *,
    batch: int,
    max_new_tokens: int,
    device: str | None,
    say: Callable[[str], None],
    refuse: Callable[[BadRow], None] | None = None,
) -> Iterator[Said]:
    """Load a model and ask it about rows, greedily, the longest rows first. Its memory is freed at the end.

    Args:
        model: its settings.
        name: for messages.
        rows: what is asked.
        lengths: tokens of each row.
        batch: most rows that are asked together.
        max_new_tokens: most tokens of an answer.
        device: where to run the model; None: the GPU if there is one.
        say: prints a line for the user.
        refuse: called with each row whose media cannot be decoded, which then has no answer; None: that is an error.

    Yields:
        the answer to each row.

    Raises:
        CheckpointError: weights are missing or unexpected.
        ConfigError: there is not enough memory, or a row is too long.
        DataError: a picture or video cannot be decoded.
    """
    loaded = _loaded(model, name, len(rows), device, say)
    here = loaded.speaker.model.device

    found = answers_by_place(
        [row.question for row in rows],
        model.encoder,
        loaded.speaker,
        Sampling(max_new_tokens=max_new_tokens),
        order=_longest_first(lengths),
        batch=batch,
        limit=model.limit,
        **_faults(here, say, refuse),
    )
    try:
        with enough_memory(here):
            for place, answer in count(found, total=len(rows), what="answering rows"):
                yield Said(place=place, text=_whole(answer), cut=answer.cut)
    finally:
        found.close()
        del loaded, found
        _free()


def score(
    model: Opened,
    name: str,
    rows: Sequence[Asked],
    lengths: Sequence[int],
    labels: Sequence[str],
    *,
    batch: int,
    device: str | None,
    say: Callable[[str], None],
    refuse: Callable[[BadRow], None] | None = None,
) -> Iterator[Said]:
    """Load a model and score labels as answers to rows, the longest rows first. Its memory is freed at the end.

    Args and errors are those of `ask`; `labels` are the answers to score.

    Yields:
        the most likely label of each row, of equally likely ones the first, with the scores of all.
    """
    loaded = _loaded(model, name, len(rows), device, say)
    here = loaded.speaker.model.device
    found = label_scores_by_place(
        [row.question for row in rows],
        labels,
        model.encoder,
        loaded.speaker,
        order=_longest_first(lengths),
        batch=batch,
        limit=model.limit,
        **_faults(here, say, refuse),
    )
    try:
        with enough_memory(here):
            for place, scores in count(found, total=len(rows), what="scoring labels"):
                yield Said(place=place, text=max(scores, key=scores.__getitem__), scores=scores)
    finally:
        found.close()
        del loaded, found
        _free()


def _faults(here: torch.device, say: Callable[[str], None], refuse: Callable[[BadRow], None] | None) -> dict[str, Any]:
    """What to do about too large a batch and about a row that cannot be encoded, as `in_batches` takes it."""

    def smaller(size: int) -> None:
        rows = "1 row is" if size == 1 else f"{size} rows are"
        say(f"note: {here} has too little memory for the batch; {rows} answered together from now on.")

    return {"smaller": smaller, "refuse": None if refuse is None else lambda place, error: refuse(error.row)}


def _loaded(model: Opened, name: str, rows: int, device: str | None, say: Callable[[str], None]) -> Loaded:
    stage(f"loading {name}")
    loaded = model.load(device)
    for note in (*model.notes, *loaded.notes):
        say(f"note: {name}: {note}.")
    say(f"{loaded.name}: {rows:,} rows to answer")
    return loaded


def _longest_first(lengths: Sequence[int]) -> list[int]:
    order: list[int] = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return order


def _whole(answer: Answer) -> str:
    """Return the text of an answer. One that ends inside a thought that the prompt began gets its beginning."""
    return f"{OPEN}\n{answer.text}" if answer.thinking and CLOSE not in answer.text else answer.text


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
