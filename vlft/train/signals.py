"""A scheduler's notice that this job has to go: SIGTERM and SIGUSR1 are taken down, and acted on after the step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

NOTICES = (signal.SIGTERM, signal.SIGUSR1)


class Notice:
    """A context in which `name` becomes the signal that came, if one does."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Notice:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread only
        for number in NOTICES:
            self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            # print() is not safe here: the handler may have interrupted one
            os.write(2, f"{self.name}: this step is finished, then saved\n".encode())
