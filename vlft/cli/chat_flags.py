"""The command line of `vlft chat`: a model, pictures and videos in order, and a prompt."""

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
    """Collect (kind, path) of --image and --video in the order in which they are given.

    Several paths may follow one flag, so a prompt after them looks like another path. The last of several words is
    taken as the prompt if no such file exists and it has no file ending.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        *earlier, last = values
        if earlier and not Path(last).exists() and not re.fullmatch(r"\S+\.[A-Za-z0-9]{2,5}", last):
            namespace.prompts, values = [*namespace.prompts, last], earlier
        namespace.media = [*namespace.media, *((self.dest, path) for path in values)]


class _Parser(CommandParser):
    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the flags.

        Returns:
            The flags. `prompt` is one text, from the command line or from stdin; None starts the loop.

        Raises:
            UsageError: the command line cannot be parsed, there are two prompts, or a flag has no effect.
            ConfigError: stdin is not UTF-8.
        """
        self.answer_help(argv)
        flags = self.parse_intermixed_args(argv)
        prompts = [*flags.prompt, *flags.prompts]
        if len(prompts) > 1:
            self.error(f"two prompts, {prompts[0]!r} and {prompts[1]!r}. Use one, in quotes")
        flags.prompt = prompts[0] if prompts else None
        for name in ("top_p", "seed"):
            if not flags.temperature and getattr(flags, name) is not None:
                self.error(f"--{name} has no effect without sampling. Set --temperature above 0, or drop it")
        if flags.prompt is None and not sys.stdin.isatty():
            flags.prompt = _from_stdin()
        if flags.system is not None and not flags.system.strip():
            self.error("the text of --system is empty. Drop it, or write the system turn")
        if flags.prompt is None and flags.json:
            self.error("--json answers one prompt. Pass the prompt as the last word or on stdin")
        if flags.prompt is None and flags.boxes:
            self.error("--boxes lists the boxes of one answer. Pass the prompt as the last word or on stdin")
        if flags.json and flags.boxes:
            self.error("--boxes has no effect with --json, which always lists boxes. Drop it")
        return flags


def parser() -> CommandParser:
    """Build the command line of `vlft chat`."""
    parser = _Parser(
        "chat",
        description="Ask a model about pictures and videos, with the pixel settings it was trained on. Without a "
        "prompt it asks for prompts in a loop, or reads one from stdin if stdin is not a terminal.",
        examples=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint-N, adapter, merged or base model")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to ask, in quotes")
    for kind, what in (("image", "pictures"), ("video", "videos")):
        parser.add_argument(
            f"--{kind}", metavar="FILE", nargs="+", action=_Media, default=argparse.SUPPRESS,
            help=f"{what} to put before the prompt, in this order; may be repeated",
        )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="the system turn, rendered as that of a training row")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", default=512, help="longest answer (default: 512)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="0 (default): greedy decoding; above 0: sampling"
    )
    parser.add_argument(
        "--top_p", type=float, metavar="P", help="sample from the likeliest tokens up to this probability"
    )
    parser.add_argument("--seed", type=int, help="random seed of the sampling (default: 42)")
    parser.add_argument("--base_model", metavar="B", help="folder or hub id of an adapter's base, if it has moved")
    parser.add_argument(
        "--thinking", choices=("auto", "on", "off"), default="auto",
        help="whether the model thinks before it answers, where its chat template takes enable_thinking; auto "
        "(default): as it was trained, else as the template decides",
    )  # fmt: skip
    parser.add_argument(
        "--boxes", action="store_true", help="list the boxes of the answer in pixels of the picture (always in --json)"
    )
    add_json(parser)
    parser.set_defaults(media=[], prompts=[])
    return parser


def _from_stdin() -> str:
    """Read the prompt from stdin. An empty prompt is refused later."""
    try:
        return sys.stdin.read().strip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8 ({error}). Write the prompt in UTF-8.") from error
