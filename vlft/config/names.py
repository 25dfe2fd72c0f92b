"""Unknown flags, requests for help, and the error of wrong usage. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from vlft.config.common_flags import COMMON
from vlft.errors import UsageError


def unknown(name: str, known: Collection[str], *, file: str | None = None) -> str:
    """Return the message for an unknown flag, with the known flag that was mistyped. `kits.meant` lists synonyms.

    Args:
        name: without leading dashes.
        known: names of flags.
        file: the YAML that sets it; None for the command line.
    """
    meant = mistyped(name, known)
    return (
        f"unknown flag --{name}" + (f" (in {file})" if file else "") + (f"; did you mean --{meant}?" if meant else "")
    )


def mistyped(name: str, known: Collection[str]) -> str:
    """Return the known flag that a typing error turned into `name`; "" if there is none."""
    slips = sorted((found, other) for other in known if (found := _slips(name.lower(), other)) is not None)
    return slips[0][1] if slips else ""


def _slips(typed: str, flag: str) -> int | None:
    """Return how many letters of a flag were mistyped; None if the two are different words.

    A typing error changes few letters of a word. Another word of the same length is another flag: `galore_rank` is not
    `lora_rank`, and `adam_beta3` is not `adam_beta2`.
    """
    if [char for char in typed if char.isdigit()] != [char for char in flag if char.isdigit()]:
        return None
    words, meant = typed.split("_"), flag.split("_")
    if len(words) != len(meant):  # a blank is missing, or there is one too many
        joined, other = typed.replace("_", ""), flag.replace("_", "")
        found = _distance(joined, other)
        return found if found <= 1 else None
    each = [_distance(word, other) for word, other in zip(words, meant, strict=True)]
    most = [0 if len(word) < 3 else 1 if len(word) < 8 else 2 for word in meant]
    return sum(each) if sum(each) <= 2 and all(map(int.__le__, each, most)) else None


def _distance(left: str, right: str) -> int:
    """Return how many letters must be inserted, removed, replaced or swapped with their neighbour; 3 for 3 or more."""
    if abs(len(left) - len(right)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, char in enumerate(left, start=1):
        older, before, row = before, row, [i]
        for j, other in enumerate(right, start=1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (char != other))
            if i > 1 and j > 1 and char == right[j - 2] and left[i - 2] == other:
                best = min(best, older[j - 2] + 1)
            row.append(best)
    return min(row[-1], 3)


def wrong_usage(verb: str, message: str) -> UsageError:
    """Return the error for a command line that `verb` cannot parse."""
    return UsageError(f"vlft {verb}: {message}\n  All flags: vlft {verb} --help{' all' if verb in COMMON else ''}")


def help_asked(argv: Sequence[str]) -> Literal["common", "all"] | None:
    """Return which help argv asks for: common flags (`--help`, `-h`), all (`--help all`, `--help-all`), or None."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    for i, word in enumerate(before):
        if word in ("--help=all", "--help-all", "--help_all"):
            return "all"
        if word in ("-h", "--help"):
            return "all" if before[i + 1 : i + 2] == ["all"] else "common"
    return None
