"""Unknown flags, requests for help, and the error of wrong usage. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Literal

from vlft.errors import UsageError

CLOSE = 0.75  # difflib's cutoff: a typing error, not another word


def unknown(name: str, known: Collection[str]) -> str:
    """Return the message for an unknown flag, with a similar known flag. `kits.meant` lists synonyms."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
    return f"unknown flag --{name}" + (f"; did you mean --{close[0]}?" if close else "")


def wrong_usage(verb: str, message: str) -> UsageError:
    """Return the error for a command line that `verb` cannot parse."""
    return UsageError(f"vlft {verb}: {message}\n  All flags: vlft {verb} --help all")


def help_asked(argv: Sequence[str]) -> Literal["common", "all"] | None:
    """Return which help argv asks for: common flags (`--help`, `-h`), all (`--help all`, `--help-all`), or None."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    for i, word in enumerate(before):
        if word in ("--help=all", "--help-all", "--help_all"):
            return "all"
        if word in ("-h", "--help"):
            return "all" if before[i + 1 : i + 2] == ["all"] else "common"
    return None
