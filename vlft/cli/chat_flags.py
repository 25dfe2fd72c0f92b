"""The command line of `vlft chat`: a model, pictures and videos in the order given, and a prompt."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlft.cli.command import CommandParser, add_json
from vlft.errors import ConfigError

EXAMPLES = """\
examples:
  vlft chat output/run --image a.png "What is this?"
  vlft chat output/run/checkpoint-200 --image a.png b.png "What changed?" --max_new_tokens 64
  vlft chat output/merged --video clip.mp4 --temperature 0.7 --top_p 0.9 "Tell it as a story."
  vlft chat Qwen/Qwen2-VL-2B-Instruct          (asks in a loop)
  vlft chat output/run --image a.png < prompt.txt
"""


class _Media(argparse.Action):
    """Collects (kind, path) of --image and --video in the order they are given in.

    Several paths may follow one flag, so a prompt that follows them looks like one more. It is told apart here: the
    last of several words, where it is no file and does not end like one.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        *earlier, last = values
        if earlier and not Path(last).exists() and not re.fullmatch(r"\S+\.[A-Za-z0-9]{2,5}", last):
            namespace.prompts, values = [*namespace.prompts, last], earlier
        namespace.media = [*namespace.media, *((self.dest, path) for path in values)]


class _Parser(CommandParser):
    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags, with `prompt` as one text, from the command line or from stdin; None asks for the loop.

        Raises:
            UsageError: the command line makes no sense, there are two prompts, or a flag has no effect.
            ConfigError: stdin is not UTF-8.
        """
        self.answer_help(argv)
        flags = self.parse_intermixed_args(argv)
        prompts = [*flags.prompt, *flags.prompts]
        if len(prompts) > 1:
            self.error(f"two prompts, {prompts[0]!r} and {prompts[1]!r}. Give one, in quotes")
        flags.prompt = prompts[0] if prompts else None
        for name in ("top_p", "seed"):
            if not flags.temperature and getattr(flags, name) is not None:
                self.error(f"--{name} has no effect without drawing. Give a --temperature above 0, or drop it")
        if flags.prompt is None and not sys.stdin.isatty():
            flags.prompt = _from_stdin()
        if flags.prompt is None and flags.json:
            self.error("--json answers one prompt: give it, as the last word or on stdin")
        if flags.prompt is None and flags.boxes:
            self.error("--boxes lists those of one answer: give its prompt, as the last word or on stdin")
        if flags.json and flags.boxes:
            self.error("--boxes has no effect beside --json, which always has them. Drop it")
        return flags


def parser() -> CommandParser:
    """Its command line."""
    parser = _Parser(
        "chat",
        description="Ask a model about pictures and videos, with the pixel settings it was trained on. Without a "
        "prompt it asks in a loop, or reads the prompt from stdin where that is no terminal.",
        examples=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint-N, adapter, merged or base model")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to ask, in quotes")
    for kind, what in (("image", "pictures"), ("video", "videos")):
        parser.add_argument(
            f"--{kind}", metavar="FILE", nargs="+", action=_Media, default=argparse.SUPPRESS,
            help=f"{what} to show before the prompt, in the order given; may be repeated",
        )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, metavar="N", default=512, help="longest answer (default: 512)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="0 (default): the likeliest answer; above: draw one"
    )
    parser.add_argument("--top_p", type=float, metavar="P", help="draw among the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, help="of the draws (default: 42)")
    parser.add_argument("--base_model", metavar="B", help="folder or hub id of an adapter's base, if it has moved")
    parser.add_argument(
        "--boxes", action="store_true", help="list the boxes of the answer in pixels of the picture (in --json always)"
    )
    add_json(parser)
    parser.set_defaults(media=[], prompts=[])
    return parser


def _from_stdin() -> str:
    """The whole of stdin as the prompt; an empty one is refused later."""
    try:
        return sys.stdin.read().strip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8 ({error}). Write the prompt in UTF-8.") from error
