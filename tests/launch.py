"""Run the real CLI in separate processes, forked from a server that has done the imports (13 s) once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mishaps

# Python 3.11's fork server has only the environment's path, and silently skips what it cannot import.
_HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*filter(None, [os.environ.get("PYTHONPATH")]), str(_HERE), str(_HERE.parent)]
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["launch_preload"])


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One process: its exit status (negative: the signal that ended it) and what it printed, both streams together.

    Attributes:
        lingered: seconds from its last output to its end.
    """

    status: int | None
    output: str
    lingered: float = 0.0


def vlft(
    argv: Sequence[str],
    *,
    world: int = 1,
    out: Path,
    env: dict[str, str] | None = None,
    kill_in_step: int | None = None,
    during: Sequence[Callable[..., None]] = (),
    while_running: Callable[[list], object] = lambda processes: None,
    inside: Callable[[], None] | None = None,
    exits: bool = False,
    timeout: float = 240,
) -> list[Finished]:
    """`vlft ARGV` in `world` processes that form one group, as torchrun would start them.

    Args:
        argv: what follows `vlft`.
        world: processes.
        out: folder for their output.
        env: more environment.
        kill_in_step: optimizer step (from 1) in which each process is killed.
        during: called in each process with the trainer and the micro-batch before each loss (see `mishaps`).
        while_running: called here, with the processes, once they are started.
        inside: a function of a test module that each process calls first, to change what it imported.
        exits: whether it ends like a user's process, which waits for its children and threads; else it ends at once.
        timeout: seconds until the processes are killed, which gives a negative status.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, logs = [], []
    for rank in range(world):
        several = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = out / f"rank{rank}.log"
        settings = (several if world > 1 else {}) | (env or {})
        acts = [*during, *([] if kill_in_step is None else [functools.partial(mishaps.kill, kill_in_step, None)])]
        process = _CONTEXT.Process(target=_main, args=(list(argv), settings, str(log), acts, inside, exits))
        process.start()
        processes.append(process)
        logs.append(log)
    while_running(processes)
    ends = []
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        ends.append(time.time())
    return [
        Finished(
            status=process.exitcode,
            output=log.read_text(encoding="utf-8", errors="replace"),
            lingered=end - log.stat().st_mtime,
        )
        for process, log, end in zip(processes, logs, ends, strict=True)
    ]


def call(work: Callable[[list[str]], None], words: list[str], *, log: Path, timeout: float) -> Finished:
    """Run `work(words)`, a function of a test module, in a separate process; its output goes to `log`."""
    process = _CONTEXT.Process(target=_call, args=(work, words, str(log)))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return Finished(status=process.exitcode, output=log.read_text(encoding="utf-8", errors="replace"))


def _print_into(log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _call(work: Callable[[list[str]], None], words: list[str], log: str) -> None:
    _print_into(log)
    try:
        work(words)
        status = 0
    except BaseException:  # noqa: BLE001 - the test must see every exception
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _main(
    argv: list[str],
    env: dict[str, str],
    log: str,
    acts: list[Callable[..., None]],
    inside: Callable[[], None] | None,
    exits: bool,
) -> None:
    _print_into(log)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    # As in a user's process. The inherited method is the fork server, which would start one more and survive a kill.
    multiprocessing.set_start_method("fork", force=True)
    from vlft.cli.main import main

    if acts:
        from vlft.train.trainer import VlftTrainer

        VlftTrainer.before_loss = tuple(acts)
    if inside is not None:
        inside()
    try:
        status = main(argv)
    except BaseException:  # noqa: BLE001 - the test must see every exception
        traceback.print_exc()
        status = 99
    if exits:
        sys.exit(status)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
