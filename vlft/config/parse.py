"""Parse argv and YAML into flags. Imports nothing heavy: the flags of transformers are imported when they are built.

`vlft.config.door` checks the words, then argparse separates a verb's own arguments from the flags. The flags of the
YAML come first, so that the flags of the command line override them.
"""

from __future__ import annotations

import argparse
import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from vlft.config import door, grpo, preference, table, variants
from vlft.config.common_flags import COMMON, TEXTS
from vlft.config.flags import DataFlags, ModelFlags, RunFlags
from vlft.config.kinds import MOST_WORDS, Bool, Kind, Word
from vlft.config.names import help_asked, wrong_usage
from vlft.errors import ConfigError

#: The dataclasses that declare vlft's own flags.
OWN = (DataFlags, ModelFlags, RunFlags)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """A parsed command line.

    Attributes:
        flags: one instance of each requested dataclass, in order.
        extra: the verb's own arguments.
        given: names of the flags that the user set, in YAML or on the command line.
        typed: those of the command line.
        effective: flag -> value, for every flag that was set or whose default is vlft's own.
    """

    flags: tuple[Any, ...]
    extra: Namespace
    given: frozenset[str]
    typed: frozenset[str]
    effective: dict[str, Any]


def train_types(values: Mapping[str, Any], extra: Namespace) -> tuple[type, ...]:
    """Return the dataclasses of a training run. Imports transformers."""
    from vlft.config.training import TrainFlags

    return DataFlags, ModelFlags, TrainFlags


class _Help(argparse.HelpFormatter):
    """Print defaults, one spelling of each flag, and texts of several lines unchanged."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        switch = action.nargs == 0  # off by default
        if not action.help or switch or action.default in (None, argparse.SUPPRESS, []) or "(default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.metavar if isinstance(action.metavar, str) else action.dest.upper())
        return f"{action.option_strings[0]} {value}"


class FlagParser(argparse.ArgumentParser):
    """Parser of a verb that takes the flags of train. It reports all wrong flags in one message.

    Args:
        verb: the verb's name, for messages and `--help`.
        types: returns the dataclasses to build, given the flags that were set and the verb's own arguments.
        helped: the dataclasses whose flags its help lists; with `RunFlags`, it lists all flags of TrainingArguments.
    """

    def __init__(
        self,
        verb: str,
        types: Callable[[Mapping[str, Any], Namespace], Sequence[type]] = train_types,
        *,
        helped: Sequence[type] = OWN,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("usage", f"vlft {verb} [--config FILE.yaml] [--flag value ...]")
        super().__init__(prog=f"vlft {verb}", allow_abbrev=False, formatter_class=_Help, **kwargs)
        self.verb = verb
        self.types = types
        self._helped = helped
        self._flags: dict[str, argparse.Action] = {}
        self._actions[0].help = f"show the common flags (all: vlft {verb} --help all)"
        groups = {cls: self.add_argument_group(cls._argument_group_name) for cls in helped}  # type: ignore[attr-defined]
        declared = {field.name: (groups[cls], field) for cls in helped for field in dataclasses.fields(cls)}
        for name in dict.fromkeys((*COMMON.get(verb, ()), *declared, *table.OF_TRAIN)):
            if (kind := table.OF_TRAIN.get(name)) is None:
                continue  # declared by vlft, and refused by `vlft.config.door`
            group, field = declared.get(name, (groups.get(RunFlags, self), None))
            text = argparse.SUPPRESS if field is None else _described(field)
            self._flags[name] = _add_flag(group, name, kind, text)
            if isinstance(kind, Bool) and kind.many == "maybe":
                group.add_argument(
                    f"--no_{name}", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
                )
        self.add_argument(
            "--config", metavar="FILE.yaml", help="flags as `name: value` lines; the command line overrides them"
        )

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
            self._print_help(every=asked == "all")
            raise SystemExit(0)
        known = {option.lstrip("-").replace("-", "_") for option in self._option_string_actions}
        passed = door.check(self.verb, argv, known)
        door.say_remarks(passed)
        namespace = vars(self.parse_args(list(passed.argv)))
        values = {name: _value(table.OF_TRAIN[name], namespace.pop(name)) for name in self._flags if name in namespace}
        for name in self._flags:
            if namespace.pop(f"no_{name}", False):
                values[name] = False
        namespace.pop("config")
        extra = Namespace(**namespace)
        given, values = frozenset(values), _defaults(values) | values
        flags = []
        for cls in self.types(values, extra):
            names = {field.name for field in dataclasses.fields(cls) if field.init}
            try:
                flags.append(cls(**{name: value for name, value in values.items() if name in names}))
            except (ValueError, ImportError) as error:  # TrainingArguments raises them for flags it cannot carry out
                raise ConfigError(f"vlft {self.verb}: {error}") from error
        typed = given & {spelled for name in passed.typed for spelled in (name, name.removeprefix("no_"))}
        return Parsed(flags=tuple(flags), extra=extra, given=given, typed=typed, effective=_effective(values))

    def _print_help(self, *, every: bool) -> None:
        """Print the help: the verb's own flags and the common flags of train, or every flag."""
        if RunFlags in self._helped:
            self._describe_inherited()
        if not every:
            for name, action in self._flags.items():
                if name not in COMMON.get(self.verb, ()):
                    action.help = argparse.SUPPRESS
            self.epilog = f"{self.epilog or ''}\nMore flags: vlft {self.verb} --help all\n"
        self.print_help()

    def _describe_inherited(self) -> None:
        """Set the help of the flags that are declared by TrainingArguments. Imports transformers."""
        from vlft.config.training import TrainFlags

        for field in dataclasses.fields(TrainFlags):
            if (action := self._flags.get(field.name)) is not None and action.help is argparse.SUPPRESS:
                action.help = _described(field)


def _add_flag(group: Any, name: str, kind: Kind, text: str) -> argparse.Action:
    """Add a flag whose words `vlft.config.door` has checked. Its value is the words as text."""
    few = isinstance(kind, Word) and len(kind.words) <= MOST_WORDS and kind.many != "some"
    metavar = f"{{{','.join(kind.words)}}}" if few and isinstance(kind, Word) else "VALUE"
    many = {"one": {}, "maybe": {"nargs": "?", "const": "true"}, "some": {"nargs": "+"}}[kind.many]
    spelled = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    return group.add_argument(*spelled, metavar=metavar, default=argparse.SUPPRESS, help=text, **many)


def _described(field: dataclasses.Field[Any]) -> str:
    """Return the help of a flag, with its default."""
    text = TEXTS.get(field.name) or " ".join(field.metadata.get("help", "").split())
    default = getattr(field.default, "value", field.default)
    if default in (None, dataclasses.MISSING, "") or "(default" in text:
        return text
    return f"{text} (default: {default})"


def _value(kind: Kind, words: str | list[str]) -> Any:
    return [kind.value(word) for word in words] if isinstance(words, list) else kind.value(words)


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that depend on other flags."""
    return preference.defaults(values) | grpo.defaults(values) | variants.defaults(values)


def _effective(values: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that were set, and vlft's own defaults, in alphabetical order."""
    own = {field.name: field for cls in OWN for field in dataclasses.fields(cls)}
    found = {name: _default(field) for name, field in own.items() if name in table.OF_TRAIN} | values
    method = found.get("method", "sft")
    idle = [*preference.unused(method), *grpo.unused(method)]
    return {n: found[n] for n in sorted(found) if found[n] is not None and found[n] != [] and n not in idle}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
