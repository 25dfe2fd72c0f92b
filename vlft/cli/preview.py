"""`vlft preview`: one row as the model sees it, trained tokens marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  vlft preview train.json --image_folder images --model_id Qwen/Qwen2-VL-2B-Instruct --index 17
  vlft preview train.json --model_id Qwen/Qwen2-VL-2B-Instruct --config examples/lora_vision.yaml --html row.html
"""


def run(argv: Sequence[str]) -> int:
    """Show the row."""
    from vlft.cli.stdout import json_only

    with json_only("--json" in argv) as write:
        from vlft.cli.quiet import quiet
        from vlft.cli.rows import RowParser
        from vlft.preview import look

        parser = RowParser(
            "preview",
            description="Show one row as the model sees it: tokens that are trained are green on a terminal "
            "(NO_COLOR=1 or a pipe: between ⟦ and ⟧), the pads of a picture are folded. Takes all flags of vlft train.",
            epilog=EXAMPLES,
        )
        parser.add_argument("--index", type=int, metavar="N", default=0, help="which row, from 0, as in messages")
        parser.add_argument("--html", metavar="F", help="write a page with the pictures as the model sees them, too")
        files, parsed = parser.parse_files(argv)
        if len(files) > 1:
            parser.error(f"{len(files)} data files, and a row is of one. Name the one: vlft preview {files[0]} ...")
        quiet()
        data, model = parsed.flags
        preview = look(files[0], parsed.extra.index, data, model, given=parsed.given)
        if parsed.extra.html:
            from vlft.preview.page import write_html

            write_html(preview, parsed.extra.html)
        if parsed.extra.json:
            write(preview.as_json())
        else:
            from vlft.preview.text import as_text

            print(as_text(preview, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if parsed.extra.html:
        print(f"page: {parsed.extra.html}", file=sys.stderr)
    return 0
