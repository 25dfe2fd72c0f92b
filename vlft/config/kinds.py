"""Kinds of flag values: which words a flag takes, and what is wrong with a word. Imports nothing heavy.

Neighbours: `vlft.config.table` maps each flag to its kind, `vlft.config.door` checks all flags of a command.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

#: The words of a bool, the same as in transformers' HfArgumentParser.
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
ROUNDED = 0.002  # how far the sum of shares may be from 1, such as 0.333,0.333,0.333
MOST_WORDS = 12  # most choices that a message lists; the help lists all


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a value.

    Attributes:
        text: follows the flag's name and value in the message, e.g. `must be at least 1`; "" if the value is missing.
        usage: True if the word makes no sense (wrong usage), False if the setting cannot be carried out.
    """

    text: str
    usage: bool = False


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A flag that takes any text. Base class of the other kinds.

    Attributes:
        many: how many words it takes: `one`, `some` (one or more), `maybe` (none or one) or `none`.
        usage: an invalid value counts as wrong usage (exit status 2). True for the flags of single verbs.
        angled: values contain words such as `<a>`, which are placeholders in those of other flags.
        example: a value with several parts, for the message about several words where one is expected.
    """

    many: Literal["one", "some", "maybe", "none"] = "one"
    usage: bool = False
    angled: bool = False
    example: str = ""

    def problem(self, word: str) -> Problem | None:
        """Return what is wrong with a word, or None."""
        return None

    def value(self, word: str) -> Any:
        """Return the value of a word that has no problem."""
        return word


@dataclass(frozen=True, kw_only=True)
class Named(Kind):
    """A text that must not be empty."""

    def problem(self, word: str) -> Problem | None:
        return None if word.strip() else Problem(text="", usage=self.usage)


@dataclass(frozen=True, kw_only=True)
class Place(Named):
    """A path.

    Attributes:
        of: `file`, `folder`, `either`, or `out` (a folder to be written).
        words: words with a special meaning, which are not paths (`auto`).
        holds: a file that such a folder contains, and what the folder is called in messages.
        rows: the path is a data file. It may be a pattern for several files, and a missing one may be a hub id.
        later: a missing path is not refused here, but where it is opened.
    """

    of: Literal["file", "folder", "either", "out"] = "either"
    words: tuple[str, ...] = ()
    holds: tuple[str, str] | None = None
    rows: bool = False
    later: bool = False


@dataclass(frozen=True, kw_only=True)
class Number(Kind):
    """A finite number in a range.

    Attributes:
        whole: only whole numbers are valid.
        low: lower bound; None: no bound.
        high: upper bound; None: no bound.
        open_low: `low` itself is not valid.
        open_high: `high` itself is not valid.
        share: a number below 1 is a share; larger numbers must be whole.
        unit: what a number with `share` counts.
        even: only even numbers are valid.
        also: values outside the range that have a special meaning.
    """

    whole: bool = False
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    share: bool = False
    unit: str = "steps"
    even: bool = False
    also: tuple[float, ...] = ()

    def value(self, word: str) -> Any:
        return int(word) if self.whole else float(word)

    def problem(self, word: str) -> Problem | None:
        try:
            number = self.value(word)
        except ValueError:
            return Problem(text=f"must be {'a whole number' if self.whole else 'a number'}", usage=True)
        if not math.isfinite(number):
            return Problem(text="must be a finite number", usage=self.usage)
        if number in self.also:
            return None
        low = self.low is None or (number > self.low if self.open_low else number >= self.low)
        high = self.high is None or (number < self.high if self.open_high else number <= self.high)
        if not (low and high):
            return Problem(text=self.bounds(above=low), usage=self.usage)
        if self.even and number % 2:
            return Problem(text="must be even: frames go in pairs", usage=self.usage)
        if self.share and number > 1 and number != int(number):
            return Problem(text=f"must be a whole number of {self.unit}, or a share below 1", usage=self.usage)
        return None

    def bounds(self, *, above: bool) -> str:
        """Return the violated bound as text.

        Args:
            above: the number is above the range; else below.
        """
        if above:
            return f"must be {'below' if self.open_high else 'at most'} {_plain(self.high)}"
        if self.low == 0:
            return "must be more than 0" if self.open_low else "must not be negative"
        return f"must be {'more than' if self.open_low else 'at least'} {_plain(self.low)}"


@dataclass(frozen=True, kw_only=True)
class Shares(Kind):
    """Two or three shares of a whole, as `0.9,0.05,0.05`."""

    def value(self, word: str) -> tuple[float, ...]:
        shares = [float(one) for one in word.split(",")]
        return tuple(share / sum(shares) for share in shares)

    def problem(self, word: str) -> Problem | None:
        try:
            shares = [float(one) for one in word.split(",")]
        except ValueError:
            return Problem(text="must be two or three shares, e.g. 0.9,0.05,0.05", usage=True)
        if len(shares) not in (2, 3):
            return Problem(
                text=f"must be two shares (train, eval) or three (train, eval, test), not {len(shares)}", usage=True
            )
        if not all(math.isfinite(share) and share > 0 for share in shares):
            return Problem(text="must be shares above 0; for no test file give two shares", usage=self.usage)
        if abs(sum(shares) - 1) > ROUNDED:
            whole = ",".join(f"{share / sum(shares):.3g}" for share in shares)
            return Problem(text=f"must sum to 1, not {sum(shares):g}. Did you mean {whole}?", usage=self.usage)
        return None


@dataclass(frozen=True, kw_only=True)
class Bool(Kind):
    """True or false, in any of the words that transformers accepts."""

    def value(self, word: str) -> Any:
        return word.lower() in TRUE

    def problem(self, word: str) -> Problem | None:
        return None if word.lower() in TRUE + FALSE else Problem(text="must be true or false", usage=True)


@dataclass(frozen=True, kw_only=True)
class Word(Kind):
    """One of a few words.

    Attributes:
        words: the valid words.
        needs: word -> packages; at least one of them must be installed.
        on_gpu: words that also need a CUDA device.
        refused: word -> why vlft does not support it, and what to use instead. Also words of other programs.
        bools: the words of a bool are also valid, as `true` and `false`.
    """

    words: tuple[str, ...] = ()
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    on_gpu: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    bools: bool = False

    def value(self, word: str) -> Any:
        lower = word.lower()
        if self.bools and lower in TRUE + FALSE:
            return "true" if lower in TRUE else "false"
        return word

    def problem(self, word: str) -> Problem | None:
        word = self.value(word)
        if word in self.refused:
            return Problem(text=self.refused[word], usage=self.usage)
        if word not in self.words:
            few = len(self.words) <= MOST_WORDS or not word
            return Problem(
                text=f"must be one of {', '.join(self.words)}" if few else _near(word, self.words), usage=True
            )
        if lacking := missing(self.needs.get(word, ()), beside="a CUDA device and " if word in self.on_gpu else ""):
            return Problem(text=lacking, usage=self.usage)
        return None


def missing(packages: Sequence[str], *, beside: str = "") -> str:
    """Return a message if none of the packages is installed, with the command that installs one; else "".

    Args:
        packages: each is `module`, or `module (its name for pip)`. "" is returned if there are none.
        beside: what else is needed, with its conjunction (`a CUDA device and `).
    """
    names = [(name.partition(" (")[0], name.partition(" (")[2].rstrip(")")) for name in packages]
    if not names or any(_installed(module) for module, _ in names):
        return ""
    module, for_pip = names[0]
    return f"needs {beside}the package {module}, which is not installed: pip install {for_pip or module}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or is partly removed
        return False


def _near(word: str, words: Sequence[str]) -> str:
    import difflib

    near = [other for other in words if len(word) > 2 and other.startswith(word)][:2]
    near = near or difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    return f"is unknown; did you mean {' or '.join(near)}?" if near else f"is unknown; choose from {', '.join(words)}"


def _plain(number: float | None) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
