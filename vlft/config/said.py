"""What a command line says: argv and the YAML of `--config` as names with words, before anything is looked up.

Neighbours: `vlft.config.door` checks them, `vlft.config.parse` hands them to argparse. Imports nothing heavy.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.config.kinds import Kind
from vlft.errors import ConfigError, UsageError
from vlft.text import short


@dataclass(frozen=True, kw_only=True)
class Said:
    """One flag as it was written.

    Attributes:
        name: without dashes in front, `learning-rate` as `learning_rate`.
        words: its values; several for a list, none for a bare flag.
        file: the YAML it stands in; None for the command line.
    """

    name: str
    words: tuple[str, ...]
    file: str | None = None

    @property
    def word(self) -> str:
        """All its words as one."""
        return " ".join(self.words)

    def __str__(self) -> str:
        return f"--{self.name} {self.shown}".rstrip()

    @property
    def shown(self) -> str:
        """The words as a shell takes them; a long list or mapping is cut."""
        text = " ".join(map(quoted, self.words))
        return short(text, 97)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A whole command line.

    Attributes:
        flags: in the order written, those of the YAML first.
        others: words that belong to no flag.
        config: the YAML file, if one is named.
    """

    flags: tuple[Said, ...]
    others: tuple[str, ...]
    config: str | None = None

    def values(self) -> dict[str, Said]:
        """Flag -> what it was given last, which is what counts."""
        return {one.name: one for one in self.flags}


def read_line(argv: Sequence[str], kinds: Mapping[str, Kind], *, others: bool) -> Line:
    """Read argv and the YAML it names.

    Args:
        kinds: flag -> what it takes; one that is not there takes all words that follow.
        others: the verb takes words of its own beside flags, so that a flag of one word takes no more than one.

    Raises:
        UsageError: `--config` is given twice.
        ConfigError: its file is missing or no flat mapping.
    """
    flags: list[Said] = []
    rest: list[str] = []
    before, after = (list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])) if "--" in argv else (argv, [])
    place = 0
    while place < len(before):
        word = before[place]
        place += 1
        if not word.startswith("--"):
            rest.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        words = [value] if equals else []
        kind = kinds.get(name) or Kind(many="none" if name.removeprefix("no_") in kinds else "some")
        most = {"none": 0, "one": 1, "maybe": 1}.get(kind.many, len(before))
        if not others and kind.many in ("one", "maybe"):
            most = len(before)  # too many words for a flag are a fault, and belong to nothing else
        while not equals and place < len(before) and not before[place].startswith("--") and len(words) < most:
            words.append(before[place])
            place += 1
        flags.append(Said(name=name, words=tuple(words)))
    files = [one for one in flags if one.name == "config"]
    if len(files) > 1:
        raise UsageError(
            f"--config is given twice, {files[0].word} and {files[1].word}. Keep one; flags may change what it says"
        )
    config = files[0].word if files and files[0].words else None
    flags = [one for one in flags if one.name != "config" or not one.words]
    if config is not None:
        flags = [*(Said(name=name, words=words, file=config) for name, words in read_yaml(config)), *flags]
    return Line(flags=tuple(flags), others=tuple(rest + after), config=config)


def read_yaml(path: str) -> list[tuple[str, tuple[str, ...]]]:
    """The flags of a flat YAML file: lists are several words, mappings JSON. A line without a value says nothing.

    Raises:
        ConfigError: missing, not YAML, or not a flat mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        from vlft.config.places import near_miss

        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}){near_miss(path)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML in UTF-8 ({error})") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: want `flag: value` lines, found a {type(content).__name__}")
    found = []
    for name, value in content.items():
        if name == "config":
            raise ConfigError(f"--config {path}: a config file cannot name another (config: {value})")
        if value is not None and value != []:
            values = value if isinstance(value, list) else [value]
            found.append((str(name).replace("-", "_"), tuple(_word(item) for item in values)))
    return found


def quoted(word: str) -> str:
    """A word as a shell takes it: in double quotes where it holds single ones."""
    plain_inside = "'" in word and not set(word) & set('"$`\\!')
    return f'"{word}"' if plain_inside else shlex.quote(word)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)
