"""Read the words of `--reward`: names of built-in rewards, patterns, and functions of the user's files.

Runs no file. `vlft.train.grpo.worker` computes rewards, in a process of its own.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vlft.errors import ConfigError

#: Reward -> what it is.
BUILT_IN = {
    "exact_match": "1 if the completion equals the row's answer, apart from spaces around it, else 0",
    "edit_ratio": "1 - edit distance / length of the longer text, from 0 to 1",
    "iou": "overlap of the boxes with those of the row's answer; a box without a partner counts 0",
}
FORMAT, FUNCTION = "format:REGEX", "FILE.py:FUNCTION"
#: Columns of a row that reach rewards, besides prompts, completions and completion_ids.
COLUMNS = ("answer", "full_answer", "id", "file", "index", "image_paths")
#: Names of `answer` in other kits.
ELSEWHERE = "`solution` of TRL and `assistant` of Qwen2-VL-Finetune are `answer` here, a text"
REWARD_FILES = "reward_files"  # key of `RunRecord.training`: what `files_of` returns at the start
_FILE = re.compile(r"(?P<file>.+\.py):(?P<names>[^:]*)", re.DOTALL)
_NAMES = f"the rewards: {', '.join(BUILT_IN)}, {FORMAT}, {FUNCTION}"


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward of a run.

    Attributes:
        name: as messages and metrics.jsonl call it. Each reward of a run has another one.
        kind: what computes it.
        what: the built-in's name, the pattern, or the function's name.
        file: absolute path of the user's file; "" for the other kinds.
    """

    name: str
    kind: Literal["built_in", "format", "function"]
    what: str
    file: str = ""

    @property
    def word(self) -> str:
        """The reward as a user writes it."""
        if self.file:
            return f"{os.path.relpath(self.file)}:{self.what}"
        return f"format:{self.what}" if self.kind == "format" else self.what


def read_rewards(words: Sequence[str]) -> tuple[Reward, ...]:
    """Return the rewards of `--reward`.

    Args:
        words: each is names with commas between them, `format:REGEX`, or `FILE.py:FUNCTION[,FUNCTION ...]`.

    Raises:
        ConfigError: there is none, a name is unknown, a reward is given twice, a pattern is invalid, or a file does not
            exist.
    """
    found: list[Reward] = []
    for word in words:
        found += _read(word.strip())
    if not found:
        raise ConfigError(f"--method grpo needs --reward: what a completion is worth. {_NAMES[0].upper()}{_NAMES[1:]}")
    if twice := next((one for one, times in Counter(found).items() if times > 1), None):
        raise ConfigError(f"--reward {twice.word} is given twice. Drop one of the two.")
    return _named(found)


def _named(found: Sequence[Reward]) -> tuple[Reward, ...]:
    """Give each reward a name of its own: `file.function` if functions share a name, then `_2`, `_3` and so on."""
    times = Counter(one.name for one in found)
    taken = [f"{Path(one.file).stem}.{one.name}" if one.file and times[one.name] > 1 else one.name for one in found]
    names: list[str] = []
    for name in taken:
        numbered = (name if number == 1 else f"{name}_{number}" for number in range(1, len(found) + 1))
        names.append(next(one for one in numbered if one not in names and (one == name or one not in taken)))
    return tuple(replace(one, name=name) for one, name in zip(found, names, strict=True))


def _read(word: str) -> list[Reward]:
    if word.startswith("format:"):
        pattern = word.removeprefix("format:")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"--reward {word}: {pattern!r} is no regular expression: {error}") from error
        if not pattern:
            raise ConfigError(f"--reward {word}: a regular expression is missing, such as 'format:<answer>.*</answer>'")
        return [Reward(name="format", kind="format", what=pattern)]
    if (match := _FILE.fullmatch(word)) is not None:
        file = os.path.abspath(os.path.expanduser(match["file"]))
        if not os.path.isfile(file):
            raise ConfigError(f"--reward {word}: there is no file {file}. Check the path.")
        names = _split(word, match["names"])
        if bad := [name for name in names if not name.isidentifier()]:
            raise ConfigError(f"--reward {word}: {bad[0]!r} is no name of a function. Write {FUNCTION}")
        return [Reward(name=name, kind="function", what=name, file=file) for name in names]
    if word.endswith(".py"):
        raise ConfigError(f"--reward {word}: name a function of the file: {word}:FUNCTION")
    return [_built_in(name) for name in _split(word, word)]


def _split(word: str, names: str) -> list[str]:
    found = [name.strip() for name in names.split(",")]
    if len(found) > 1 and not all(found):
        raise ConfigError(
            f"--reward {word}: a name is missing beside a comma. Write one comma between two names: one,two"
        )
    return found


def _built_in(name: str) -> Reward:
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), BUILT_IN, n=1, cutoff=0.5)
        hint = f" Do you mean {near[0]}?" if near else ""
        raise ConfigError(f"--reward {name}: there is no such reward.{hint} {_NAMES[0].upper()}{_NAMES[1:]}")
    return Reward(name=name, kind="built_in", what=name)


def files_of(words: Sequence[str]) -> dict[str, str]:
    """Absolute path -> SHA-256 of the user's files that rewards name."""
    found = {}
    for file in sorted({one.file for one in read_rewards(words) if one.file}):
        with open(file, "rb") as opened:
            found[file] = hashlib.sha256(opened.read()).hexdigest()
    return found


def portable(word: str) -> str:
    """A word of `--reward` with an absolute path, if it names a file."""
    match = _FILE.fullmatch(word)
    if word.startswith("format:") or match is None:
        return word
    return f"{os.path.abspath(os.path.expanduser(match['file']))}:{match['names']}"
