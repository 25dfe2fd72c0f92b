"""`vlft report`: write the report page of a run again, from the files in its folder."""

from __future__ import annotations

import argparse

from vlft.cli.command import CommandParser, Write, command

EXAMPLES = """\
examples:
  vlft report output/run
  vlft report output/run --html run.html
"""


def parser() -> CommandParser:
    """Build the command line of `vlft report`."""
    parser = CommandParser(
        "report",
        description="Write a run's report.html again: curves, time per activity, rows, answers, settings. vlft train "
        "also writes it during the run. Needs no GPU and no model.",
        examples=EXAMPLES,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, finished or not")
    parser.add_argument("--html", metavar="F", help="the page to write (default: RUN/report.html)")
    return parser


@command(parser, heavy=False)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Write the page and print its path."""
    from vlft.report import make_report

    print(f"report: {make_report(flags.run, flags.html)}")
    return 0
