"""The last line of the terminal, which shows the work in progress. Everything that is printed appears above it.

`vlft.cli.starting` enters `live` once for a command. Outside of it `stage` and `count` draw nothing, so that any room
may call them. Neighbours: `vlft.screen.row` formats the line, `vlft.train.progress` describes a run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

from vlft.screen.row import Bar, Part, Row, Writer, clock, eta

T = TypeVar("T")
PERIOD = 0.2  # seconds between two drawings
DELAY = 0.4  # seconds until anything is shown: quick commands, and those with a wrong flag, show nothing
LATER = 0.1  # seconds in which another program (`vlft train | tee log`) shows on the terminal what it was sent
MINUTE = 60.0  # seconds between lines of a log
ERASE = "\x1b[2K\x1b[G"  # without "\\r", at which Python flushes half of a line
FRAMES, PLAIN_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\"


def terminal() -> TextIO | None:
    """Return the stream of the line: stderr, or stdout if only that is a terminal; None if the line cannot be drawn.

    A notebook has no terminal, although its shell commands (`!vlft`) run in one. TERM=dumb and NO_TTY are honoured.
    """
    environ = os.environ
    if environ.get("NO_TTY") or "JPY_PARENT_PID" in environ or environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return None
    return next((stream for stream in (sys.stderr, sys.stdout) if _is_terminal(stream)), None)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # pythonw has no streams; a closed one has no terminal
        return False


class Live:
    """The line of a command. `live` makes it.

    Args:
        stream: where to draw; None draws nothing, and `count` prints a line every minute instead.
        about: prints what the command works on, before anything is drawn.
    """

    def __init__(self, stream: TextIO | None, about: Callable[[], object]) -> None:
        self.stream = stream
        self._about = about
        self.lock = threading.RLock()
        self._process = os.getpid()
        self._source: Callable[[], Row] | None = None
        self._writer = None if stream is None else Writer(stream)
        self._text = ""  # as it was last drawn
        self._drawn = False
        self._clean = True  # whether the cursor is at the start of a line
        self._not_before = 0.0  # when the line may be drawn again
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="vlft-screen", daemon=True)

    # ---- what is shown

    @property
    def source(self) -> Callable[[], Row] | None:
        """What is shown now; None for nothing."""
        return self._source

    def show(self, source: Callable[[], Row] | None) -> None:
        """Show the row that `source` returns at each drawing, or nothing."""
        with self.lock:
            if source is None:
                self._erase()
            self._source, self._text = source, ""

    def leave(self) -> None:
        """Draw the line for the last time, and leave it on the terminal."""
        with self.lock:
            self._draw(fresh=True)
            if self._drawn and self.stream is not None:
                self.stream.write("\n")
                self.stream.flush()
            self._drawn, self._source = False, None

    @property
    def drawn(self) -> bool:
        """Whether the line is on the terminal now."""
        return self._drawn

    # ---- drawing

    def start(self) -> None:
        """Begin to draw. `stop` ends it."""
        self._thread.start()

    def stop(self) -> None:
        """Erase the line, and draw no more."""
        self._over.set()
        self._thread.join()
        self.show(None)

    def _refresh(self) -> None:
        if self._over.wait(DELAY):
            return
        with contextlib.suppress(OSError, ValueError):  # of a closed stream; the command itself reports it
            self._about()
        while self.stream is not None:
            with self.lock:
                if time.monotonic() >= self._not_before:
                    self._draw(fresh=True)
            if self._over.wait(PERIOD):
                return

    def _draw(self, *, fresh: bool) -> None:
        source, stream, writer = self._source, self.stream, self._writer
        if source is None or stream is None or writer is None or not self._clean or self._over.is_set():
            return
        if fresh:
            self._text = writer.text(source())
        try:
            stream.write(f"\r{self._text}\x1b[K")
            stream.flush()
        except (OSError, ValueError):  # the terminal is gone
            self._over.set()
        self._drawn = True

    def _erase(self) -> None:
        if self._drawn and self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self.stream.write(ERASE)
                self.stream.flush()
        self._drawn = False

    def write_above(self, stream: TextIO, text: str) -> int:
        """Write text to a stream, above the line. Text that does not end its line hides the line until it does."""
        if os.getpid() != self._process:  # a loader worker; this process draws its line again soon
            start = ERASE if self._clean and self._source is not None else ""
            self._see(text)
            return stream.write(start + text)
        with self.lock:
            drew = self._drawn
            self._erase()
            written = stream.write(text)
            self._see(text)
            if drew or self._source is not None:
                stream.flush()
            if not _is_terminal(stream):
                self._not_before = time.monotonic() + LATER
            elif self._text:
                self._draw(fresh=False)
        return written

    def _see(self, text: str) -> None:
        if text:
            self._clean = not text.rpartition("\n")[2].rpartition("\r")[2]


class _Above:
    """A stream whose text appears above the line, directly or through another program."""

    def __init__(self, stream: TextIO, live: Live) -> None:
        self._stream = stream
        self._live = live

    def write(self, text: str) -> int:
        return self._live.write_above(self._stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_active: Live | None = None
_guarded = False  # whether `_guard_forks` was called


@contextlib.contextmanager
def live(*, about: Callable[[], object] = lambda: None, draw: bool = True) -> Iterator[Live]:
    """A context in which the terminal has a line. Inside another such context it has no effect.

    Args:
        about: prints what the command works on; called by a thread unless the command ends at once.
        draw: False never draws, even on a terminal.
    """
    global _active
    if _active is not None:
        yield _active
        return
    here = Live(terminal() if draw else None, about)
    out, err = sys.stdout, sys.stderr
    proxies = {}
    if here.stream is not None:
        _guard_forks()
        proxies = {"stdout": _Above(out, here)} | ({"stderr": _Above(err, here)} if _is_terminal(err) else {})
        for name, proxy in proxies.items():
            setattr(sys, name, proxy)
    _active = here
    here.start()
    try:
        yield here
    finally:
        here.stop()
        _active = None
        for name, before in (("stdout", out), ("stderr", err)):
            if getattr(sys, name) is proxies.get(name, ...):
                setattr(sys, name, before)


def _guard_forks() -> None:
    """Fork only while no thread draws, else a loader worker would inherit a lock that no one releases."""
    global _guarded
    if not _guarded and hasattr(os, "register_at_fork"):
        _guarded = True
        held: list[Live] = []

        def before() -> None:
            if _active is not None:
                _active.lock.acquire()
                held.append(_active)

        def after() -> None:
            if held:
                held.pop().lock.release()

        os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)


def active() -> Live | None:
    """Return the line of this command if it is drawn on a terminal, else None."""
    return _active if _active is not None and _active.stream is not None else None


def line_start() -> str:
    """Return what to write before a message that goes to the terminal directly, such as one about a signal."""
    if _active is not None and _active.drawn:
        return ERASE
    return "\n" if os.isatty(2) else ""


def stage(text: str) -> None:
    """Show what the command does now, with a spinner; "" shows nothing. Has no effect if nothing is drawn."""
    here = active()
    if here is None:
        return
    started = time.monotonic()
    frames = FRAMES if here.stream is not None and _is_unicode(here.stream) else PLAIN_FRAMES

    def row() -> Row:
        seconds = time.monotonic() - started
        frame = frames[int(seconds / PERIOD) % len(frames)]
        return Row(parts=(Part(text=f"{frame} {text}"), Part(text=clock(seconds), rank=1)))

    here.show(row if text else None)


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def count(things: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """Yield the things, and show how many of them are done.

    On a terminal a bar shows it; elsewhere stderr gets a line every minute. Has no effect outside of `live`.

    Args:
        things: what is worked on.
        total: their number.
        what: the work, e.g. `measuring rows`.
    """
    here = _active
    if here is None:
        yield from things
        return
    started, done, before, told = time.monotonic(), 0, here.source, time.monotonic()

    def row() -> Row:
        seconds = time.monotonic() - started
        left = eta(seconds / done * (total - done)) if done else ""
        return Row(
            parts=(
                Part(text=what, rank=1),
                Bar(share=done / max(1, total), rank=2),
                Part(text=f"{done:,}/{total:,}"),
                Part(text=clock(seconds), rank=4),
                Part(text=left, rank=3),
            )
        )

    here.show(row)
    try:
        for one in things:
            yield one
            done += 1
            if here.stream is None and time.monotonic() - told >= MINUTE:
                told = time.monotonic()
                print(f"{what}: {done:,}/{total:,} after {clock(told - started)}", file=sys.stderr, flush=True)
    finally:
        here.show(before)
