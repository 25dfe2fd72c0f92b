"""`vlft chat`: ask a model about pictures and videos, once or in a loop."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlft import screen
from vlft.cli.chat_flags import parser
from vlft.cli.command import Write, command
from vlft.cli.early import check_model
from vlft.interrupts import forget
from vlft.text import printable


@command(parser)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Answer one prompt, or answer prompts in a loop until the user leaves."""
    from vlft.chat.turns import require_file

    for kind, path in flags.media:  # checked before torch is imported and the model loads, which may take minutes
        require_file(kind, path)
    check_model(flags.model, flags.base_model)
    from torch import manual_seed

    from vlft.chat import Sampling, open_model, question, system_turn

    manual_seed(42 if flags.seed is None else flags.seed)
    sampling = Sampling(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_p=1.0 if flags.top_p is None else flags.top_p,
    )
    chat = open_model(flags.model, base_model=flags.base_model, thinking=flags.thinking)
    screen.stage("")
    for note in chat.notes:
        _say(f"note: {note}.")
    system = [] if flags.system is None else [system_turn(flags.system, family=chat.family)]
    if flags.prompt is None:
        _talk(chat, flags.media, sampling, system=system[0] if system else None)
        return 0
    asked = question(flags.prompt, flags.media, family=chat.family)
    reply = chat.reply([*system, asked], sampling, stream=None if flags.json else _write)
    if flags.json:
        tokens = {"tokens": reply.tokens, "prompt_tokens": reply.prompt_tokens}
        write({"answer": reply.text, "model": flags.model, **tokens, "boxes": list(map(asdict, reply.boxes))})
    else:
        _write("\n")
        for line in _boxes(reply.boxes) if flags.boxes else ():
            _write(f"{line}\n")
    return 0


def _talk(chat: Any, media: list[Any], sampling: Any, *, system: Any) -> None:
    from vlft.chat.loop import HELP, converse
    from vlft.cli.chat_line import edit_lines

    edit_lines(os.environ)

    def read() -> str:
        forget()  # the answer is complete, so the next Ctrl-C counts as the first one
        return input("> ")

    _say(f"{chat.name}\n{HELP}")
    converse(chat, media, sampling, system=system, read=read, write=_write, say=_say)


def _boxes(boxes: Sequence[Any]) -> list[str]:
    """Return a line for each box of an answer."""
    lines = []
    for box in boxes:
        label = f"{box.label}: " if box.label else ""
        if box.pixels is None:
            lines.append(f"box: {label}{_numbers(box.model)} as the model wrote it; its picture is unknown")
        else:
            lines.append(f"box: {label}{_numbers(box.pixels)} in pixels of {box.picture}")
    return lines or ["no box in the answer"]


def _numbers(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _write(text: str) -> None:
    """Print a piece of an answer at once. On a terminal, control characters from the model are replaced."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
