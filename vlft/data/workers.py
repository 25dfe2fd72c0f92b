"""Processes that load rows: how they are started, and who may end them.

A scheduler's notice (`train.signals`) or a terminal's Ctrl-C reaches every process of a job. It is for the trainer to
act on, which finishes its step and saves, and needs its workers for that. So a worker ends when its trainer says so or
is gone, and at nobody else's word.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PATIENCE = 1.0  # seconds that workers have in all to end when told to

_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def loader_options(workers: int, *, pin_memory: bool = False) -> dict[str, Any]:
    """Options every DataLoader of ours takes: `workers` processes, kept alive between epochs."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": pin_memory and torch.cuda.is_available(),
        "worker_init_fn": _be_apart if workers else None,
        "multiprocessing_context": _recording() if workers else None,
    }


@contextlib.contextmanager
def workers_end_with_errors() -> Iterator[None]:
    """Where an error (or Ctrl-C, or the end of a generator) leaves the block, workers started within it end at once.

    torch ends them too, when nothing refers to their loader any more, but grants each of them 5 s to finish what it
    does, one after the other.
    """
    before = _alive()
    try:
        yield
    except BaseException:
        _end(_alive() - before)
        raise


def _alive() -> set[BaseProcess]:
    return {process for process in multiprocessing.active_children() if process in _started}


def _end(workers: set[BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))


def _recording() -> Any:
    """multiprocessing's context, with a note taken of each process that is started through it."""
    context: Any = copy.copy(multiprocessing.get_context())

    def process(*args: Any, **options: Any) -> BaseProcess:
        started = type(context).Process(*args, **options)
        _started.add(started)
        return started

    context.Process = process
    return context


def _be_apart(worker: int) -> None:
    """Make this process deaf to all but its trainer; runs first in each worker.

    torch's own watch over a trainer that is gone is not enough: a worker waits for its last batch to be taken, for
    ever, since it holds the other end of that pipe itself (torch 2.11 and 2.15).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)  # the trainer's
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM is how torch and multiprocessing end a worker. A handler is not told who sent it; who waits for it is.
    # Where that cannot be had (macOS), torch's own handler stays, which ends at anybody's.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), name="vlft-end", daemon=True).start()


def _end_when_told(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)  # as torch's own handler does: it is no failure
