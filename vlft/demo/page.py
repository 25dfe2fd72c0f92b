"""The demo's result as one web page that needs no network: pictures as data URIs, light and dark, fit for a phone."""

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
    """A held-out row and what was answered.

    Attributes:
        index: of the row, from 0.
        pictures: files, in order; of a video its frames.
        is_video: which of the two.
        question, right: the row's own texts.
        before, blind, after: answers of the base, of the model trained on blank pictures, and of the merged model.
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
    """The page. All texts are escaped, and nothing in it can load or run anything.

    Args:
        scores: `kind`, `rows`, `before`, `blind`, `chance` and `after` (shares) of each kind of row.
        examples: held-out rows with answers.
        commands: that a user would type.
    """
    return render(
        "demo.html.j2", title="vlft demo", scores=scores, examples=[_shown(one) for one in examples], commands=commands
    )


def _shown(example: Example) -> dict[str, Any]:
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
    """Write the page, whole or not at all."""
    write_page(path, as_html(scores=scores, examples=examples, commands=commands))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
