"""The command line of `vlft eval`: a model, data files, metrics, and how rows are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from vlft.cli.command import CommandParser, add_json
from vlft.config.flags import DataFlags
from vlft.config.row_flags import BoxFormat, MissingTags
from vlft.metrics import DEFAULT, NAMES, OWN

EXAMPLES = """\
examples:
  vlft eval output/run held_out.json --image_folder images
  vlft eval output/run held_out.json --compare Qwen/Qwen2-VL-2B-Instruct --metric exact_match anls
  vlft eval output/run --held_out                          (the rows of its --eval_split)
  vlft eval output/run held_out.json --metric my_metrics.py:score --batch 16 --out eval/run.jsonl
  vlft eval answers.jsonl held_out.json --metric vqa_accuracy      (answers of another program; loads no model)
"""
WIDTH = max(map(len, (*NAMES, OWN)))  # of the names of metrics
#: Flags of data that the verb takes, as `vlft train` has them.
OF_DATA = ("image_folder", "columns", "missing_tags", "on_bad_row", "allow_remote_media", "allow_outside_folder")


class _Parser(CommandParser):
    def error(self, message: str) -> NoReturn:
        if "are required" in message:
            message += ". Write MODEL and DATA first: --metric and --compare take all words that follow them"
        super().error(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the flags. `data` has the flags of data.

        Raises:
            UsageError: the command line cannot be parsed, or a number is below 1.
            ConfigError: `--columns` cannot be read.
        """
        self.answer_help(argv)
        flags = self.parse_intermixed_args(argv)
        if flags.held_out and flags.data:
            self.error(f"--held_out takes the rows from {flags.model}. Drop {flags.data[0]}, or drop --held_out")
        if not flags.held_out and not flags.data:
            self.error("the following arguments are required: DATA")
        for name in ("batch", "max_new_tokens", "limit"):
            if (value := getattr(flags, name)) is not None and value < 1:
                self.error(f"--{name} {value}: must be 1 or more")
        if flags.labels is not None and flags.max_new_tokens is not None:
            self.error(
                f"--max_new_tokens {flags.max_new_tokens} has no effect with --labels, which generates no answers. "
                "Drop it"
            )
        flags.max_new_tokens = 512 if flags.max_new_tokens is None else flags.max_new_tokens
        for name in ("out", "html"):
            path = getattr(flags, name)
            if path is not None and path.is_dir():
                self.error(f"--{name} {path} is a folder. Name a file")
        if flags.out is not None and flags.out.suffix.lower() in (".html", ".json"):
            self.error(f"--out {flags.out}: answers are written as JSON lines. Name a .jsonl file; --html is the page")
        flags.of_data = DataFlags(**{name: getattr(flags, name) for name in OF_DATA}, packing=False)
        return flags


def parser() -> CommandParser:
    """Build the command line of `vlft eval`."""
    parser = _Parser(
        "eval",
        description="Ask a model about rows that it was not trained on, and compare its answers with the right ones: "
        "metrics with 95% intervals, differences between models, the worst rows, and a page that shows the rows. "
        "Answers are kept: the same command again continues where it stopped.",
        examples="\n".join(
            [
                "metrics:",
                *(f"  {name:<{WIDTH}} {text}" for name, text in NAMES.items()),
                f"  {OWN:<{WIDTH}} your own",
                "",
                EXAMPLES,
            ]
        ),
    )
    parser.add_argument(
        "model", metavar="MODEL",
        help="run folder, checkpoint-N, adapter, merged or base model; or a .jsonl of answers "
        '(a line for each row: {"index": 0, "answer": "..."}, or "id" for "index")',
    )  # fmt: skip
    parser.add_argument(
        "data", metavar="DATA", nargs="*", help="data files: .json, .jsonl, .csv, .parquet, .tar, or folders"
    )
    parser.add_argument(
        "--held_out", action="store_true",
        help="instead of DATA: the rows that the run MODEL holds out of its training data (--eval_split)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", metavar="NAME", nargs="+", help=f"metrics, listed below (default: {' '.join(DEFAULT)})"
    )
    parser.add_argument(
        "--compare", metavar="MODEL", nargs="+", default=[],
        help="further models or files of answers, compared with MODEL on the same rows, such as the base",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, metavar="N", default=8,
        help="rows answered together (default: 8). Answers do not depend on it",
    )  # fmt: skip
    parser.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="a text file with a label on each line: score how likely each of them is, instead of generating answers, "
        "for accuracy, macro F1, AUC and a table of confusions",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate the first N rows only")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="where to write the answers, one line for each row (default: eval/MODEL-DATA.jsonl). The answers of "
        "--compare get the name of the model before the ending",
    )  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="where to write the page (default: beside --out)")
    _add_data_flags(parser)
    parser.add_argument(
        "--thinking", choices=("auto", "on", "off"), default="auto",
        help="whether the model thinks before it answers, where its chat template takes enable_thinking; auto "
        "(default): as it was trained, else as the row's answer shows. Metrics do not see thoughts",
    )  # fmt: skip
    parser.add_argument("--base_model", metavar="B", help="folder or hub id of an adapter's base, if it has moved")
    add_json(parser)
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of data, with the texts that `vlft train` has for them."""
    texts = {name: one.metadata["help"] for name, one in DataFlags.__dataclass_fields__.items() if one.metadata}
    for name, metavar in (("image_folder", "DIR"), ("columns", "COLUMNS")):
        parser.add_argument(f"--{name}", metavar=metavar, help=_escaped(texts[name]))
    parser.add_argument(
        "--missing_tags", choices=get_args(MissingTags), default="error", help=_escaped(texts["missing_tags"])
    )
    parser.add_argument(
        "--box_format", choices=get_args(BoxFormat),
        help="unit of the boxes in the rows, as for training (default: that of the run's rows, else as_is)",
    )  # fmt: skip
    parser.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error",
        help="a row that cannot be evaluated. error: it stops the evaluation; skip: it is skipped and counted",
    )  # fmt: skip
    for name in ("allow_remote_media", "allow_outside_folder"):
        parser.add_argument(f"--{name}", action="store_true", help=_escaped(texts[name]))


def _escaped(text: Any) -> str:
    return str(text).replace("%", "%%")
