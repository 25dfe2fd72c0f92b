"""Flag names on a command line: known, renamed or unsupported. Imports nothing heavy, so that a slip costs no time."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from vlft.config.refused import RENAMED, REPLACED
from vlft.errors import UsageError


def names_in(argv: Sequence[str]) -> list[str]:
    """Names of the flags in argv as they stand there, `learning-rate` as `learning_rate`."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--") and word != "--"]


def check_names(verb: str, argv: Sequence[str], known: Collection[str]) -> None:
    """Refuse a flag that vlft does not take.

    Args:
        verb: `train`, for the message.
        argv: what follows it.
        known: names of the flags there are.

    Raises:
        UsageError: unknown, with the closest that is known; or renamed or unsupported, with what to use instead.
    """
    for name in names_in(argv):
        if name in RENAMED:
            raise wrong_usage(verb, f"--{name} has another name here. {_advice(RENAMED[name])}")
        if name.removeprefix("no_") in REPLACED:
            raise wrong_usage(verb, f"--{name} is not taken by vlft. {_advice(REPLACED[name.removeprefix('no_')])}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise wrong_usage(verb, f"unknown flag --{name}" + (f"; did you mean --{close[0]}?" if close else ""))


def wrong_usage(verb: str, message: str) -> UsageError:
    """The error of a command line that `verb` cannot make sense of."""
    return UsageError(f"vlft {verb}: {message}\n  All flags: vlft {verb} --help")


def _advice(text: str) -> str:
    """A line of the tables in `refused` as a sentence."""
    return f"Nothing to set: {text.removeprefix('nothing: ')}." if text.startswith("nothing: ") else f"Use {text}."
