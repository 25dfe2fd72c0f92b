"""What a run prints about its rows before the first step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlft.setup import SHOWN_BAD_ROWS, MeasuredRows, samples_line
from vlft.text import counted

SHARED = "the answers of a row share its prompt, whose tokens and pictures are computed once"
COPIED = (
    "each answer has a copy of its prompt, because gated delta nets cannot share one; the pictures are computed once"
)


def row_lines(
    measured: MeasuredRows, *, word: str = "train", shared: bool | None = None, asked: str = ""
) -> Iterator[str]:
    """Yield the lines about the rows of a run: how many of each file are used, skipped and changed, and their tokens.

    Args:
        measured: the rows.
        word: what is done with them.
        asked: the flags that hold these rows out of the training data; "" for rows of their own files.
        shared: whether the answers of a preference row share the tokens of its prompt; None: for other rows.
    """
    rows, costs = measured.rows, measured.costs
    for note in measured.notes:
        yield f"note: {note}"
    tokens = np.sort(costs.tokens)
    changed: dict[str, list[str]] = {}
    for sample, change in measured.changed:
        changed.setdefault(sample.file, []).append(change)
    for file, count in rows.counts.items():
        skipped = [row for row in rows.bad if row.file == file]
        held = measured.held_out.get(file, 0)
        taken = f"{count - len(skipped) - held:,} to {word}"
        yield (
            f"{file}: {counted(count, 'row')} held out to {word} ({asked})"
            if asked
            else f"{file}: {count:,} rows, {taken}"
            + (f", {held:,} held out" if held else "")
            + (f", {len(skipped)} skipped" if skipped else "")
        )
        if (drawn := measured.drawn.get(file)) is not None:
            yield f"  --data_mix: {drawn.draws:,} draws an epoch, from {drawn.rows:,} of them"
        changes = changed.get(file, [])
        if changes:
            shrunk = sum(change.startswith("shrunk") for change in changes)
            what = f"{shrunk:,} shrunk" if shrunk else f"{len(changes):,} lost media"
            yield f'  {what} to fit (--over_length); see "changed" in vlft.json or the warnings of vlft check-data'
        for row in skipped[:SHOWN_BAD_ROWS]:
            yield f"  skipped {row}"
        if len(skipped) > SHOWN_BAD_ROWS:
            yield f"  and {len(skipped) - SHOWN_BAD_ROWS} more, all in vlft.json"
    if measured.split:
        yield samples_line(measured)
    one = "sample" if measured.split else "row"
    if all(measured.thought.get(name) for name in ("on", "off")):
        on, off = counted(measured.thought["on"], one), f"{measured.thought['off']:,}"
        yield f"thoughts: {on} with <think>...</think> in the answer, {off} without (--thinking)"
    if shared is not None:
        yield f"answers: {SHARED if shared else COPIED}"
    trained = int(costs.supervised.sum())
    what = f"in total ({trained:,} trained)" if trained else "in total, of prompts"
    yield (
        f"tokens: {tokens.sum():,} {what}; a {one} has {tokens[0]:,} to "
        f"{tokens[-1]:,}, median {tokens[len(tokens) // 2]:,}"
    )
