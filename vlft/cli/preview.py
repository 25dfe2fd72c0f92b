"""`vlft preview`: show rows as the model sees them, with trained tokens marked."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from vlft.cli.command import Write, command
from vlft.config.names import wrong_usage

if TYPE_CHECKING:
    from vlft.cli.parse_rows import RowParser
    from vlft.config.parse import Parsed

EXAMPLES = """\
examples:
  vlft preview train.json --image_folder images --model_id Qwen/Qwen2-VL-2B-Instruct --index 17
  vlft preview train.json --model_id Qwen/Qwen2-VL-2B-Instruct --config examples/lora_vision.yaml --html row.html
  vlft preview train.json --model_id Qwen/Qwen2-VL-2B-Instruct --index 3,17,40-44 --html rows.html
"""


def parser() -> RowParser:
    """Build the command line of `vlft preview`."""
    from vlft.cli.parse_rows import RowParser

    parser = RowParser(
        "preview",
        description="Show rows as the model sees them. Trained tokens are green on a terminal; with NO_COLOR=1 or in a "
        "pipe they are between ⟦ and ⟧. The pads of a picture are folded. Takes all flags of vlft train.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--index", metavar="N", default="0", help="number of the row, from 0, as in messages; or several: 3,17,40-44"
    )
    parser.add_argument("--html", metavar="F", help="also write a page with the pictures as the model sees them")
    return parser


@command(parser)
def run(parsed: Parsed, write: Write) -> int:
    """Show the rows. Return 1 if any of them is refused."""
    from vlft.cli.parse_rows import data_files, rows_in
    from vlft.preview import Refused, preview_rows

    (data, model), extra = parsed.flags, parsed.extra
    files = data_files("preview", parsed)
    if len(files) > 1:
        one = f"{len(files)} data files, but --index counts the rows of one. Pass one: vlft preview {files[0]} ..."
        raise wrong_usage("preview", one)
    try:
        indices = rows_in(extra.index)
    except ValueError as error:
        fix = "Use a number from 0, or several: 3,17,40-44"
        raise wrong_usage("preview", f"--index {extra.index}: {error}. {fix}") from error
    rows = list(preview_rows(files[0], indices, data, model, given=parsed.given))
    if extra.html:
        from vlft.preview.page import write_html

        write_html(rows, extra.html)
    if extra.json:
        found = [row.as_json() for row in rows]
        write(found[0] if len(indices) == 1 else {"rows": found})
    else:
        from vlft.preview.text import as_text

        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n\n".join(as_text(row, color=color) for row in rows))
    refused = [row.row for row in rows if isinstance(row, Refused)]
    for row in refused:
        print(f"refused: {row}", file=sys.stderr)
    if extra.html:
        print(f"page: {extra.html}", file=sys.stderr)
    return 1 if refused else 0
