"""What every verb begins with: its command line, stdout kept for one JSON document if asked for, quiet libraries.

A verb's module decorates what it does with its parsed command line:

    @command(parser)
    def run(flags, write): ...

Neighbours: `vlft.cli.stdout` and `vlft.cli.quiet` do the parts, `vlft.cli.main` calls `run(argv)`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from vlft.cli.quiet import quiet
from vlft.cli.stdout import json_only
from vlft.config.names import help_asked, wrong_usage

if TYPE_CHECKING:
    from vlft.config.parse import FlagParser

Write = Callable[[Any], None]


class CommandParser(argparse.ArgumentParser):
    """The command line of a verb that takes no flags of train.

    Args:
        verb: its name.
        examples: the end of its help.
    """

    def __init__(self, verb: str, *, description: str, examples: str) -> None:
        super().__init__(
            prog=f"vlft {verb}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._verb = verb

    def error(self, message: str) -> NoReturn:
        raise wrong_usage(self._verb, message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags.

        Raises:
            UsageError: the command line makes no sense.
        """
        self.answer_help(argv)
        return self.parse_args(argv)

    def answer_help(self, argv: Sequence[str]) -> None:
        """Print the help and exit, if argv asks for it in any form."""
        if help_asked(argv):
            self.print_help()
            self.exit()


def train_parser(verb: str, **kwargs: Any) -> FlagParser:
    """A parser of every flag of train. Imports transformers; refuses what `vlft.config.door` refuses."""
    quiet()
    from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
    from vlft.config.parse import FlagParser

    return FlagParser(verb, (DataFlags, ModelFlags, TrainFlags), **kwargs)


def add_json(parser: argparse.ArgumentParser, instead_of: str = "text") -> None:
    """Add `--json`, which `command` acts on."""
    parser.add_argument("--json", action="store_true", help=f"print one JSON document instead of {instead_of}")


def command(
    parser: Callable[[], Any], *, heavy: bool = True
) -> Callable[[Callable[[Any, Write], int]], Callable[[Sequence[str]], int]]:
    """Make `run(argv) -> exit status` of a function of a parsed command line.

    Args:
        parser: builds the verb's parser; called when the verb runs, so that it may import what it needs.
        heavy: the verb loads torch; its libraries are asked to be quiet.

    Returns:
        A decorator. What it decorates is called with the parsed command line and a function that writes the one JSON
        document of `--json`; whatever else is printed goes to stderr then.
    """

    def decorate(work: Callable[[Any, Write], int]) -> Callable[[Sequence[str]], int]:
        @functools.wraps(work)
        def run(argv: Sequence[str]) -> int:
            flags = argv[: argv.index("--")] if "--" in argv else argv
            with json_only("--json" in flags) as write:
                parsed = parser().parse(argv)
                if heavy:
                    quiet()
                return work(parsed, write)

        return run

    return decorate
