"""Faults and signals in the middle of a step, for the trainer's hook `VlftTrainer.before_loss`.

In other processes by `launch.vlft(during=[partial(kill, 2)])`, in this one by `before_each_loss(monkeypatch, act)`.
Each takes first what the test gives, then the trainer and the micro-batch. Steps count from 1.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def before_each_loss(patch: Any, *acts: Callable[[Any, Any], object]) -> None:
    """Call these with the trainer and the micro-batch before each loss of training, after the existing calls.

    Args:
        patch: pytest's monkeypatch.
        acts: the functions to call.
    """
    from vlft.train.trainer import VlftTrainer

    patch.setattr(VlftTrainer, "before_loss", (*VlftTrainer.before_loss, *acts))


def _step(trainer: Any) -> int:
    return trainer.state.global_step + 1


def count_rows(trainer: Any, batch: Any) -> None:
    """Print a line "ROWS 2 3 5": the step, and the indices of the micro-batch's rows."""
    print("ROWS", _step(trainer), *(index for _, index in batch["rows"]), flush=True)


def kill(step: int, rank: int | None, trainer: Any, batch: Any) -> None:
    """SIGKILL to one rank, or to all."""
    if _step(trainer) == step and rank in (None, trainer.args.process_index):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_beside_full_pipes(step: int, trainer: Any, batch: Any) -> None:
    """SIGKILL while loader processes wait to hand over batches; a line "WORKERS 7 8" names them."""
    if _step(trainer) == step:
        time.sleep(3)
        print("WORKERS", *(worker.pid for worker in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def notify(step: int, number: int, rank: int, trainer: Any, batch: Any) -> None:
    """A signal to one rank and its loader processes, once."""
    if _step(trainer) == step and trainer.args.process_index == rank and not hasattr(trainer, "notified"):
        trainer.notified = True
        # From another process, like a scheduler's: a worker ends if its own trainer sends it SIGTERM.
        everyone = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
        subprocess.run(["kill", f"-{int(number)}", *map(str, everyone)], check=True)


def press(step: int, times: int, trainer: Any, batch: Any) -> None:
    """Ctrl-C, a number of times: to this process and its loader processes, from another process."""
    if _step(trainer) == step:
        for _ in range(times):
            everyone = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            subprocess.run(["kill", "-INT", *map(str, everyone)], check=True)
            time.sleep(0.3)


def fail(step: int, trainer: Any, batch: Any) -> None:
    """An error in our code."""
    if _step(trainer) == step:
        raise ZeroDivisionError("planted")


def remove(step: int, path: str, trainer: Any, batch: Any) -> None:
    """A file is deleted."""
    if _step(trainer) == step:
        Path(path).unlink(missing_ok=True)


def limit_files(step: int, size: int, trainer: Any, batch: Any) -> None:
    """No file may grow beyond this number of bytes: writing more is an error, as on a full disk."""
    if _step(trainer) == step:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def stall(step: int, rank: int, trainer: Any, batch: Any) -> None:
    """One rank waits forever."""
    if _step(trainer) == step and trainer.args.process_index == rank:
        time.sleep(10_000)


def poison(step: int, rank: int, trainer: Any, batch: Any) -> None:
    """A weight of one rank becomes NaN, and with it the loss."""
    if _step(trainer) == step and trainer.args.process_index == rank:
        trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight.data.fill_(float("nan"))
