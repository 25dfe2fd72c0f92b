"""`vlft check-data`: find every row that cannot be trained, and report why."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from vlft.cli.command import Write, command

if TYPE_CHECKING:
    from vlft.cli.parse_rows import RowParser
    from vlft.config.parse import Parsed
    from vlft.data.files.index import RowIndex

EXAMPLES = """\
examples:
  vlft check-data train.json --image_folder images
  vlft check-data train.json more.jsonl --image_folder images --config examples/lora_vision.yaml \\
      --model_id Qwen/Qwen2-VL-2B-Instruct
  vlft check-data train.json --headers_only --json > report.json
  vlft check-data train.json --image_folder images --report look/ --fix clean.jsonl
"""


def parser() -> RowParser:
    """Build the command line of `vlft check-data`."""
    from vlft.cli.parse_rows import RowParser

    parser = RowParser(
        "check-data",
        description="Read every row, open every picture and video, and report which rows cannot be trained, and why. "
        "Takes all flags of vlft train. --model_id adds token counts and the check of --max_length.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--headers_only", "--headers-only", action="store_true", help="read only the headers of media: fast"
    )
    parser.add_argument("--workers", type=int, default=4, help="processes that check rows")
    parser.add_argument("--fix", metavar="OUT", help="write the rows that can be trained to OUT.jsonl (or .json)")
    parser.add_argument(
        "--report", metavar="DIR", help="write report.html, report.json and quarantine.jsonl into this folder"
    )
    return parser


@command(parser)
def run(parsed: Parsed, write: Write) -> int:
    """Check the rows. Return 1 if any row is refused."""
    from vlft.check import check
    from vlft.check.fix import refuse_target, write_clean
    from vlft.check.page import refuse_folder, write_report
    from vlft.cli.parse_rows import data_files
    from vlft.data.costs.cache import cost_folder
    from vlft.interrupts import explained

    (data, model), extra = parsed.flags, parsed.extra
    files = data_files("check-data", parsed)

    def before(index: RowIndex) -> None:
        if extra.report:
            refuse_folder(extra.report)
        if extra.fix:
            refuse_target(extra.fix, index)

    cache = cost_folder(os.environ)
    read = {"headers_only": extra.headers_only, "workers": extra.workers, "cache": cache, "before": before}
    with explained(
        "The results so far are saved. Run the same command again to resume." if cache else "No results were saved."
    ):
        checked = check(files, data, model, given=parsed.given, **read)
    found = checked.found
    if extra.json:
        write(found.as_json())
    else:
        print(found.as_text())
    if extra.report:
        print(f"report: {write_report(checked, extra.report)}", file=sys.stderr)
    if extra.fix:
        refused = write_clean(checked, extra.fix)
        written = int((checked.good < checked.training).sum())
        print(f"{written:,} rows: {extra.fix}; {len(found.bad):,} refused: {refused}", file=sys.stderr)
    return 1 if found.bad else 0
