"""argv and YAML -> flags. YAML becomes argv in front of the real one, so both take one path and flags win."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from vlft.config.names import check_names, names_in, wrong_usage
from vlft.config.refused import REPLACED
from vlft.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a command line says.

    Attributes:
        flags: one instance of each dataclass asked for, in order.
        extra: the arguments the verb added itself.
        given: names of the flags the user set, in YAML or on the command line.
        effective: flag -> value for every flag that was given or has a default of vlft's own.
    """

    flags: tuple[Any, ...]
    extra: Namespace
    given: frozenset[str]
    effective: dict[str, Any]


class _Help(argparse.HelpFormatter):
    """Defaults where there are any, one spelling of each flag, and texts of several lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help and action.default not in (None, argparse.SUPPRESS, []) and "(default" not in action.help:
            return action.help + " (default: %(default)s)"
        return action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.metavar if isinstance(action.metavar, str) else action.dest.upper())
        return f"{action.option_strings[0]} {value}"


class FlagParser(HfArgumentParser):
    """HfArgumentParser that answers wrong flags in one message and never guesses an abbreviation.

    Args:
        verb: `train`, for messages and `--help`.
        dataclass_types: the flags it takes.
    """

    def __init__(self, verb: str, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        kwargs = {"formatter_class": _Help, "usage": f"vlft {verb} [--config FILE.yaml] [--flag value ...]"} | kwargs
        super().__init__(list(dataclass_types), prog=f"vlft {verb}", allow_abbrev=False, **kwargs)
        self.verb = verb
        for action in self._actions:
            if action.dest in REPLACED:
                action.help = argparse.SUPPRESS  # refused by name, see `refused`
            elif action.nargs != 0 and action.choices is None and action.metavar is None:
                action.metavar = "VALUE"
            if {"true", "false"} <= set(action.choices or ()):  # bool flags of others, with an auto of ours
                action.type, action.nargs, action.const = _word_of_bool, "?", "true"
        self.add_argument("--config", metavar="FILE.yaml", help="flags as `name: value` lines; flags given here win")
        self._ours = {f.name for cls in dataclass_types for f in dataclasses.fields(cls) if f.init}

    def error(self, message: str) -> NoReturn:
        raise wrong_usage(self.verb, message)

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Flags from argv, with `--config` read first.

        Raises:
            UsageError: unknown, renamed or unsupported flag, a value of the wrong kind, or `--config` twice.
            ConfigError: the YAML file is missing or not a flat mapping, or the flags contradict each other.
        """
        config_file = self._config_file(argv)
        argv = (read_yaml(config_file) if config_file else []) + list(argv)
        given = self._check_names(argv)
        namespace = self.parse_args(argv)
        values = vars(namespace)
        flags = []
        for cls in self.dataclass_types:
            names = [f.name for f in dataclasses.fields(cls) if f.init]
            try:
                flags.append(cls(**{name: values[name] for name in names}))
            except (ValueError, ImportError) as error:  # what TrainingArguments raises on flags it cannot carry out
                raise ConfigError(f"vlft {self.verb}: {error}") from error
        extra = Namespace(**{k: v for k, v in values.items() if k not in self._ours and k != "config"})
        return Parsed(flags=tuple(flags), extra=extra, given=frozenset(given), effective=self._effective(values, given))

    def _config_file(self, argv: Sequence[str]) -> str | None:
        files = []
        for i, word in enumerate(argv):
            if word == "--config":
                if i + 1 == len(argv):
                    self.error("--config needs a file")
                files.append(argv[i + 1])
            elif word.startswith("--config="):
                files.append(word.partition("=")[2])
        if len(files) > 1:
            self.error(f"--config is given twice, {files[0]} and {files[1]}. Keep one; flags may change what it says")
        return files[0] if files else None

    def _check_names(self, argv: Sequence[str]) -> set[str]:
        """Names of the flags in argv, each known and supported."""
        check_names(self.verb, argv, set(names_in(list(self._option_string_actions))))
        names = names_in(argv)
        return {name if name in self._ours else name.removeprefix("no_") for name in names} & self._ours

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
    """A flat YAML file as argv: lists become several values, mappings JSON.

    Raises:
        ConfigError: missing, not YAML, or not a flat mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML in UTF-8 ({error})") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: want `flag: value` lines, found a {type(content).__name__}")
    argv: list[str] = []
    for name, value in content.items():
        if name == "config":
            raise ConfigError(f"--config {path}: a config file cannot name another (config: {value})")
        if value is None:
            continue
        argv.append(f"--{name}")
        argv += [_word(item) for item in (value if isinstance(value, list) else [value])]
    return argv


#: Flags whose value may be a path; a model's id or a word is none, where nothing on disk has that name.
PATHS = ("data_path", "data_mix", "eval_path", "image_folder", "model_id", "output_dir", "deepspeed")


def write_yaml(path: str | Path, effective: dict[str, Any]) -> None:
    """Write flags so that `--config` reads them back, from any directory: paths of what is there are made absolute."""
    flags = {name: _absolute(value) if name in PATHS else value for name, value in effective.items()}
    Path(path).write_text(yaml.safe_dump(flags, sort_keys=True, allow_unicode=True), encoding="utf-8")


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value


def _word_of_bool(text: str) -> str:
    """`True`, `yes` and `1` mean true wherever a flag is a bool; where it may be `auto` besides, too."""
    word = text.lower()
    return {"yes": "true", "y": "true", "t": "true", "1": "true", "no": "false", "n": "false", "f": "false"}.get(
        word, "false" if word == "0" else word
    )


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)


def _plain(value: Any) -> Any:
    """A value YAML can hold: enums become their word."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
