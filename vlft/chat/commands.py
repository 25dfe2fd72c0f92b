"""The commands of a conversation: which there are, and what a line of the user means. Imports no torch.

A line that begins with a slash is a command and is never sent to the model. `//text` sends `/text`.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from vlft.errors import UsageError

CLOSE = 0.6  # difflib's cutoff; commands are short, and there are few of them


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the loop.

    Attributes:
        name: its word, with the slash.
        takes: what follows the word, for the help.
        text: what it does, for the help.
        files: whether file names follow, which Tab completes.
    """

    name: str
    takes: str = ""
    text: str
    files: bool = False


_ROWS = (
    Command(name="/image", takes="FILE...", text="add pictures to the next question; alone: list them", files=True),
    Command(name="/video", takes="FILE...", text="add videos to the next question; alone: list them", files=True),
    Command(name="/system", takes="TEXT", text='start again with this system turn; alone: show it; "" removes it'),
    Command(name="/new", text="start again with the same system turn"),
    Command(name="/undo", text="take back the last added files, or the last question and its answer"),
    Command(name="/save", takes="FILE.jsonl", text="append the conversation to a data file, as a row", files=True),
    Command(name="/help", text="list the commands"),
    Command(name="/quit", text="end, as Ctrl-D does"),
)  # fmt: skip
COMMANDS = {command.name: command for command in _ROWS}
#: Words of other chat programs -> the command that is meant.
MEANT = {
    **dict.fromkeys(("/exit", "/q", "/bye", "/end", "/stop"), "/quit"),
    **dict.fromkeys(("/clear", "/reset", "/restart"), "/new"),
    **dict.fromkeys(("/img", "/picture", "/photo", "/pic", "/add", "/load", "/file"), "/image"),
    **dict.fromkeys(("/clip", "/movie"), "/video"),
    **dict.fromkeys(("/?", "/h", "/commands"), "/help"),
    **dict.fromkeys(("/back", "/retry", "/regenerate"), "/undo"),
    **dict.fromkeys(("/export", "/write"), "/save"),
    **dict.fromkeys(("/prompt", "/sys"), "/system"),
}


def help_lines() -> list[str]:
    """Return the lines of `/help`."""
    wide = max(len(f"{command.name} {command.takes}") for command in _ROWS)
    lines = [f"{f'{command.name} {command.takes}':<{wide}}  {command.text}" for command in _ROWS]
    return [
        *lines,
        f"{'//TEXT':<{wide}}  send a text that begins with a slash",
        "Tab completes commands and file names. Ctrl-C stops an answer.",
    ]


def parse(line: str) -> tuple[Command | None, str]:
    """Return the command of a line and what follows it, or None and the text to send.

    Args:
        line: without blanks at its ends.

    Raises:
        UsageError: an unknown command; the message names a similar one.
    """
    if line.startswith("//"):
        return None, line[1:]
    if not line.startswith("/"):
        return None, line
    word, *rest = line.split(maxsplit=1)
    if (found := COMMANDS.get(word)) is not None:
        return found, rest[0] if rest else ""
    if os.path.isfile(line) or os.path.isfile(word):
        path = line if os.path.isfile(line) else word
        hint = f"to show this file, type /image {path}"
    else:
        names = [*COMMANDS, *MEANT]
        close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=CLOSE) if len(word) > 1 else []
        hint = f"did you mean {MEANT.get(close[0], close[0])}?" if close else "/help lists the commands"
    raise UsageError(f"{word} is not a command: {hint}{'' if hint.endswith('?') else '.'} To send it as text: /{line}")


_WORD = re.compile(r"""(?:[^\s"'\\]|\\.|\\$|"[^"]*"|'[^']*')+|["']""")


def files_in(text: str) -> list[str]:
    """Return the file names in what follows a command, with `~` expanded.

    Names that have blanks are in quotes, or have a backslash before each blank. A single name needs neither.

    Raises:
        UsageError: a quote is not closed.
    """
    if Path(whole := os.path.expanduser(text)).is_file():
        return [whole]
    names = []
    for word in _WORD.findall(text):
        if word in ("'", '"'):
            raise UsageError(f"the quote {word} is not closed in: {text}")
        names.append(os.path.expanduser(_unescaped(word)))
    return names


def _unescaped(word: str) -> str:
    """Remove quotes, and backslashes before a blank, a quote or a backslash. Others stay: Windows has them in paths."""
    pieces = re.findall(r"""\\[\s"'\\]|"[^"]*"|'[^']*'|.""", word, re.S)
    return "".join(piece[1:-1] if piece[0] in "\"'" else piece[1:] if len(piece) == 2 else piece for piece in pieces)
