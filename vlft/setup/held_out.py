"""The rows that a run trains and the rows that it evaluates on: from two files, or held out of one (`--eval_split`).

`vlft.data.division` chooses the rows, `vlft.setup.rows` reads and measures them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from vlft.config.flags import DataFlags
from vlft.data.division import groups_of, split
from vlft.data.equal_files import by_content
from vlft.data.files.index import RowIndex
from vlft.data.identity import Marked
from vlft.errors import ConfigError
from vlft.setup.base import Base
from vlft.setup.rows import MeasuredRows, mixed, samples_of, trainable_rows, training_rows
from vlft.text import counted


def rows_of_run(data: DataFlags, base: Base, *, workers: int, seed: int) -> tuple[MeasuredRows, MeasuredRows | None]:
    """Return the rows that an epoch trains, and the rows to evaluate on; None without evaluation.

    With `--eval_split` the evaluation rows are held out before a mix draws its rows, so no epoch trains them.

    Args:
        data: the flags on data.
        base: the opened base.
        workers: number of processes that measure rows.
        seed: chooses the rows that are held out.

    Raises:
        ConfigError: the errors of `training_rows`, or the rows cannot be divided as `--eval_split` says.
    """
    if data.eval_split is None:
        training = training_rows(data, base, workers=workers)
        return training, trainable_rows(data.eval_path, data, base, workers=workers) if data.eval_path else None
    measured = trainable_rows(data.training_files, data, base, workers=workers)
    kept, held = hold_out(measured, data.eval_split, seed=seed)
    return (mixed(kept, data.training_sets) if data.data_mix is not None else kept), held


def hold_out(measured: MeasuredRows, size: float, *, seed: int) -> tuple[MeasuredRows, MeasuredRows]:
    """Divide rows into rows to train and rows to evaluate on.

    Args:
        measured: the rows, with their digests.
        size: of the evaluation rows: a share below 1, or a number of rows.
        seed: other seeds choose other rows.

    Raises:
        ConfigError: a side would have no row.
    """
    if measured.marked is None:
        raise ValueError("the rows have no digests")
    out_R, remark = held_out_rows(measured.marked, size, seed=seed)
    index: RowIndex = measured.rows.samples  # type: ignore[assignment]
    starts, total = measured.starts, len(index)
    sides = [samples_of(np.flatnonzero(side_R), starts, total) for side_R in (~out_R, out_R)]
    kept, held = (
        replace(measured, rows=replace(measured.rows, samples=index.take(some)), costs=measured.costs.take(some))
        for some in sides
    )
    files = [file.name for file in index.files]
    found = Counter(index.file_of[starts[out_R]].tolist())
    counts = {name: found[place] for place, name in enumerate(files) if found[place]}
    notes = (*measured.notes, *([remark] if remark else []))
    return (
        replace(kept, marked=None, held_out=counts, notes=notes),
        replace(held, marked=None, rows=replace(held.rows, bad=(), counts=counts), notes=()),
    )


def held_out_rows(marked: Marked, size: float, *, seed: int) -> tuple[np.ndarray, str]:
    """Choose the rows to hold out. Rows that share a picture, a video or, without media, a question stay together.

    Pictures are compared by their bytes, so that copies and hard links count as one. Only files that may be equal are
    read. The choice does not depend on the order of rows, or on the folders of data and media.

    Args:
        marked: the rows with their digests.
        size: a share below 1, or a number of rows.
        seed: other seeds choose other rows.

    Returns:
        whether each row is held out, bool [R], and a remark if their number is not the one that was asked for; or "".

    Raises:
        ConfigError: a side would have no row.
    """
    total = len(marked.rows)
    there, flag = counted(total, "row"), f"--eval_split {size:g}"
    if size >= total:
        raise ConfigError(f"{flag}: of {there} none would be left to train. Use fewer, or a share such as 0.1.")
    groups_R = groups_of(range(total), by_content(marked), marked.ends, marked.asked)
    names, sizes = np.unique(groups_R, return_counts=True)
    if len(names) < 2:
        raise ConfigError(
            f"{flag}: {there} cannot be divided, because all share a picture, a video or a question, and such rows "
            "stay together. Use more data, or name other rows with --eval_path."
        )
    share = size if size < 1 else size / total
    out_R = split(groups_R, marked.stable, [1 - share, share], seed=seed) == 1
    held, exact = int(out_R.sum()), size * total if size < 1 else size
    if abs(held - exact) < 1:
        return out_R, ""
    why = f"rows that share a picture, a video or a question stay together, up to {int(sizes.max()):,} of them"
    return out_R, f"{flag} cannot be met exactly. {held:,} of {there} ({held / total:.1%}) are held out: {why}"
