"""Ask models about rows: open their settings, then load them one after another. The only part that needs torch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from vlft.answering import Answer, answers_by_place
from vlft.answering.opened import Opened, enough_memory, open_settings
from vlft.config.row_flags import BoxFormat
from vlft.config.thinking import CLOSE, OPEN, Thinking
from vlft.evaluation.rows import Asked
from vlft.evaluation.sources import ModelSource
from vlft.model.generate import Sampling
from vlft.screen import count, stage

__all__ = ["Opened", "ask", "opened"]


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
) -> Iterator[tuple[int, str, bool]]:
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

    Yields:
        the place of a row in `rows`, the answer, and whether it reached the limit of tokens.

    Raises:
        CheckpointError: weights are missing or unexpected.
        ConfigError: there is not enough memory, or a row is too long.
        DataError: a picture or video cannot be decoded.
    """
    stage(f"loading {name}")
    loaded = model.load(device)
    for note in (*model.notes, *loaded.notes):
        say(f"note: {name}: {note}.")
    say(f"{loaded.name}: {len(rows):,} rows to answer")
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    here = loaded.speaker.model.device

    def smaller(size: int) -> None:
        say(f"note: {here} has too little memory for the batch; {size} rows are answered together from now on.")

    found = answers_by_place(
        [row.question for row in rows],
        model.encoder,
        loaded.speaker,
        Sampling(max_new_tokens=max_new_tokens),
        order=order,
        batch=batch,
        limit=model.limit,
        smaller=smaller,
    )
    try:
        with enough_memory(here):
            for place, answer in count(found, total=len(rows), what="answering rows"):
                yield place, _whole(answer), answer.cut
    finally:
        found.close()
        del loaded, found
        _free()


def _whole(answer: Answer) -> str:
    """Return the text of an answer. One that ends inside a thought that the prompt began gets its beginning."""
    return f"{OPEN}\n{answer.text}" if answer.thinking and CLOSE not in answer.text else answer.text


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
