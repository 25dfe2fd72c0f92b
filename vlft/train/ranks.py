"""Messages between the processes of a run: results of rank 0, values of every rank, and a rank that cannot continue.

They use their own process group over CPUs (gloo), apart from the group that carries gradients, so no one waits for a
GPU. The group has practically no timeout: `vlft.train.watchdog` ends a run that waits too long.
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
#: gloo's texts for a connection that another process closed.
_HUNG_UP = re.compile(r"Connection (closed|reset) by (peer|remote)|Broken pipe")


class PeerLost(VlftError):
    """Another process of this run has ended."""


def on_rank_zero(work: Callable[[], T]) -> T:
    """The result of `work` as rank 0 computed it, on every rank. A `VlftError` is raised on every rank.

    Use it to read a folder that rank 0 writes: ranks that each read it themselves may see different contents.
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
        value: of this rank.
        failed: why this rank cannot continue. It is raised on every rank, so that none is left waiting.
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
    """The `PeerLost` for an error whose cause is in another process; None if `error` is something else."""
    if not _several():
        return None
    lost = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
    if not lost and not _HUNG_UP.search(str(error)):
        return None
    return PeerLost(
        f"another process of this run has ended ({str(error).splitlines()[0]}). Its own message says why. If there "
        "is none, it was killed from outside (dmesg shows it if memory ran out)."
    )


def _together(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise peer_lost(error) or error from error


def _raise_everywhere(error: VlftError) -> NoReturn:
    """Raise an error that every rank raises; only rank 0 prints it."""
    error.said = dist.get_rank() != 0
    raise error


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
