"""A terminal for tests: a pseudo-terminal of a given width, and what a user sees in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator

_PIECES = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[[\d;?]*[A-Za-z]|[^\x1b]")


class Seen:
    """The lines of a terminal that wraps at its last column. Reads newlines, erasing and returns to a line's start."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.states: list[str] = []  # what the last line was each time the cursor went to its start
        self.column = 0

    def feed(self, text: str) -> Seen:
        for piece in _PIECES.finditer(text):
            self._put(piece)
        return self

    def _put(self, piece: re.Match[str]) -> None:
        word, line = piece[0], self.lines[-1]
        if piece[2] == "K":
            del line[0 if piece[1] == "2" else self.column :]
        elif word == "\r" or piece[2] == "G":
            self.states.append("".join(line))
            self.column = 0
        elif word == "\n":
            self.lines.append([])
            self.column = 0
        elif not word.startswith("\x1b"):
            if self.column == self.columns:
                self.lines.append([])
                self.column, line = 0, self.lines[-1]
            line += " " * (self.column - len(line))
            line[self.column : self.column + 1] = [word]
            self.column += 1

    @property
    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip("\n")


class Terminal:
    """Both ends of a pseudo-terminal. `seen` closes it."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.resize(columns)
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def _collect(self) -> None:
        with contextlib.suppress(OSError):  # raised when the other end is closed
            while data := os.read(self._master, 65536):
                self._read.append(data)

    def raw(self) -> str:
        self.stream.close()
        self._thread.join(5)
        os.close(self._master)
        return b"".join(self._read).decode()

    def seen(self) -> Seen:
        return Seen(self.columns).feed(self.raw())


@contextlib.contextmanager
def on_terminal(monkeypatch, columns: int, *, stdout: bool = True) -> Iterator[Terminal]:
    """A terminal of this process: stderr, and stdout unless that is a file."""
    terminal = Terminal(columns)
    for name in ("NO_TTY", "NO_COLOR", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.stream)
        if stdout:
            patch.setattr(sys, "stdout", terminal.stream)
        yield terminal
