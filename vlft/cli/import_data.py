"""`vlft import`: convert a published data set into data files and a folder of pictures."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from functools import partial

from vlft.cli.command import CommandParser, Write, add_json, command
from vlft.config.names import wrong_usage

EXAMPLES = """\
examples:
  vlft import story-reasoning StoryReasoning stories
  vlft import story-reasoning StoryReasoning stories --limit 100 --on_bad_row skip
"""


def parser() -> CommandParser:
    """Build the command line of `vlft import`."""
    parser = CommandParser(
        "import",
        description="Convert a published data set into data files (OUT/train.jsonl, OUT/test.jsonl) and pictures\n"
        "(OUT/images), whose bytes are copied unchanged. story-reasoning: the parquet files of\n"
        "daniel3303/StoryReasoning.",
        examples=EXAMPLES,
    )
    parser.add_argument("set", metavar="SET", choices=("story-reasoning",), help="story-reasoning")
    parser.add_argument("source", metavar="PARQUET_DIR", help="folder with its train*.parquet and test*.parquet")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty. It appears only when complete")
    parser.add_argument("--limit", type=int, metavar="N", help="rows of each split, from the first (default: all)")
    parser.add_argument(
        "--on_bad_row",
        choices=("error", "skip"),
        default="error",
        help="a row or file that cannot be imported. error (default): stop; skip: leave it out and list it",
    )
    add_json(parser)
    return parser


@command(parser)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Import the data set, and print the result and the next command."""
    if flags.limit is not None and flags.limit < 1:
        raise wrong_usage("import", f"--limit {flags.limit}: must be at least 1")
    from vlft.convert import import_stories
    from vlft.interrupts import explained
    from vlft.text import printable

    say = partial(print, file=sys.stderr, flush=True)
    with explained(f"Nothing was written to {flags.out}."):
        found = import_stories(flags.source, flags.out, limit=flags.limit, on_bad_row=flags.on_bad_row, say=say)
    if flags.json:
        write(asdict(found))
        return 0
    if found.before:
        print(f"{found.out}: already imported from the same files")
    for split, rows in found.rows.items():
        counts = f"{found.stories[split]:,} of {rows:,} stories, {found.pictures[split]:,} pictures"
        print(f"{found.file(split)}: {counts}")
    if found.skipped:
        print(f"left out ({len(found.skipped):,}):")
        for one in found.skipped:
            print(f"  {printable(str(one))}")
    files = " ".join(shlex.quote(found.file(split)) for split, stories in found.stories.items() if stories)
    print(f"next: vlft check-data {files} --config examples/story_reasoning.yaml --model_id Qwen/Qwen2-VL-2B-Instruct")
    return 0
