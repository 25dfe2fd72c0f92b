"""`vlft export`: write rows for other trainers, with pictures as bytes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from vlft.cli.command import Write, command
from vlft.config.names import wrong_usage
from vlft.text import counted, printable

if TYPE_CHECKING:
    from vlft.cli.parse_rows import RowParser
    from vlft.config.parse import Parsed

KINDS = ("verl", "trl", "calibration")
SHOWN = 10  # skipped rows that are listed
DEFAULT_SEED = 42

EXAMPLES = """\
examples:
  vlft export trl train.json exported --image_folder images --model_id Qwen/Qwen2-VL-2B-Instruct
  vlft export verl train.json exported --config examples/lora_vision.yaml --pictures resized
  vlft export calibration train.json calibration --config examples/lora_vision.yaml --rows 256
"""


def parser() -> RowParser:
    """Build the command line of `vlft export`."""
    from vlft.cli.parse_rows import RowParser

    parser = RowParser(
        "export",
        description="Write rows as OUT/data.parquet for verl (GRPO), TRL (SFT, GRPO; pairs with --method dpo) or the "
        "calibration of\nllm-compressor. Pictures are in the file as bytes. The lengths of prompts and the limits of "
        "pixels are printed, so that\nthe other trainer sees what vlft would train. Takes all flags of vlft train.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--pictures",
        choices=("original", "resized"),
        default="original",
        help="bytes of the files (default), or a PNG of the pixels that vlft trains",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help="write N rows, spread over the data by --seed; of a calibration 256"
    )
    return parser


@command(parser)
def run(parsed: Parsed, write: Write) -> int:
    """Write the rows, and print settings for the other trainer."""
    (data, model), extra = parsed.flags, parsed.extra
    kind, named, out = _words(extra.data)
    if not (files := named or data.training_files):
        raise wrong_usage("export", "no data file: vlft export KIND DATA... OUT, or --data_path")
    from vlft.cli.parse_rows import say_idle
    from vlft.convert.export import export
    from vlft.interrupts import explained

    say_idle(parsed, acting={"seed"})
    say = partial(print, file=sys.stderr, flush=True)
    seed = int(parsed.effective.get("seed", DEFAULT_SEED))
    with explained(f"Nothing was written to {out}."):
        found = export(
            kind, files, out, data, model,
            given=parsed.given, pictures=extra.pictures, limit=extra.rows, seed=seed, say=say,
        )  # fmt: skip
    if extra.json:
        write(asdict(found) | {"next": found.next_lines()})
        return 0
    samples = f", {counted(found.samples, 'sample')}" if found.samples != found.rows else ""
    total = f"{found.rows:,} of {counted(found.read, 'row')}{samples}, {counted(found.pictures, 'picture')}"
    print(f"{out}/data.parquet: {total}")
    if found.skipped:
        print(f"skipped ({len(found.skipped):,}):")
        for row in found.skipped[:SHOWN]:
            print(f"  {printable(str(row))}")
    for line in found.next_lines():
        print(line)
    for note in found.notes:
        print(f"note: {note}")
    return 0


def _words(words: list[str]) -> tuple[Any, list[str], str]:
    """Return what to export, the data files, and the folder to write."""
    if not words or words[0] not in KINDS:
        given = f", not {words[0]}" if words else ""
        kinds = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise wrong_usage(
            "export",
            f"the first word must be {kinds}{given}. It writes rows; for the weights of a run:\n  vlft merge RUN OUT",
        )
    if len(words) < 2:
        raise wrong_usage("export", "no folder to write: vlft export KIND DATA... OUT")
    return words[0], words[1:-1], words[-1]
