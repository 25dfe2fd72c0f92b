"""`vlft chat`: ask a model about pictures and videos, once or in a loop."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlft.errors import ConfigError
from vlft.interrupts import forget
from vlft.text import printable

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


def run(argv: Sequence[str]) -> int:
    """Answer one prompt, or talk until the user leaves."""
    flags = _parse(argv)

    from vlft.cli.stdout import json_only

    with json_only(flags.json) as write:
        from vlft.cli.quiet import quiet

        quiet()
        from torch import manual_seed

        from vlft.chat import Sampling, open_model, question, require_file

        for kind, path in flags.media:  # before minutes of loading
            require_file(kind, path)
        manual_seed(42 if flags.seed is None else flags.seed)
        sampling = Sampling(
            max_new_tokens=flags.max_new_tokens,
            temperature=flags.temperature,
            top_p=1.0 if flags.top_p is None else flags.top_p,
        )
        chat = open_model(flags.model, base_model=flags.base_model)
        for note in chat.notes:
            _say(f"note: {note}.")
        if flags.prompt is None:
            _talk(chat, flags.media, sampling)
            return 0
        asked = question(flags.prompt, flags.media, family=chat.family)
        reply = chat.reply([asked], sampling, stream=None if flags.json else _write)
        if flags.json:
            tokens = {"tokens": reply.tokens, "prompt_tokens": reply.prompt_tokens}
            write({"answer": reply.text, "model": flags.model, **tokens, "boxes": list(map(asdict, reply.boxes))})
        else:
            _write("\n")
            for line in _boxes(reply.boxes) if flags.boxes else ():
                _write(f"{line}\n")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vlft chat",
        description="Ask a model about pictures and videos, with the pixel settings it was trained on. Without a "
        "prompt it asks in a loop, or reads the prompt from stdin where that is no terminal.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(media=[], prompts=[])
    flags = parser.parse_intermixed_args(argv)
    prompts = [*flags.prompt, *flags.prompts]
    if len(prompts) > 1:
        parser.error(f"two prompts, {prompts[0]!r} and {prompts[1]!r}. Give one, in quotes")
    flags.prompt = prompts[0] if prompts else None
    for name in ("top_p", "seed"):
        if not flags.temperature and getattr(flags, name) is not None:
            parser.error(f"--{name} has no effect without drawing. Give a --temperature above 0, or drop it")
    if flags.prompt is None and not sys.stdin.isatty():
        flags.prompt = _from_stdin()
    if flags.prompt is None and flags.json:
        parser.error("--json answers one prompt: give it, as the last word or on stdin")
    if flags.prompt is None and flags.boxes:
        parser.error("--boxes lists those of one answer: give its prompt, as the last word or on stdin")
    if flags.json and flags.boxes:
        parser.error("--boxes has no effect beside --json, which always has them. Drop it")
    return flags


def _from_stdin() -> str:
    """The whole of stdin as the prompt; an empty one is refused later."""
    try:
        return sys.stdin.read().strip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8 ({error}). Write the prompt in UTF-8.") from error


def _talk(chat: Any, media: list[Any], sampling: Any) -> None:
    from vlft.chat.loop import HELP, converse

    with contextlib.suppress(ImportError):  # not on Windows; there the console edits lines itself
        importlib.import_module("readline")  # from here on input() edits lines and remembers them

    def read() -> str:
        forget()  # the answer has ended: another Ctrl-C is not the second one
        return input("> ")

    _say(f"{chat.name}\n{HELP}")
    converse(chat, media, sampling, read=read, write=_write, say=_say)


def _boxes(boxes: Sequence[Any]) -> list[str]:
    """A line for each box of an answer."""
    lines = []
    for box in boxes:
        label = f"{box.label}: " if box.label else ""
        if box.pixels is None:
            lines.append(f"box: {label}{_numbers(box.model)} as the model wrote it; which picture it is in is open")
        else:
            lines.append(f"box: {label}{_numbers(box.pixels)} in pixels of {box.picture}")
    return lines or ["no box in the answer"]


def _numbers(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _write(text: str) -> None:
    """A piece of an answer, at once; a model's control characters shall not steer a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
