"""Flag names that nobody knows, and the error of a command line that makes no sense. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from vlft.errors import UsageError

CLOSE = 0.75  # of difflib: a slip of the fingers, not another word


def unknown(name: str, known: Collection[str]) -> str:
    """The message of an unknown flag, with what may have been meant. Other words for a flag are `kits.meant`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
    return f"unknown flag --{name}" + (f"; did you mean --{close[0]}?" if close else "")


def wrong_usage(verb: str, message: str) -> UsageError:
    """The error of a command line that `verb` cannot make sense of."""
    return UsageError(f"vlft {verb}: {message}\n  All flags: vlft {verb} --help")
