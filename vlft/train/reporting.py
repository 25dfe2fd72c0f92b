"""Rewrite the page about a run while it trains: seldom, and a failure never ends the run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

EVERY = 60.0  # least seconds between pages
SHARE = 0.01  # largest share of the run's time


class Reporter(TrainerCallback):
    """A context around a run. Its end writes the last page, also if the run fails.

    Args:
        write: writes the page of a run folder, with `ended=True` for the last one; None on ranks that do not write, or
            if no page is wanted.
        path: the run folder.
    """

    def __init__(self, write: Callable[..., object] | None, path: Path) -> None:
        self.write = write
        self.path = path
        self._due = 0.0
        self._exclude: Callable[[float], None] = lambda seconds: None

    def watch(self, trainer: Any) -> None:
        """Write pages after log lines, evaluations and checkpoints of this trainer."""
        if self.write is not None:
            trainer.add_callback(self)
            self._exclude = lambda seconds: trainer.meter.exclude(seconds, "report")

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._exclude = lambda seconds: None
        self._page(ended=True)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self._due:
            self._page()

    on_evaluate = on_log
    on_save = on_log

    def _page(self, *, ended: bool = False) -> None:
        if self.write is None:
            return
        start = time.monotonic()
        try:
            self.write(self.path, ended=ended)
        except Exception as error:  # noqa: BLE001 - no error of a page may end the run
            self.write = None
            print(
                f"note: {self.path}/report.html cannot be written and is not tried again ({error!r})", file=sys.stderr
            )
        seconds = time.monotonic() - start
        self._exclude(seconds)
        self._due = start + max(EVERY, seconds / SHARE)
