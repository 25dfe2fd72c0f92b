"""Ctrl-C: the first one stops the running verb in an orderly way; a second one ends the process at once.

Python runs a signal handler in the main thread, between two bytecode instructions. A long call into C (a backward pass,
the write of a large file) would delay even the message that the signal arrived. So a thread reads the signals as they
arrive (`signal.set_wakeup_fd`). Verbs enter `Interrupts` in `cli.main`; training handles the first one with `taking`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from vlft.errors import Interrupted
from vlft.screen import line_start

#: Seconds in which a second signal counts as the first: the terminal signals all processes, and the launcher forwards
#: the signal to them as well.
TOGETHER = 0.2
SILENCE = 1.0  # seconds after a first Ctrl-C; if the verb has not ended by then, a line says why


@dataclass(frozen=True, kw_only=True)
class Taker:
    """A handler of the first Ctrl-C.

    Attributes:
        act: called in the main thread.
        first: returns the line to print at once at the first Ctrl-C; "" prints nothing.
        second: returns the line to print at once at the second Ctrl-C; "" prints nothing.
    """

    act: Callable[[], None]
    first: Callable[[], str]
    second: Callable[[], str]


class Interrupts:
    """A context in which the first Ctrl-C raises KeyboardInterrupt or calls the `Taker`; the second ends the process.

    A process that ignores Ctrl-C, such as one that a script starts in the background, keeps ignoring it. Outside the
    main thread, and inside another such context, the context has no effect.

    Args:
        end: ends the process.

    Attributes:
        raised: whether a Ctrl-C has raised KeyboardInterrupt.
        taker: handler of the first Ctrl-C, or None.
    """

    active: Interrupts | None = None

    def __init__(self, *, end: Callable[[], Any] = lambda: os._exit(Interrupted.exit_code)) -> None:
        self.raised = False
        self.taker: Taker | None = None
        self._end = end
        self._first: float | None = None
        self._told = True
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        in_main = threading.current_thread() is threading.main_thread()
        ignored = not in_main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
        if ignored or Interrupts.active is not None or sys.platform == "win32":
            return self
        Interrupts.active = self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.signal(signal.SIGINT, self._came)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="vlft-interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if Interrupts.active is not self:
            return
        Interrupts.active = None
        signal.set_wakeup_fd(self._fd_before)
        signal.signal(signal.SIGINT, self._before)
        os.write(self._write, b"\0")  # closing the pipe is not enough: forked processes hold it open
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def forget(self) -> None:
        """Mark the last Ctrl-C as handled: the next one counts as a first one."""
        self._first, self._told = None, True

    def answered(self) -> None:
        """Record that the user knows what the last Ctrl-C did; the next one ends the process at once."""
        self._told = True

    def _came(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a freshly forked process: its parent ends it
        if self.taker is None:
            self.raised = True
            raise KeyboardInterrupt
        self.taker.act()

    def _watch(self) -> None:
        while True:
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number == signal.SIGINT:
                    self._count()

    def _count(self) -> None:
        now, taker = time.monotonic(), self.taker
        if self._first is None:
            self._first, words = now, "" if taker is None else taker.first()
            self._told = bool(words)
            _say(words)
            later = threading.Timer(SILENCE, self._explain)
            later.daemon = True
            later.start()
        elif now - self._first > TOGETHER:
            try:
                _say("stopped at once (Ctrl-C twice)." if taker is None else taker.second())
            finally:
                self._end()

    def _explain(self) -> None:
        if not self._told:
            self._told = True
            _say("Ctrl-C: stopping when the current operation returns (Ctrl-C again: stop at once)")


@contextlib.contextmanager
def taking(taker: Taker) -> Iterator[None]:
    """Let `taker` handle the first Ctrl-C inside this context. Has no effect if no `Interrupts` is active."""
    here = Interrupts.active
    if here is None:
        yield
        return
    before, here.taker = here.taker, taker
    try:
        yield
    finally:
        here.taker = before


def forget() -> None:
    """Call `forget` of the active `Interrupts`, if there is one."""
    if Interrupts.active is not None:
        Interrupts.active.forget()


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Inside this context, a Ctrl-C ends the verb with the sentence `what`, which says what is saved.

    Raises:
        Interrupted: instead of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"Ctrl-C. {what}") from error


def _say(line: str) -> None:
    """Write a line to the terminal without Python's streams: the main thread may be in the middle of a print."""
    if line:
        with contextlib.suppress(OSError):
            os.write(2, f"{line_start()}{line}\n".encode())
