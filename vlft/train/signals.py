"""A scheduler's notice that this job has to go: SIGTERM and SIGUSR1 end it at once, or after a step once it trains."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from vlft.errors import Preempted

NOTICES = (signal.SIGTERM, signal.SIGUSR1)


class Notice:
    """A context in which a signal ends what runs with `Preempted`, and, after `postpone`, only becomes `name`.

    Args:
        speaks: this process prints what the user is to know; of a run, rank 0.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.name: str | None = None
        self._speaks = speaks
        self._postponed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Notice:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread only
        for number in NOTICES:
            self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # A process on its way out is told again by some launchers, and would end with another status.
            signal.signal(number, handler if self.name is None else signal.SIG_IGN)

    def postpone(self) -> None:
        """From here on there is something to save first.

        Raises:
            Preempted: a signal came before, in a place from where Python lets no exception out.
        """
        self._postponed = True
        if self.name is not None:
            self.end()

    def end(self) -> NoReturn:
        """End what runs, of which nothing has to be saved."""
        stop = Preempted(f"{self.name} before the first step, so there is nothing to save. The same command goes on.")
        stop.said = not self._speaks
        raise stop

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            return
        self.name = signal.Signals(number).name
        if not self._postponed:
            self.end()
        # print() is not safe here: the handler may have interrupted one
        os.write(2, f"{self.name}: this step is finished, then saved\n".encode())
