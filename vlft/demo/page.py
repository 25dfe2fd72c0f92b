"""The demo's result as one web page that needs no network: pictures as data URIs, light and dark, fit for a phone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlft.pages.web import document, safe, write_page

_STYLE = """
body{max-width:52rem}
th+th,td+td{white-space:nowrap}td.after{font-weight:700}
.strip{display:flex;flex-wrap:wrap;gap:.5rem;margin:.5rem 0}
.strip img{width:8.5rem;max-width:30vw;border-radius:.4rem;border:1px solid var(--line);image-rendering:pixelated}
dl{display:grid;grid-template-columns:auto 1fr;gap:.2rem .8rem;margin:.6rem 0 0}
dt{color:var(--soft)}dd{margin:0}
"""


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
    lines = "".join(
        f"<tr><td>{safe(s['kind'])} <span class=soft>({s['rows']} rows)</span></td><td>{s['before']:.1%}</td>"
        f"<td>{s['blind']:.1%}</td><td>{s['chance']:.1%}</td><td class=after>{s['after']:.1%}</td></tr>"
        for s in scores
    )
    body = f"""<h1>What a tiny Qwen2-VL learned from pictures</h1>
<p>Answers that are right to the last character, on stories that were not among the training rows.</p>
<div class="scroll"><table><thead><tr><th></th><th>before</th><th>blind</th><th>chance</th><th>after</th></tr></thead>
<tbody>{lines}</tbody></table></div>
<p class="soft">before: the base model. blind: the same training and the same questions with every picture blank.
chance: guessing with the wording and all the words known. after: the merged model.</p>
<h2>Held-out rows</h2>
<p class="soft">The first of each kind, not picked by how they are answered.</p>
{"".join(_section(example) for example in examples)}
<h2>The same by hand</h2>
<pre>{chr(10).join(safe(command) for command in commands)}</pre>"""
    return document(title="vlft demo", style=_STYLE, body=body)


def _section(example: Example) -> str:
    images = "".join(
        f'<img alt="{"frame" if example.is_video else "picture"} {i}" src="{_data_uri(path)}">'
        for i, path in enumerate(example.pictures, 1)
    )
    answers = "".join(
        f'<dt>{name}</dt><dd class="{"good" if text == example.right else "bad"}">{safe(text)}</dd>'
        for name, text in (("before", example.before), ("blind", example.blind), ("after", example.after))
    )
    kind = f"video of {len(example.pictures)} frames" if example.is_video else f"{len(example.pictures)} pictures"
    return (
        f'<section><div class="soft">row {example.index}, {kind}</div><div class="strip">{images}</div>'
        f"<strong>{safe(example.question)}</strong><dl>{answers}<dt>right</dt><dd>{safe(example.right)}</dd></dl>"
        "</section>"
    )


def write_demo(path: Path, *, scores: Sequence[Mapping], examples: Sequence[Example], commands: Sequence[str]) -> None:
    """Write the page, whole or not at all."""
    write_page(path, as_html(scores=scores, examples=examples, commands=commands))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
