"""`vlft merge`: merge a run's adapter into its base model's weights."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial

from vlft.cli.command import CommandParser, Write, add_json, command
from vlft.text import bytes_of

EXAMPLES = """\
examples:
  vlft merge output/run output/merged
  vlft merge output/run/checkpoint-200 output/merged --dtype bf16
  vlft merge output/run output/merged --max_shard_size 5GB
  vlft merge some/peft_adapter output/merged --base_model Qwen/Qwen2-VL-2B-Instruct
"""


def parser() -> CommandParser:
    """Build the command line of `vlft merge`."""
    parser = CommandParser(
        "merge",
        description="Merge an adapter into its base model, and measure that the merged model gives the same answers.",
        examples=EXAMPLES,
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint-N or adapter folder")
    parser.add_argument("out", metavar="OUT", help="folder for the merged model; new or empty")
    parser.add_argument("--base_model", metavar="B", help="folder or hub id of the base, if it has moved since the run")
    parser.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="dtype of the written weights; keep (default): the dtype of each tensor in the base",
    )
    parser.add_argument(
        "--onto",
        choices=("dequantised", "original"),
        help="of a run with --bits 4 or 8: the base's quantised weights, with which it trained (default), or those of "
        "the base's files; then the drift is measured",
    )
    parser.add_argument(
        "--max_shard_size",
        type=_bytes,
        metavar="SIZE",
        help="cut the weights into files of at most this size, e.g. 5GB, as transformers does; default: as the base's "
        "files",
    )
    add_json(parser)
    return parser


def _bytes(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@command(parser)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Merge, and report how much the logits differ."""
    from vlft.interrupts import explained
    from vlft.merge import ONTO, merge

    with explained(f"Nothing was written to {flags.out}."):
        report = merge(
            flags.run,
            flags.out,
            base_model=flags.base_model,
            dtype=flags.dtype,
            onto=flags.onto,
            max_shard_size=flags.max_shard_size,
            progress=partial(print, file=sys.stderr, flush=True),
        )
    for note in report.notes:
        print(f"note: {note}.", file=sys.stderr)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if flags.json:
        write(asdict(report))
        return 0
    towers = ", ".join(f"{tower} {how}" for tower, how in report.towers.items())
    print(f"base     {report.base_model}")
    print(f"lineage  {report.lineage}")
    if report.onto is not None:
        print(f"onto     {report.onto}: {ONTO[report.onto]}")
    print(f"towers   {towers}; {report.changed} of {report.tensors} tensors changed")
    print(f"dtype    {report.dtype}")
    for row in report.rows:
        drift = "" if row.drift is None else f"; from the quantised base + adapter they differ by {row.drift:.3g}"
        print(
            f"{row.row:<8} logits differ by at most {row.difference:.3g}; the adapter moves them by {row.moved:.3g}"
            f"{drift}"
        )
    print(f"out      {report.out}")
    for line in report.serve.values():
        print(f"serve    {line}")
    for remark in report.serve_notes:
        print(f"note     {remark}")
    return 0
