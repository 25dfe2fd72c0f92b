"""`vlft report`: write the report page of a run again, or one page about several runs, from their folders."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from vlft.cli.command import CommandParser, Write, command

EXAMPLES = """\
examples:
  vlft report output/run
  vlft report output/run --html run.html
  vlft report output/small output/large --html both.html
"""


def parser() -> CommandParser:
    """Build the command line of `vlft report`."""
    parser = CommandParser(
        "report",
        description="Write a run's report.html again: curves, time per activity, rows, answers, settings. vlft train "
        "also writes it during the run. Several runs are compared in one page. Needs no GPU and no model.",
        examples=EXAMPLES,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, finished or not; several are compared")
    parser.add_argument(
        "--html", metavar="F", help="the page to write (default: RUN/report.html, of several runs compare.html)"
    )
    return parser


@command(parser, heavy=False)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Write the page and print its path."""
    from vlft.report import make_report

    say = partial(print, file=sys.stderr)
    print(f"report: {make_report(flags.runs, flags.html, say=say)}")
    return 0
