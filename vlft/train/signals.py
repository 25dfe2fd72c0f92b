"""Word that a run has to stop: a scheduler's SIGTERM or SIGUSR1, or Ctrl-C. It ends at once before it trains, and after
the step once it does.
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

NOTICES = (signal.SIGTERM, signal.SIGUSR1)
CTRL_C = "Ctrl-C"
RESUME = "Run the same command again to resume."


class Notice:
    """A context in which a signal ends what runs with `Preempted`, and, after `postpone`, only becomes `name`.

    A second Ctrl-C ends the process at once, wherever it is (`vlft.interrupts`).

    Args:
        speaks: this process prints what the user is to know; of a run, rank 0.

    Attributes:
        name: of the signal that came, in words.
        kept: says what there is to resume from, and how.
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
            self._before[number] = signal.signal(number, self._came)
        first = Taker(act=lambda: self._told(CTRL_C), first=self._first_words, second=self._last_words)
        self._undo.enter_context(taking(first))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._undo.close()
        for number, handler in self._before.items():
            # A process on its way out is told again by some launchers, and would end with another status.
            signal.signal(number, handler if self.name is None else signal.SIG_IGN)
        if error is not None and self.name is not None and not self._postponed:
            # It may have come up in the middle of an import, of which a library made an error of its own.
            raise self._nothing_to_save() from error

    def postpone(self) -> None:
        """From here on there is something to save first.

        Raises:
            Preempted: a signal came before, in a place from where Python lets no exception out.
        """
        if self.name is not None:
            raise self._nothing_to_save()
        self._postponed = True

    @contextlib.contextmanager
    def planning(self, plan: str) -> Iterator[None]:
        """What a signal brings about while the block runs, as the user is told at once."""
        before, self._plan = self._plan, plan
        try:
            yield
        finally:
            self._plan = before

    def _nothing_to_save(self) -> Preempted:
        stop = stopped(str(self.name), f"before the first step, so there is nothing to save. {self.kept()}")
        stop.said = not self._speaks
        return stop

    def _came(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.name is None and self._postponed and self._speaks:
            # print() is not safe here: the handler may have interrupted one
            os.write(2, f"{name}: {self._plan}\n".encode())
        self._told(name)

    def _told(self, name: str) -> None:
        if self.name is not None or os.getpid() != self._process:
            return
        self.name = name
        if not self._postponed:
            raise self._nothing_to_save()

    def _first_words(self) -> str:
        say = self._speaks and self._postponed
        return f"{CTRL_C}: {self._plan} ({CTRL_C} again: stop now without saving)" if say else ""

    def _last_words(self) -> str:
        return f"stopped at once ({CTRL_C} twice). {self.kept()}" if self._speaks else ""


def stopped(name: str, where: str) -> Preempted:
    """How a run ends that was told to stop by the signal of this name."""
    return (Interrupted if name == CTRL_C else Preempted)(f"{name} {where}")
