"""The common start of every verb: parse its command line, reserve stdout for JSON, silence other libraries.

A verb's module decorates the function that does its work:

    @command(parser)
    def run(flags, write): ...

Neighbours: `vlft.cli.stdout` reserves stdout, `vlft.cli.quiet` silences libraries, `vlft.cli.main` calls `run(argv)`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vlft.cli.quiet import quiet
from vlft.cli.stdout import json_only
from vlft.config.names import help_asked, wrong_usage

Write = Callable[[Any], None]


class CommandParser(argparse.ArgumentParser):
    """The command line of a verb that does not take the flags of train.

    Args:
        verb: the verb's name.
        description: the first part of its help.
        examples: the last part of its help.
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
        """Parse the flags.

        Raises:
            UsageError: the command line cannot be parsed.
        """
        self.answer_help(argv)
        return self.parse_args(argv)

    def answer_help(self, argv: Sequence[str]) -> None:
        """Print the help and exit if argv asks for it in any form."""
        if help_asked(argv):
            self.print_help()
            self.exit()


def add_json(parser: argparse.ArgumentParser, instead_of: str = "text") -> None:
    """Add `--json`, which `command` reads.

    Args:
        instead_of: what the verb prints without `--json`, for the help.
    """
    parser.add_argument("--json", action="store_true", help=f"print one JSON document instead of {instead_of}")


def command(
    parser: Callable[[], Any], *, heavy: bool = True
) -> Callable[[Callable[[Any, Write], int]], Callable[[Sequence[str]], int]]:
    """Turn a function of a parsed command line into `run(argv) -> exit status`.

    Args:
        parser: builds the verb's parser. It is called when the verb runs, so it may import heavy modules.
        heavy: the verb loads torch, so other libraries are silenced.

    Returns:
        A decorator. The decorated function is called with the parsed command line and with a function that writes the
        JSON document of `--json`. With `--json` all other output goes to stderr.
    """

    def decorate(work: Callable[[Any, Write], int]) -> Callable[[Sequence[str]], int]:
        @functools.wraps(work)
        def run(argv: Sequence[str]) -> int:
            flags = argv[: argv.index("--")] if "--" in argv else argv
            if heavy:
                quiet()
            with json_only("--json" in flags) as write:
                return work(parser().parse(argv), write)

        return run

    return decorate
