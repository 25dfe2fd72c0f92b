"""Worker processes that load rows: how they start, and which process may end them.

A scheduler's notice (`train.signals`) or a terminal's Ctrl-C reaches every process of a job. Only the trainer acts on
it: it finishes its step and saves, and needs its workers for that. So a worker ends only when its trainer tells it to,
or when the trainer is gone.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
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

from vlft.data import pixel_memory

PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST, KEPT = 32 << 20, 64 << 20  # bytes: largest piece of memory that is used again (glibc's limit), and all of it
PATIENCE = 1.0  # seconds that all workers together have to end when told to

_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def loader_options(workers: int, *, pin_memory: bool = False) -> dict[str, Any]:
    """Return the options of every DataLoader in vlft: `workers` processes that stay alive between epochs."""
    import torch

    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": pin_memory and torch.cuda.is_available(),
        "worker_init_fn": _isolate if workers else None,
        "multiprocessing_context": _recording() if workers else None,
    }


@contextlib.contextmanager
def workers_end_with_errors() -> Iterator[None]:
    """End the workers that were started in this block at once if an error, Ctrl-C or a closed generator leaves it.

    torch also ends them, as soon as nothing refers to their loader, but gives each of them 5 s to finish, one after the
    other.
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
    """Return multiprocessing's context, changed to record each process that is started through it."""
    context: Any = copy.copy(multiprocessing.get_context())

    def process(*args: Any, **options: Any) -> BaseProcess:
        started = type(context).Process(*args, **options)
        _started.add(started)
        return started

    context.Process = process
    return context


def _isolate(worker: int) -> None:
    """Make this process ignore signals from all processes except its trainer. Runs first in each worker.

    torch's own check for a trainer that is gone is not enough: a worker waits forever for its last batch to be taken,
    because it holds the other end of that pipe itself (torch 2.11 and 2.15).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    pixel_memory.share()
    _keep_memory()
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)  # the trainer's
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # torch and multiprocessing end a worker with SIGTERM. A handler does not learn who sent it, but `sigwaitinfo` does.
    # Where it is not available (macOS), torch's own handler stays, and SIGTERM from any process ends the worker.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        trainer = multiprocessing.parent_process()  # the parent of the process is the fork server, where there is one
        if trainer is not None:
            threading.Thread(target=_end_when_told, args=(trainer.pid,), name="vlft-end", daemon=True).start()


def _keep_memory() -> None:
    """Keep freed memory for the next row, and leave out the trainer's objects when garbage is searched for.

    glibc returns freed memory above 128 kB to the kernel, which then clears the same pages again for each picture. And
    each full collection visits all objects that were made before the fork: torch and transformers have 0.5 million.
    """
    gc.freeze()
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def _end_when_told(trainer: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)  # as torch's own handler does: this is not a failure
