"""Signals that stop a run: a scheduler's SIGTERM or SIGUSR1, or Ctrl-C.

Before training starts, a signal ends the run at once. During training the run finishes its step and saves first
(`vlft.train.callbacks.MakeRoom`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from vlft.errors import Interrupted, Preempted
from vlft.interrupts import Taker, taking
from vlft.screen import line_start

NOTICES = (signal.SIGTERM, signal.SIGUSR1)
CTRL_C = "Ctrl-C"
RESUME = "Run the same command again to resume."


class Notice:
    """A context in which a signal raises `Preempted`. After `postpone` a signal only sets `name`.

    A second Ctrl-C ends the process at once, wherever it is (`vlft.interrupts`).

    Args:
        speaks: whether this process prints messages for the user; in a run, rank 0 does.

    Attributes:
        name: of the signal that was received; None before.
        kept: returns a sentence on what the run can resume from, and how.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.name: str | None = None
        self.kept: Callable[[], str] = lambda: "Run the same command again."
        self._plan = "stopping after this step, then saving"
        self._speaks = speaks
        self._postponed = False
        self._before: dict[int, Any] = {}
        self._undo = contextlib.ExitStack()
        self._process = os.getpid()

    def __enter__(self) -> Notice:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread only
        for number in NOTICES:
            self._before[number] = signal.signal(number, self._on_signal)
        first = Taker(act=lambda: self._received(CTRL_C), first=self._first_message, second=self._second_message)
        self._undo.enter_context(taking(first))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._undo.close()
        for number, handler in self._before.items():
            # Some launchers signal a process again while it ends, which would change its exit status.
            signal.signal(number, handler if self.name is None else signal.SIG_IGN)
        if error is not None and self.name is not None and not self._postponed:
            # A library may have turned our exception into its own, for example during an import.
            raise self._nothing_to_save() from error

    def postpone(self) -> None:
        """From now on a signal only sets `name`: there is something to save first.

        Raises:
            Preempted: a signal was received before, where Python discards exceptions (for example in a destructor).
        """
        if self.name is not None:
            raise self._nothing_to_save()
        self._postponed = True

    @contextlib.contextmanager
    def planning(self, plan: str) -> Iterator[None]:
        """Within the block, a signal prints this plan at once.

        Args:
            plan: what the run does after a signal, for the user.
        """
        before, self._plan = self._plan, plan
        try:
            yield
        finally:
            self._plan = before

    def _nothing_to_save(self) -> Preempted:
        stop = stopped(str(self.name), f"before the first step, so there is nothing to save. {self.kept()}")
        stop.said = not self._speaks
        return stop

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.name is None and self._postponed and self._speaks:
            # print() is not safe here: the handler may have interrupted another print().
            os.write(2, f"{line_start()}{name}: {self._plan}\n".encode())
        self._received(name)

    def _received(self, name: str) -> None:
        if self.name is not None or os.getpid() != self._process:
            return
        self.name = name
        if not self._postponed:
            raise self._nothing_to_save()

    def _first_message(self) -> str:
        say = self._speaks and self._postponed
        return f"{CTRL_C}: {self._plan} ({CTRL_C} again: stop now without saving)" if say else ""

    def _second_message(self) -> str:
        return f"stopped at once ({CTRL_C} twice). {self.kept()}" if self._speaks else ""


def stopped(name: str, where: str) -> Preempted:
    """The exception that ends a run which received a signal.

    Args:
        name: of the signal.
        where: the rest of the message: after which step, and how to resume.
    """
    return (Interrupted if name == CTRL_C else Preempted)(f"{name} {where}")
