"""Compute something of many conversations in batches: smaller ones where memory does not suffice, without bad rows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch

from vlft.data.sample import Sample
from vlft.errors import DataError

T = TypeVar("T")


def in_batches(
    compute: Callable[[Sequence[int]], Sequence[tuple[int, T]]],
    questions: Sequence[Sample],
    *,
    order: Sequence[int],
    batch: int,
    smaller: Callable[[int], None],
    refuse: Callable[[int, DataError], None] | None,
) -> Generator[tuple[int, T], None, None]:
    """Compute results of conversations in any order.

    Args:
        compute: places in `questions` -> (place, result) of each, computed together.
        questions: the conversations.
        order: places in `questions`, each once. With the longest first, too large a batch fails at the start.
        batch: most conversations that are computed together.
        smaller: called with the new size of a batch, from now on, when the memory of a GPU did not suffice.
        refuse: called with the place of a conversation that cannot be encoded, which then gets no result, and the
            reason; None: the error is raised.

    Yields:
        the place of a conversation, and its result. Results that were computed together come one after another.

    Raises:
        DataError: a picture or video of a row cannot be read.
        torch.OutOfMemoryError: the memory does not suffice for one conversation.
    """
    done, order = 0, list(order)
    while done < len(order):
        places = order[done : done + batch]
        try:
            found = list(compute(places))
        except DataError as error:
            bad = [place for place in places if _is_of(error, questions[place])]
            if refuse is None or not bad:
                raise
            refuse(bad[0], error)
            order.remove(bad[0])
            continue
        except torch.OutOfMemoryError:
            if len(places) == 1:
                raise
            found = []  # the next attempt starts outside, where nothing refers to the tensors of this one
        if not found:
            torch.cuda.empty_cache()
            batch = len(places) // 2
            smaller(batch)
        yield from found
        done += len(found)


def _is_of(error: DataError, question: Sample) -> bool:
    return (error.row.file, error.row.index) == (question.file, question.index)
