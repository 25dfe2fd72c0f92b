"""`vlft report`: make the page of a run anew, from what is in its folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

EXAMPLES = """\
examples:
  vlft report output/run
  vlft report output/run --html run.html
"""


def run(argv: Sequence[str]) -> int:
    """Write the page, say where it is."""
    parser = argparse.ArgumentParser(
        prog="vlft report",
        description="Make a run's report.html anew: curves, where the time went, rows, answers, settings. vlft train "
        "writes it too, while it goes on; this needs no GPU and no model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, finished or not")
    parser.add_argument("--html", metavar="F", help="the page to write (default: RUN/report.html)")
    args = parser.parse_args(argv)
    from vlft.report import make_report

    print(f"report: {make_report(args.run, args.html)}")
    return 0
