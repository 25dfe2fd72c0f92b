"""Kinds of flag values: what a flag takes, and what is wrong with the words it is given. Imports nothing heavy.

Neighbours: `vlft.config.table` gives the kind of each flag, `vlft.config.door` asks for all flags of a command.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

#: The words of a bool, as transformers' HfArgumentParser takes them.
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
MOST_WORDS = 12  # of a choice in a message; more are in the help


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a value.

    Attributes:
        text: behind the flag's name and value, e.g. `must be at least 1`; "" where the value is only missing.
        usage: the words make no sense at all, as opposed to a setting that cannot be carried out.
    """

    text: str
    usage: bool = False


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A flag that takes any text; and the base of the other kinds.

    Attributes:
        many: how many words it takes: `one`, `some` (one or more), `maybe` (none or one) or `none`.
        usage: an impossible value counts as wrong usage (exit status 2); so it is for the flags of single verbs.
    """

    many: Literal["one", "some", "maybe", "none"] = "one"
    usage: bool = False
    type_name: ClassVar[str] = "str"

    def problem(self, word: str) -> Problem | None:
        """What is wrong with one word, or None."""
        return None

    def value(self, word: str) -> Any:
        """The value of a word that has no problem."""
        return word


@dataclass(frozen=True, kw_only=True)
class Named(Kind):
    """A text that must not be empty."""

    def problem(self, word: str) -> Problem | None:
        return None if word.strip() else Problem(text="", usage=self.usage)


@dataclass(frozen=True, kw_only=True)
class Place(Named):
    """The name of something on disk.

    Attributes:
        of: `file`, `folder`, `either`, or `out` (a folder to be written).
        words: that stand for something else and are not looked for.
        holds: a file that a folder of this kind has, and what the folder is called.
        rows: it holds rows: a pattern may stand for several files, and what is not here may be on the hub.
    """

    of: Literal["file", "folder", "either", "out"] = "either"
    words: tuple[str, ...] = ()
    holds: tuple[str, str] | None = None
    rows: bool = False


@dataclass(frozen=True, kw_only=True)
class Number(Kind):
    """A finite number in a range; the bounds belong to it unless `open_low` or `open_high` says otherwise.

    Attributes:
        whole: only whole numbers.
        share: a number below 1 is a share of all steps; from 1 on it must be whole.
        even: only even numbers.
        also: values outside of the range that have a meaning of their own.
    """

    whole: bool = False
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    share: bool = False
    even: bool = False
    also: tuple[float, ...] = ()

    @property
    def type_name(self) -> str:  # type: ignore[override]
        return "int" if self.whole else "float"

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
            return Problem(text="must be a whole number of steps, or a share below 1", usage=self.usage)
        return None

    def bounds(self, *, above: bool) -> str:
        """The range in words; the side that was overstepped is named."""
        if above:
            return f"must be {'below' if self.open_high else 'at most'} {_plain(self.high)}"
        if self.low == 0:
            return "must be more than 0" if self.open_low else "must not be negative"
        return f"must be {'more than' if self.open_low else 'at least'} {_plain(self.low)}"


@dataclass(frozen=True, kw_only=True)
class Bool(Kind):
    """True or false, in any of the words that transformers takes."""

    type_name: ClassVar[str] = "string_to_bool"

    def value(self, word: str) -> Any:
        return word.lower() in TRUE

    def problem(self, word: str) -> Problem | None:
        return None if word.lower() in TRUE + FALSE else Problem(text="must be true or false", usage=True)


@dataclass(frozen=True, kw_only=True)
class Word(Kind):
    """One of a few words.

    Attributes:
        words: all of them.
        needs: word -> the packages it needs; one of them is enough.
        on_gpu: words that need a CUDA device, too.
        refused: word -> why vlft cannot carry it out, and what to use instead.
        bools: the words of a bool are taken too, as `true` and `false`.
    """

    words: tuple[str, ...] = ()
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    on_gpu: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    bools: bool = False
    type_name: ClassVar[str] = "word"

    def value(self, word: str) -> Any:
        lower = word.lower()
        if self.bools and lower in TRUE + FALSE:
            return "true" if lower in TRUE else "false"
        return word

    def problem(self, word: str) -> Problem | None:
        word = self.value(word)
        if word not in self.words:
            few = len(self.words) <= MOST_WORDS or not word
            return Problem(
                text=f"must be one of {', '.join(self.words)}" if few else _near(word, self.words), usage=True
            )
        if word in self.refused:
            return Problem(text=self.refused[word], usage=self.usage)
        if lacking := missing(self.needs.get(word, ()), beside="a CUDA device and " if word in self.on_gpu else ""):
            return Problem(text=lacking, usage=self.usage)
        return None


def missing(packages: Sequence[str], *, beside: str = "") -> str:
    """Says that none of the packages is installed, and how to install one; "" where one is there or none is needed.

    Args:
        packages: `module` or `module (its name for pip)` each.
        beside: what is needed besides, with the word that joins it.
    """
    names = [(name.partition(" (")[0], name.partition(" (")[2].rstrip(")")) for name in packages]
    if not names or any(_installed(module) for module, _ in names):
        return ""
    module, for_pip = names[0]
    return f"needs {beside}the package {module}, which is not installed: pip install {for_pip or module}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package in the name is missing, or is half removed
        return False


def _near(word: str, words: Sequence[str]) -> str:
    import difflib

    near = [other for other in words if len(word) > 2 and other.startswith(word)][:2]
    near = near or difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    return f"is unknown; did you mean {' or '.join(near)}?" if near else f"is unknown; there are {', '.join(words)}"


def _plain(number: float | None) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
