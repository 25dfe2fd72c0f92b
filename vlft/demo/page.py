"""The demo's result as one web page that needs no network: pictures as data URIs, light and dark, also for phones."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.pages.web import render, write_page
from vlft.text import counted


@dataclass(frozen=True, kw_only=True)
class Example:
    """A held-out row and its answers.

    Attributes:
        index: of the row, from 0.
        pictures: files, in order; of a video its frames.
        is_video: whether the pictures are frames of a video.
        question: of the row.
        right: the row's own answer.
        before: answer of the base.
        blind: answer of the model trained on blank pictures.
        after: answer of the merged model.
    """

    index: int
    pictures: tuple[Path, ...]
    is_video: bool
    question: str
    right: str
    before: str
    blind: str
    after: str


def as_html(*, scores: Sequence[Mapping], examples: Sequence[Example], commands: Sequence[str]) -> str:
    """The page as HTML. All texts are escaped, and the page can neither load nor run anything.

    Args:
        scores: `kind`, `rows`, `before`, `blind`, `chance` and `after` (shares) of each kind of row.
        examples: held-out rows with answers.
        commands: what a user would type.
    """
    return render(
        "demo.html.j2",
        title="vlft demo",
        scores=scores,
        examples=[_context(one) for one in examples],
        commands=commands,
    )


def _context(example: Example) -> dict[str, Any]:
    count = len(example.pictures)
    word = "frame" if example.is_video else "picture"
    pictures = [
        {"alt": f"{word} {i}", "title": path.name, "uri": _data_uri(path)} for i, path in enumerate(example.pictures, 1)
    ]
    return {
        "index": example.index,
        "kind": f"video of {count} frames" if example.is_video else counted(count, "picture"),
        "pictures": pictures,
        "question": example.question,
        "right": example.right,
        "answers": [("before", example.before), ("blind", example.blind), ("after", example.after)],
    }


def write_demo(path: Path, *, scores: Sequence[Mapping], examples: Sequence[Example], commands: Sequence[str]) -> None:
    """Write the page atomically."""
    write_page(path, as_html(scores=scores, examples=examples, commands=commands))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
