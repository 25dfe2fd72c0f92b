"""`vlft preview`: rows as the model sees them, trained tokens marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  vlft preview train.json --image_folder images --model_id Qwen/Qwen2-VL-2B-Instruct --index 17
  vlft preview train.json --model_id Qwen/Qwen2-VL-2B-Instruct --config examples/lora_vision.yaml --html row.html
  vlft preview train.json --model_id Qwen/Qwen2-VL-2B-Instruct --index 3,17,40-44 --html rows.html
"""
MOST_ROWS = 200


def run(argv: Sequence[str]) -> int:
    """Show the row."""
    from vlft.cli.stdout import json_only

    with json_only("--json" in argv) as write:
        from vlft.cli.parse_rows import RowParser
        from vlft.cli.quiet import quiet
        from vlft.preview import Preview, Refused, preview_row, preview_rows

        parser = RowParser(
            "preview",
            description="Show rows as the model sees them: tokens that are trained are green on a terminal "
            "(NO_COLOR=1 or a pipe: between ⟦ and ⟧), the pads of a picture are folded. Takes all flags of vlft train.",
            epilog=EXAMPLES,
        )
        parser.add_argument(
            "--index", metavar="N", default="0", help="which row, from 0, as in messages; or several: 3,17,40-44"
        )
        parser.add_argument("--html", metavar="F", help="write a page with the pictures as the model sees them, too")
        files, parsed = parser.parse_files(argv)
        if len(files) > 1:
            parser.error(f"{len(files)} data files, and a row is of one. Name the one: vlft preview {files[0]} ...")
        quiet()
        data, model = parsed.flags
        try:
            indices = rows_in(parsed.extra.index)
        except ValueError as error:
            parser.error(f"--index {parsed.extra.index}: {error}. Give a row from 0, or several: 3,17,40-44")
        if len(indices) == 1:
            rows: list[Preview | Refused] = [preview_row(files[0], indices[0], data, model, given=parsed.given)]
        else:
            rows = list(preview_rows(files[0], indices, data, model, given=parsed.given))
        if parsed.extra.html:
            from vlft.preview.page import write_html

            write_html(rows, parsed.extra.html)
        if parsed.extra.json:
            found = [row.as_json() for row in rows]
            write(found[0] if len(indices) == 1 else {"rows": found})
        else:
            from vlft.preview.text import as_text

            color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            print("\n\n".join(as_text(row, color=color) for row in rows if isinstance(row, Preview)))
    refused = [row.row for row in rows if isinstance(row, Refused)]
    for row in refused:
        print(f"refused: {row}", file=sys.stderr)
    if parsed.extra.html:
        print(f"page: {parsed.extra.html}", file=sys.stderr)
    return 1 if refused else 0


def rows_in(text: str) -> list[int]:
    """`3,17,40-44` as numbers, each once, in the order given.

    Raises:
        ValueError: something else, a range that runs backwards, or more than `MOST_ROWS`.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first and last.isdigit():
            return [-int(last)]  # refused with how many rows there are
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part.strip()!r} is no row")
        start, end = int(first), int(last or first)
        if end < start:
            raise ValueError(f"{part.strip()} runs backwards")
        if end - start >= MOST_ROWS or len(found) >= MOST_ROWS:
            raise ValueError(f"more than {MOST_ROWS} rows are too many to look at")
        found |= dict.fromkeys(range(start, end + 1))
    return list(found)
