"""`vlft demo`: train a tiny model on pictures, on this machine, in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlft.cli.command import CommandParser, Write, command

EXAMPLES = """\
examples:
  vlft demo
  vlft demo --out somewhere/else
  vlft demo --rebuild-base     trains the demo's base from random weights (six to seven minutes on two cores)
"""


def parser() -> CommandParser:
    """Build the command line of `vlft demo`."""
    parser = CommandParser(
        "demo",
        description="Draw pictures, check them, train a tiny Qwen2-VL, merge it, and ask it questions that only the "
        "pictures answer. Needs no GPU and no network. After an interruption, the same command resumes.",
        examples=EXAMPLES,
    )
    parser.add_argument("--out", metavar="DIR", help="folder for everything (default: demo-out, or demo-base-out)")
    parser.add_argument(
        "--quick", action="store_true", help="train a few steps to test that it runs; it learns nothing"
    )
    parser.add_argument("--rebuild-base", action="store_true", help="train the base of the demo from random weights")
    return parser


@command(parser)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Run the demo, or rebuild its base. Return 1 if the model learned less than expected."""
    from vlft.cli.threads import share_cores
    from vlft.demo.run import GOAL, QUICK, Lesson, demo
    from vlft.interrupts import explained

    share_cores()
    if flags.rebuild_base:
        return _rebuild(Path(flags.out or "demo-base-out"), quick=flags.quick)
    with explained("Run the same command again to resume."):
        told = demo(Path(flags.out or "demo-out"), lesson=QUICK if flags.quick else Lesson())
    if not told.learned and not flags.quick:
        print(f"It learned less than expected ({GOAL:.0%} on both). Please report this with the lines above.")
        return 1
    return 0


def _rebuild(out: Path, *, quick: bool) -> int:
    from vlft.demo.build_base import QUICK_REBUILD, REBUILD, STORED, rebuild, store

    made = rebuild(out, plan=QUICK_REBUILD if quick else REBUILD)
    print(f"held-out rows answered exactly: {made.exact:.1%} of {made.rows} (chance {made.chance:.1%})")
    if not quick:
        store(made)
        print(f"stored: {STORED}")
    return 0
