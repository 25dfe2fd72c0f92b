"""`vlft check-data`: find every row that cannot be trained, and report why."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlft.cli.command import Write, command
from vlft.text import counted

if TYPE_CHECKING:
    from vlft.check.fix import Written
    from vlft.cli.parse_rows import RowParser
    from vlft.config.parse import Parsed
    from vlft.data.files.index import RowIndex

EXAMPLES = """\
examples:
  vlft check-data train.json --image_folder images
  vlft check-data train.json more.jsonl --image_folder images --config examples/lora_vision.yaml \\
      --model_id Qwen/Qwen2-VL-2B-Instruct
  vlft check-data train.json --headers_only --json > report.json
  vlft check-data train.json --image_folder images --report look/ --fix clean.jsonl --dedup
  vlft check-data all.json --image_folder images --fix data.jsonl --split 0.9,0.05,0.05
"""

DEFAULT_SEED = 42  # of --split, as of training
WRITTEN = {
    "data_path",
    "eval_path",
    "eval_split",
    "data_mix",
    "columns",
    "missing_tags",
}  # flags that the written files replace


def parser() -> RowParser:
    """Build the command line of `vlft check-data`."""
    from vlft.cli.parse_rows import RowParser
    from vlft.config.kinds import Shares

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
    parser.add_argument("--dedup", action="store_true", help="with --fix: leave out rows that repeat an earlier row")
    parser.add_argument(
        "--split",
        metavar="SHARES",
        type=Shares().value,
        help="with --fix: write OUT-train, OUT-eval and, with three shares, OUT-test, e.g. 0.9,0.05,0.05. Rows that "
        "share a picture or video stay together; --seed chooses among them",
    )
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
    files = data_files("check-data", parsed, acting={"seed"} if extra.split or data.eval_split else set())

    def before(index: RowIndex) -> None:
        if extra.report:
            refuse_folder(extra.report)
        if extra.fix:
            refuse_target(extra.fix, index, shares=extra.split)

    cache = cost_folder(os.environ)
    read = {"headers_only": extra.headers_only, "workers": extra.workers, "cache": cache, "before": before}
    with explained(
        "The results so far are saved. Run the same command again to resume." if cache else "No results were saved."
    ):
        seed = int(parsed.effective.get("seed", DEFAULT_SEED))
        checked = check(files, data, model, given=parsed.given, seed=seed, **read)
    found = checked.found
    if extra.json:
        write(found.as_json())
    else:
        print(found.as_text())
    if extra.report:
        print(f"report: {write_report(checked, extra.report)}", file=sys.stderr)
    if extra.fix:
        done = write_clean(checked, extra.fix, dedup=extra.dedup, shares=extra.split, seed=seed)
        print(_said(done, len(found.bad)), file=sys.stderr)
        if extra.split:
            print(f"train with them: {train_command(parsed, list(done.rows))}", file=sys.stderr)
    return 1 if found.bad else 0


def _said(done: Written, refused: int) -> str:
    """Return what was written, as lines."""
    total = sum(done.rows.values())
    lines = [
        f"{counted(rows, 'row')}{f' ({rows / total:.1%})' if len(done.rows) > 1 else ''}: {path}"
        for path, rows in done.rows.items()
    ]
    repeated = "" if done.repeats is None else f", {done.repeats:,} repeated"
    lines.append(f"{counted(refused, 'row')} refused{repeated}: {done.quarantine}")
    return "\n".join((*lines, *(f"note: {remark}" for remark in done.remarks)))


def train_command(parsed: Parsed, files: Sequence[str]) -> str:
    """Return the command that trains on the first file of a division and evaluates on the second, with the same flags.

    Flags whose effect is already in the written rows are left out.
    """
    own = {"data_path": files[0], "eval_path": files[1], "eval_strategy": "epoch", "output_dir": "output/run"}
    own |= {} if parsed.flags[1].model_id else {"model_id": "MODEL"}
    same = {name: parsed.effective[name] for name in sorted(parsed.given - WRITTEN) if name in parsed.effective}
    words: list[str] = []
    for name, value in (own | same).items():
        words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
    return shlex.join(["vlft", "train", *words])


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
