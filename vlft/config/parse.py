"""Parse argv and YAML into flags.

`vlft.config.door` checks the words, then argparse parses them. The flags of the YAML come first, so that the flags of
the command line override them.
"""

from __future__ import annotations

import argparse
import dataclasses
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from vlft.config import door, said
from vlft.config.common_flags import COMMON, TEXTS
from vlft.config.kits.common import REPLACED
from vlft.config.names import help_asked, wrong_usage
from vlft.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """A parsed command line.

    Attributes:
        flags: one instance of each requested dataclass, in order.
        extra: the verb's own arguments.
        given: names of the flags that the user set, in YAML or on the command line.
        effective: flag -> value, for every flag that was set or whose default is vlft's own.
    """

    flags: tuple[Any, ...]
    extra: Namespace
    given: frozenset[str]
    effective: dict[str, Any]


class _Help(argparse.HelpFormatter):
    """Print defaults, one spelling of each flag, and texts of several lines unchanged."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        switch = action.nargs == 0  # off by default
        if (
            action.help
            and not switch
            and action.default not in (None, argparse.SUPPRESS, [])
            and "(default" not in action.help
        ):
            return action.help + " (default: %(default)s)"
        return action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.metavar if isinstance(action.metavar, str) else action.dest.upper())
        return f"{action.option_strings[0]} {value}"


class FlagParser(HfArgumentParser):
    """HfArgumentParser that reports all wrong flags in one message and accepts no abbreviations.

    Args:
        verb: the verb's name, for messages and `--help`.
        dataclass_types: the dataclasses whose fields are its flags.
    """

    def __init__(self, verb: str, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        kwargs = {"formatter_class": _Help, "usage": f"vlft {verb} [--config FILE.yaml] [--flag value ...]"} | kwargs
        super().__init__(list(dataclass_types), prog=f"vlft {verb}", allow_abbrev=False, **kwargs)
        self.verb = verb
        for action in self._actions:
            action.help = TEXTS.get(action.dest, action.help)
            if action.dest in REPLACED:
                action.help = argparse.SUPPRESS  # `vlft.config.door` refuses it
            elif action.nargs != 0 and action.choices is None and action.metavar is None:
                action.metavar = "VALUE"
            if {"true", "false"} <= set(action.choices or ()):  # bool flags of transformers to which vlft adds `auto`
                action.type, action.nargs, action.const = _word_of_bool, "?", "true"
            if action.dest == "help":
                action.help = f"show the common flags (all: vlft {verb} --help all)"
        self.add_argument(
            "--config", metavar="FILE.yaml", help="flags as `name: value` lines; the command line overrides them"
        )
        self._ours = {f.name for cls in dataclass_types for f in dataclasses.fields(cls) if f.init}

    def error(self, message: str) -> NoReturn:
        raise wrong_usage(self.verb, message)

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Parse argv and the file of `--config`.

        Raises:
            UsageError: a flag is unknown, has another name here or is not supported, a value is of the wrong kind, or
                `--config` is given twice.
            ConfigError: the file of `--config` is missing or not a flat mapping, a value is out of range, or flags
                contradict each other.
        """
        if asked := help_asked(argv):
            if asked == "common":
                self._keep_common()
            self.print_help()
            raise SystemExit(0)
        options = {option.lstrip("-").replace("-", "_") for option in self._option_string_actions}
        passed = door.check(self.verb, argv, {name for name in options if name.removeprefix("no_") not in REPLACED})
        door.say_remarks(passed)
        given = {name if name in self._ours else name.removeprefix("no_") for name in passed.given} & self._ours
        namespace = self.parse_args(list(passed.argv))
        values = vars(namespace)
        flags = []
        for cls in self.dataclass_types:
            names = [f.name for f in dataclasses.fields(cls) if f.init]
            try:
                flags.append(cls(**{name: values[name] for name in names}))
            except (ValueError, ImportError) as error:  # TrainingArguments raises them for flags it cannot carry out
                raise ConfigError(f"vlft {self.verb}: {error}") from error
        extra = Namespace(**{k: v for k, v in values.items() if k not in self._ours and k != "config"})
        return Parsed(flags=tuple(flags), extra=extra, given=frozenset(given), effective=self._effective(values, given))

    def _keep_common(self) -> None:
        """Keep only the common flags of train and the verb's own flags in the help."""
        for action in self._actions:
            if action.dest in self._ours and (action.dest not in COMMON.get(self.verb, ()) or action.nargs == 0):
                action.help = argparse.SUPPRESS
        self.epilog = f"{self.epilog or ''}\nMore flags: vlft {self.verb} --help all\n"

    def _effective(self, values: dict[str, Any], given: set[str]) -> dict[str, Any]:
        own = {
            f.name
            for cls in self.dataclass_types
            for base in cls.__mro__
            if base.__module__.startswith("vlft.")
            for f in dataclasses.fields(base)
            if f.name in base.__dict__.get("__annotations__", {})
        } - set(REPLACED)
        return {
            name: _plain(values[name])
            for name in sorted(own | given)
            if values[name] is not None and values[name] != []
        }


def read_yaml(path: str) -> list[str]:
    """Read a flat YAML file as words of argv.

    Raises:
        ConfigError: the file is missing, not YAML, or not a flat mapping.
    """
    return [word for name, words in said.read_yaml(path) for word in (f"--{name}", *words)]


def _word_of_bool(text: str) -> str:
    """Return `true` or `false` for any word of a bool, and other words (`auto`) in lower case."""
    word = text.lower()
    return {"yes": "true", "y": "true", "t": "true", "1": "true", "no": "false", "n": "false", "f": "false"}.get(
        word, "false" if word == "0" else word
    )


def _plain(value: Any) -> Any:
    """Return a value that YAML can hold: an enum becomes its value."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
