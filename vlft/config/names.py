"""Words of a command line: unknown flags, calls for help, the error of wrong usage. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Literal

from vlft.errors import UsageError

CLOSE = 0.75  # of difflib: a slip of the fingers, not another word


def unknown(name: str, known: Collection[str]) -> str:
    """The message of an unknown flag, with what may have been meant. Other words for a flag are `kits.meant`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
    return f"unknown flag --{name}" + (f"; did you mean --{close[0]}?" if close else "")


def wrong_usage(verb: str, message: str) -> UsageError:
    """The error of a command line that `verb` cannot make sense of."""
    return UsageError(f"vlft {verb}: {message}\n  All flags: vlft {verb} --help all")


def help_asked(argv: Sequence[str]) -> Literal["common", "all"] | None:
    """The help that a command line asks for: common flags (`--help`, `-h`) or all (`--help all`, `--help-all`)."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    for i, word in enumerate(before):
        if word in ("--help=all", "--help-all", "--help_all"):
            return "all"
        if word in ("-h", "--help"):
            return "all" if before[i + 1 : i + 2] == ["all"] else "common"
    return None
