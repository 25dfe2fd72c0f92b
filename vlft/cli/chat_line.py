"""Edit lines in the loop of `vlft chat`: history between sessions, and Tab for commands and file names."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlft.chat.commands import COMMANDS
from vlft.files import cache_folder

KEPT = 1000  # lines of the history
_PLAIN = re.compile(r"""((?:[^\s"'\\]|\\.)*)$""")  # the last word of a line that is not in quotes
_QUOTED = re.compile(r"""^(?:[^"']|"[^"]*"|'[^']*')*(["'])([^"']*)$""")  # a line in whose last word a quote is open


def edit_lines(environ: Mapping[str, str]) -> None:
    """Make `input()` edit lines, complete them, and remember them in the file `VLFT_CHAT_HISTORY` (0: nowhere)."""
    try:
        readline: Any = importlib.import_module("readline")
    except ImportError:  # Windows has no readline; its console edits lines itself
        return
    readline.set_completer_delims("")  # the completer gets the line up to the cursor, and returns it completed
    readline.set_completer(lambda text, state: dict(enumerate(completions(text))).get(state))
    if hasattr(readline, "set_completion_display_matches_hook"):
        readline.set_completion_display_matches_hook(lambda typed, found, longest: _display(readline, found))
    libedit = "libedit" in (readline.__doc__ or "")  # as on macOS
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    folder = cache_folder(environ, variable="VLFT_CHAT_HISTORY", name="chat_history")
    if folder is not None:
        _remember(readline, folder)


def _remember(readline: Any, file: Path) -> None:
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(KEPT)

    def write() -> None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # what a user asks is private
            readline.write_history_file(file)

    atexit.register(write)


def completions(line: str) -> list[str]:
    """Return the lines that a line can be completed to: of a command its names, after it the file names.

    Args:
        line: the line up to the cursor.
    """
    if not line.startswith("/") or line.startswith("//"):
        return []
    word, blank, _ = line.partition(" ")
    if not blank:
        return [f"{name} " if COMMANDS[name].takes else name for name in COMMANDS if name.startswith(line)]
    if word not in COMMANDS or not COMMANDS[word].files:
        return []
    if (quoted := _QUOTED.match(line)) is not None:
        typed, quote = quoted[2], quoted[1]
    else:
        typed, quote = str(_PLAIN.search(line)[1]), ""  # type: ignore[index]
    before = line[: len(line) - len(typed)]
    return [before + end for end in _files(typed if quote else re.sub(r"\\(.)", r"\1", typed), quote)]


def _files(typed: str, quote: str) -> list[str]:
    """Return the names of files and folders that begin like `typed`, written as in the quote; "" is none."""
    folder, name = os.path.split(typed)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(name))
    except OSError:
        return []
    found = [(one, is_dir) for one, is_dir in found if name.startswith(".") or not one.startswith(".")]
    written = []
    for one, is_dir in found:
        path = os.path.join(folder, one)
        path = path if quote else re.sub(r"""([\s"'\\])""", r"\\\1", path)
        written.append(f"{path}/" if is_dir else f"{path}{quote} ")
    return written


def _display(readline: Any, found: list[str]) -> None:
    """Print the ends of completed lines: the names, without what they have in common up to the last folder."""
    common = os.path.commonprefix(found)  # noqa: RUF071 - of texts, not of paths
    start = max(common.rfind(sign) for sign in ("/", " ", '"', "'")) + 1
    print("\n" + "  ".join(one[start:].strip() for one in found))
    print(f"> {readline.get_line_buffer()}", end="", flush=True)
    readline.redisplay()
