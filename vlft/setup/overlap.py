"""Find rows, pictures and videos that are in both the training and the evaluation data.

Evaluation on rows that were trained says nothing about new rows, so `train`, `plan` and `check-data` warn of it. Only
digests are compared (`vlft.data.identity`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlft.data.identity import Marked
from vlft.text import counted


def overlap(training: Marked | None, evaluation: Marked | None) -> tuple[str, ...]:
    """Say how many evaluation rows are also trained, and how many share a picture or video with a trained row.

    Args:
        training: the rows that are trained; None: there is nothing to compare.
        evaluation: the rows that are evaluated.

    Returns:
        at most one remark for each of the two, with one pair of rows as an example.
    """
    if training is None or evaluation is None:
        return ()
    return tuple(_remarks(training, evaluation))


def _remarks(training: Marked, evaluation: Marked) -> Iterator[str]:
    total = len(evaluation.rows)
    same_R = _among(evaluation.rows, training.rows)
    if rows := int(same_R.sum()):
        other = int(same_R.argmax())
        one = int((training.rows == evaluation.rows[other]).argmax())
        yield (
            f"{rows:,} of {counted(total, 'evaluation row')} {'is' if rows == 1 else 'are'} also trained, so their "
            f"evaluation says nothing about new rows: {training.name_of(one)} and {evaluation.name_of(other)} are the "
            "same row"
        )
    shared_F = _among(evaluation.files, training.files)
    owners_F = np.searchsorted(evaluation.ends, np.arange(len(shared_F)), side="right")
    shared_F &= ~same_R[owners_F]
    if rows := len(np.unique(owners_F[shared_F])):
        file = int(shared_F.argmax())
        one = training.row_of(int((training.files == evaluation.files[file]).argmax()))
        other = int(owners_F[file])
        more = "more " if same_R.any() else ""
        yield (
            f"{rows:,} {more}of {counted(total, 'evaluation row')} {'shares' if rows == 1 else 'share'} pictures or "
            f"videos with trained rows: {training.name_of(one)} and {evaluation.name_of(other)} share "
            f"{evaluation.shown_path(file)}. vlft check-data --split keeps such rows on one side"
        )


def _among(few: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Return for each of a few digests whether it is among many. Unlike `np.isin`, it does not sort the many."""
    known, place_of = np.unique(few, return_inverse=True)
    found = np.zeros(len(known), dtype=bool)
    if len(known):
        places = np.minimum(np.searchsorted(known, many), len(known) - 1)
        found[places[known[places] == many]] = True
    return found[place_of]
