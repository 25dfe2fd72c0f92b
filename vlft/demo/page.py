"""The demo's result as one web page that needs no network: pictures as data URIs, light and dark, fit for a phone."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlft.data.shown import printable

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#66707a;--paper:#fbfbf9;--card:#fff;--line:#dfe2e0;
--good:#0b6b33;--bad:#a4332a}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7e9;--soft:#98a2ab;--paper:#14171a;--card:#1c2024;--line:#343a40;
--good:#7fdca0;--bad:#f29a90}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:52rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.6rem 0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
.soft{color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th+th,td+td{white-space:nowrap}th:first-child,td:first-child{text-align:left}td.after{font-weight:700}
section{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem;margin:1rem 0}
.strip{display:flex;flex-wrap:wrap;gap:.5rem;margin:.5rem 0}
.strip img{width:8.5rem;max-width:30vw;border-radius:.4rem;border:1px solid var(--line);image-rendering:pixelated}
dl{display:grid;grid-template-columns:auto 1fr;gap:.2rem .8rem;margin:.6rem 0 0}
dt{color:var(--soft)}dd{margin:0}.good{color:var(--good)}.bad{color:var(--bad)}
pre{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;overflow-x:auto;
font:14px/1.6 ui-monospace,Menlo,Consolas,monospace}
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
        f"<tr><td>{_safe(s['kind'])} <span class=soft>({s['rows']} rows)</span></td><td>{s['before']:.1%}</td>"
        f"<td>{s['blind']:.1%}</td><td>{s['chance']:.1%}</td><td class=after>{s['after']:.1%}</td></tr>"
        for s in scores
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>vlft demo</title><style>{_STYLE}</style></head><body>
<h1>What a tiny Qwen2-VL learned from pictures</h1>
<p>Answers that are right to the last character, on stories that were not among the training rows.</p>
<div class="scroll"><table><thead><tr><th></th><th>before</th><th>blind</th><th>chance</th><th>after</th></tr></thead>
<tbody>{lines}</tbody></table></div>
<p class="soft">before: the base model. blind: the same training and the same questions with every picture blank.
chance: guessing with the wording and all the words known. after: the merged model.</p>
<h2>Held-out rows</h2>
<p class="soft">The first of each kind, not picked by how they are answered.</p>
{"".join(_section(example) for example in examples)}
<h2>The same by hand</h2>
<pre>{chr(10).join(_safe(command) for command in commands)}</pre>
</body></html>
"""


def _section(example: Example) -> str:
    images = "".join(
        f'<img alt="{"frame" if example.is_video else "picture"} {i}" src="{_data_uri(path)}">'
        for i, path in enumerate(example.pictures, 1)
    )
    answers = "".join(
        f'<dt>{name}</dt><dd class="{"good" if text == example.right else "bad"}">{_safe(text)}</dd>'
        for name, text in (("before", example.before), ("blind", example.blind), ("after", example.after))
    )
    kind = f"video of {len(example.pictures)} frames" if example.is_video else f"{len(example.pictures)} pictures"
    return (
        f'<section><div class="soft">row {example.index}, {kind}</div><div class="strip">{images}</div>'
        f"<strong>{_safe(example.question)}</strong><dl>{answers}<dt>right</dt><dd>{_safe(example.right)}</dd></dl>"
        "</section>"
    )


def write_page(path: Path, *, scores: Sequence[Mapping], examples: Sequence[Example], commands: Sequence[str]) -> None:
    """Write the page, whole or not at all."""
    spare = path.with_name(f".{path.name}.tmp")
    html = as_html(scores=scores, examples=examples, commands=commands)
    spare.write_text(html, encoding="utf-8", errors="replace")
    os.replace(spare, path)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _safe(text: str) -> str:
    return escape(printable(text))
