"""`vlft check-data`: every row that cannot be trained, and why."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  vlft check-data train.json --image_folder images
  vlft check-data train.json more.jsonl --image_folder images --config examples/lora_vision.yaml \\
      --model_id Qwen/Qwen2-VL-2B-Instruct
  vlft check-data train.json --headers_only --json > report.json
  vlft check-data train.json --image_folder images --report look/ --fix clean.jsonl
"""


def run(argv: Sequence[str]) -> int:
    """Check the rows; 1 if any would be refused."""
    from vlft.cli.stdout import json_only

    with json_only("--json" in argv) as write:
        from vlft.check import check
        from vlft.check.fix import refuse_target, write_clean
        from vlft.check.page import refuse_folder, write_report
        from vlft.cli.parse_rows import RowParser
        from vlft.cli.quiet import quiet
        from vlft.data.costs.cache import cost_folder
        from vlft.data.files.index import RowIndex
        from vlft.interrupts import explained

        parser = RowParser(
            "check-data",
            description="Read every row and open every picture and video; say which rows cannot be trained, and why. "
            "Takes all flags of vlft train; --model_id adds token counts and --max_length.",
            epilog=EXAMPLES,
        )
        parser.add_argument(
            "--headers_only", "--headers-only", action="store_true", help="open media, but decode none: quick"
        )
        parser.add_argument("--workers", type=int, default=4, help="processes that share the work")
        parser.add_argument("--fix", metavar="OUT", help="write the rows that can be trained to OUT.jsonl (or .json)")
        parser.add_argument(
            "--report", metavar="DIR", help="write report.html, report.json and quarantine.jsonl into a folder"
        )
        files, parsed = parser.parse_files(argv)
        quiet()
        data, model = parsed.flags

        def before(index: RowIndex) -> None:
            if parsed.extra.report:
                refuse_folder(parsed.extra.report)
            if parsed.extra.fix:
                refuse_target(parsed.extra.fix, index)

        cache = cost_folder(os.environ)
        kept = "What was checked is kept. Run the same command again to resume." if cache else "Nothing was kept."
        with explained(kept):
            checked = check(
                files,
                data,
                model,
                given=parsed.given,
                headers_only=parsed.extra.headers_only,
                workers=parsed.extra.workers,
                cache=cache,
                before=before,
            )
        found = checked.found
        if parsed.extra.json:
            write(found.as_json())
        else:
            print(found.as_text())
        if parsed.extra.report:
            page = write_report(checked, parsed.extra.report)
            print(f"report: {page}", file=sys.stderr)
        if parsed.extra.fix:
            refused = write_clean(checked, parsed.extra.fix)
            written = int((checked.good < checked.training).sum())
            print(f"{written:,} rows: {parsed.extra.fix}; {len(found.bad):,} refused: {refused}", file=sys.stderr)
    return 1 if found.bad else 0
