"""Read a command line, and the YAML of `--config`, into names with words. Nothing is checked here.

Neighbours: `vlft.config.door` checks them, `vlft.config.parse` passes them to argparse. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlft.config.kinds import Kind, Place
from vlft.config.yaml_file import read_text
from vlft.errors import ConfigError, UsageError
from vlft.text import short

WIDTH = 110  # characters of a line of a command


@dataclass(frozen=True, kw_only=True)
class Said:
    """One flag as the user wrote it.

    Attributes:
        name: without leading dashes, and with `_` for `-`: `learning_rate`.
        words: its values; several for a list, none for a flag without a value.
        file: the YAML file that sets it; None for the command line.
    """

    name: str
    words: tuple[str, ...]
    file: str | None = None

    @property
    def word(self) -> str:
        """All its words, joined by spaces."""
        return " ".join(self.words)

    def __str__(self) -> str:
        if self.name.isupper():  # a variable of the environment
            return f"{self.name}={self.shown}"
        return f"--{self.name} {self.shown}".rstrip()

    @property
    def shown(self) -> str:
        """The words, quoted for a shell. A long text is cut."""
        text = " ".join(map(quoted, self.words))
        return short(text, 97)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A whole command line.

    Attributes:
        flags: the flags in the order written. The flags of the YAML come first.
        others: words that belong to no flag.
        config: the YAML file; None without `--config`.
    """

    flags: tuple[Said, ...]
    others: tuple[str, ...]
    config: str | None = None

    def values(self) -> dict[str, Said]:
        """Return name -> flag. If a flag is given several times, the last one counts."""
        return {one.name: one for one in self.flags}


def read_line(argv: Sequence[str], kinds: Mapping[str, Kind], *, others: bool) -> Line:
    """Read argv and the file of `--config`.

    Args:
        argv: the words after the verb.
        kinds: flag -> its kind. An unknown flag takes all words that follow it.
        others: the verb also takes words without a flag, so a flag with one value takes only the next word.

    Raises:
        UsageError: `--config` is given twice.
        ConfigError: its file is missing or not a flat mapping.
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
            most = len(before)  # surplus words are reported as an error of this flag
        while not equals and place < len(before) and not before[place].startswith("--") and len(words) < most:
            words.append(before[place])
            place += 1
        flags.append(Said(name=name, words=tuple(words)))
    files = [one for one in flags if one.name == "config"]
    if len(files) > 1:
        raise UsageError(
            f"--config is given twice, {files[0].word} and {files[1].word}. Keep one; flags override what it sets"
        )
    config = files[0].word if files and files[0].words else None
    flags = [one for one in flags if one.name != "config" or not one.words]
    if config is not None:
        written = [Said(name=name, words=words, file=config) for name, words in read_yaml(config)]
        # a flag of another kit without a value has its default there
        flags = [*(one for one in written if one.word or one.name in kinds), *flags]
    flags = [_at_home(one) if isinstance(kinds.get(one.name), Place) else one for one in flags]
    return Line(flags=tuple(flags), others=tuple(rest + after), config=config)


_SCRIPT = "takes a YAML, and this is none. To make one of a script: vlft plan --translate {} --out NEW.yaml"


def read_yaml(path: str) -> list[tuple[str, tuple[str, ...]]]:
    """Read the flags of a flat YAML file.

    Returns:
        (name, words) of each flag. A list becomes several words, a mapping becomes JSON. A flag without a value has
        an empty word; with `null` or an empty list it is left out.

    Raises:
        ConfigError: the file is missing, not YAML, not a flat mapping, or gives a flag twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        from vlft.config.places import near_miss

        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}){near_miss(path)}") from error
    except ValueError as error:
        raise ConfigError(f"--config {path}: not in UTF-8 ({error}). Save it as UTF-8") from error
    try:
        content = read_text(f"--config {path}", text, empty="")
    except ConfigError as error:
        if path.endswith((".sh", ".txt")):
            raise ConfigError(f"--config {path}: {_SCRIPT.format(quoted(path))}") from error
        raise
    if content is None:
        return []
    if not isinstance(content, dict):
        if path.endswith((".sh", ".txt")):
            raise ConfigError(f"--config {path}: {_SCRIPT.format(quoted(path))}")
        raise ConfigError(f"--config {path}: expected `flag: value` lines, found a {type(content).__name__}")
    if "config" in content:
        raise ConfigError(f"--config {path}: a config file cannot name another (config: {content['config']})")
    return flags_of(content)


def flags_of(content: Mapping[Any, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Return (name, words) of each flag in the content of a YAML or JSON file, as `read_yaml` does."""
    found = []
    for name, value in content.items():
        if value is not None and value != []:
            values = value if isinstance(value, list) else [value]
            found.append((str(name).replace("-", "_"), tuple(_word(item) for item in values)))
    return found


def _at_home(one: Said) -> Said:
    """Return a flag of paths with `~` replaced by the home folder. A shell replaces it only at the start of a word."""
    kept = (word if os.path.lexists(word) else os.path.expanduser(word) for word in one.words)
    return replace(one, words=tuple(kept))


_PLACEHOLDER = re.compile(r"<[^<>\s]+>")


def placeholders(word: str) -> list[str]:
    """Return the placeholders in a word, such as `<MODEL>`. The user must replace them by values."""
    return _PLACEHOLDER.findall(word)


def quoted(word: str) -> str:
    """Return a word quoted for a shell, with double quotes if it contains single ones."""
    plain_inside = "'" in word and not set(word) & set('"$`\\!')
    return f'"{word}"' if plain_inside else shlex.quote(word)


def as_written(name: str, words: Iterable[str]) -> str:
    """Return a flag as a user writes it: `--name word word`."""
    return " ".join([f"--{name}", *map(quoted, words)])


def wrapped(start: str, flags: Mapping[str, Sequence[str]], *, indent: int) -> str:
    """Return a command line, wrapped between flags into lines of about `WIDTH` characters.

    Args:
        start: the words before the flags.
        flags: name -> words.
        indent: spaces before every line except the first.
    """
    lines = [start]
    for part in (as_written(name, words) for name, words in flags.items()):
        if len(lines[-1]) + len(part) > WIDTH:
            lines.append(part)
        else:
            lines[-1] += f" {part}"
    return f" \\\n{' ' * indent}".join(lines)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)
