"""`vlft check-data`: every row that cannot be trained, and why."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = """\
examples:
  vlft check-data train.json --image_folder images
  vlft check-data train.json more.jsonl --image_folder images --config examples/lora_vision.yaml \\
      --model_id Qwen/Qwen2-VL-2B-Instruct
  vlft check-data train.json --headers_only --json > report.json
"""


def run(argv: Sequence[str]) -> int:
    """Check the rows; 1 if any would be refused."""
    from vlft.cli.stdout import json_only

    with json_only("--json" in argv) as write:
        from vlft.check import check
        from vlft.cli.quiet import quiet
        from vlft.cli.rows import RowParser

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
        files, parsed = parser.parse_files(argv)
        if parsed.extra.workers < 0:
            parser.error(f"--workers {parsed.extra.workers}: a number of processes, 0 or more")
        quiet()
        data, model = parsed.flags
        found = check(
            files,
            data,
            model,
            given=parsed.given,
            headers_only=parsed.extra.headers_only,
            workers=parsed.extra.workers,
        )
        if parsed.extra.json:
            write(found.as_json())
        else:
            print(found.as_text())
    return 1 if found.bad else 0
