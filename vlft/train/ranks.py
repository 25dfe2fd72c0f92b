"""Work that one process does for all: run it on rank 0, hand the result (or the user's error) to every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from vlft.errors import VlftError

T = TypeVar("T")


def on_rank_zero(work: Callable[[], T]) -> T:
    """The result of `work` as rank 0 computed it, on every rank. A `VlftError` is raised on every rank.

    Without it, ranks would look at one folder while rank 0 writes it, and disagree.
    """
    if not _several():
        return work()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [(work(), None)]
        except VlftError as error:
            box = [(None, error)]
    dist.broadcast_object_list(box, src=0)
    result, refused = box[0]
    if refused is not None:
        raise refused
    return result


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank, in rank order."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    if _several():
        dist.barrier()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
