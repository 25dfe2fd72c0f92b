"""What processes of a run tell each other: results of rank 0, values of every rank, and who cannot go on.

It goes through a group of its own over CPUs (gloo), beside the one that carries gradients: no GPU has to be waited for,
and it waits for as long as it takes. The watchdog is there for what never comes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from vlft.errors import VlftError

T = TypeVar("T")
LONG = timedelta(days=30)
#: gloo's words.
_HUNG_UP = re.compile(r"Connection (closed|reset) by (peer|remote)|Broken pipe")


class PeerLost(VlftError):
    """Another process of this run has ended."""


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
    _together(lambda: dist.broadcast_object_list(box, src=0, group=_group()))
    result, refused = box[0]
    if refused is not None:
        _raise_everywhere(refused)
    return result


def gather(value: T, *, failed: VlftError | None = None) -> list[T]:
    """Every rank's value, on every rank, in rank order.

    Args:
        failed: why this rank cannot go on: then it is raised on every rank, and none is left waiting.
    """
    if not _several():
        if failed is not None:
            raise failed
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    _together(lambda: dist.all_gather_object(found, (value, failed), group=_group()))
    if (first := next((error for _, error in found if error is not None), None)) is not None:
        _raise_everywhere(first)
    return [value for value, _ in found]


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


@functools.cache
def _group() -> Any:
    return dist.new_group(backend="gloo", timeout=LONG)


def peer_lost(error: BaseException) -> PeerLost | None:
    """What `error` comes to where the cause is in another process; None where it is something else."""
    if not _several():
        return None
    lost = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
    if not lost and not _HUNG_UP.search(str(error)):
        return None
    return PeerLost(
        f"another process of this run has ended ({str(error).splitlines()[0]}). Its own message says why; where there "
        "is none, it was killed from outside (dmesg says so where memory ran out)."
    )


def _together(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise peer_lost(error) or error from error


def _raise_everywhere(error: VlftError) -> NoReturn:
    """Raise what every rank raises, of which only rank 0 speaks."""
    error.said = dist.get_rank() != 0
    raise error


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
