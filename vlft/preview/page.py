"""A `Preview` as one web page that needs no network: pixels as data URIs, light and dark, readable on a phone."""

from __future__ import annotations

import base64
import io
import os
import re
from html import escape
from pathlib import Path

from vlft.data.shown import printable
from vlft.errors import ConfigError
from vlft.preview import MERGE, Medium, Piece, Preview, frames_of

MOST_FRAMES = 32  # of a video: a page of several hundred would be too large to open

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#66707a;--paper:#fbfbf9;--card:#fff;--line:#dfe2e0;
--learn:#d6f2dd;--learn-ink:#0b5a2b;--warn:#8a5a00}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7e9;--soft:#98a2ab;--paper:#14171a;--card:#1c2024;--line:#343a40;
--learn:#123d25;--learn-ink:#a5ecbf;--warn:#f0bd5a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.15rem;margin:.4rem 0}
p,ul{margin:.3rem 0}ul{padding-left:1.2rem}
.soft{color:var(--soft);font-size:.9rem}.warn{color:var(--warn)}
.row{white-space:pre-wrap;background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:1rem;margin:1rem 0;font:15px/1.6 ui-monospace,Menlo,Consolas,monospace}
mark{background:var(--learn);color:var(--learn-ink);border-radius:.2rem;padding:.05rem 0;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.token{color:var(--soft);font-size:.85em}mark .token{color:inherit;opacity:.75}
figure{display:block;margin:.5rem 0;white-space:normal}
figcaption{color:var(--soft);font:.85rem/1.4 system-ui,sans-serif}
.strip{display:flex;gap:.3rem;overflow-x:auto;padding:.2rem}
.frame{position:relative;flex:none;display:inline-block;max-width:100%;cursor:zoom-in;line-height:0}
.frame img{max-height:11rem;max-width:100%;border-radius:.3rem}
.frame:focus{cursor:zoom-out;outline:2px solid var(--line)}.frame:focus img{max-height:none}
.frame:focus::after{content:"";position:absolute;inset:0;opacity:.55;background-image:
linear-gradient(to right,#fff 1px,transparent 1px),linear-gradient(to bottom,#fff 1px,transparent 1px);
background-size:calc(100%/var(--columns)) calc(100%/var(--rows))}
"""


def as_html(preview: Preview) -> str:
    """The page. Everything that comes from the row is escaped, and nothing in the page can load or run anything."""
    known = "|".join(re.escape(token) for token in sorted(preview.control_tokens))
    control = re.compile(f"({known})")
    media = "".join(
        f"<li>{_safe(m.name)}: {_safe(m.source)} &rarr; {_safe(m.shown)} "
        f'<span class="soft">{_safe(m.field)}: {_safe(m.path)}</span></li>'
        for m in preview.media
    )
    warnings = "".join(
        f'<p class="warn">warning: {_safe(field)}: {_safe(remark)}</p>' for field, remark in preview.sample.warnings
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_safe(preview.title)}</title><style>{_STYLE}</style></head><body>
<h1>{_safe(preview.title)}</h1>
<p>{_safe(preview.counts)}</p>{warnings}
<ul>{media}</ul>
<p class="soft"><mark>Marked</mark> tokens are trained. Pictures are as the model sees them; tap one for its full size
and the grid of its tokens.</p>
<div class="row">{"".join(_piece(piece, control) for piece in preview.pieces)}</div>
</body></html>
"""


def write_html(preview: Preview, path: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    target = Path(path)
    spare = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        spare.write_text(as_html(preview), encoding="utf-8", errors="replace")
        os.replace(spare, target)
    except OSError as error:
        spare.unlink(missing_ok=True)
        raise ConfigError(
            f"--html {path}: cannot be written ({error.strerror}). Name a file in a folder that can be."
        ) from error


def _piece(piece: Piece, control: re.Pattern[str]) -> str:
    if piece.medium is not None:
        return _figure(piece.text, piece.medium)
    parts = control.split(printable(piece.text))  # every second part is a control token
    html = "".join(f'<span class="token">{_safe(p)}</span>' if i % 2 else _safe(p) for i, p in enumerate(parts))
    return f"<mark>{html}</mark>" if piece.trained else html


def _figure(pad: str, medium: Medium) -> str:
    frames_FHW3 = frames_of(medium.encoded)
    count = len(frames_FHW3)
    shown = count if count <= MOST_FRAMES else MOST_FRAMES
    picked = [i * (count - 1) // max(1, shown - 1) for i in range(shown)]
    grid = medium.encoded.grid
    style = f"--columns:{grid.w // MERGE};--rows:{grid.h // MERGE}"
    images = "".join(
        f'<span class="frame" tabindex="0" style="{style}">'
        f'<img alt="{_safe(medium.name)}" src="{_png(frames_FHW3[i])}"></span>'
        for i in picked
    )
    some = f", {shown} of its {count} frames shown" if shown < count else ""
    caption = f'<span class="token">{_safe(pad)}</span> x{medium.tokens:,} &middot; {_safe(medium.name)}{some}'
    return f'<figure><div class="strip">{images}</div><figcaption>{caption}</figcaption></figure>'


def _png(frame_HW3) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame_HW3.numpy()).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _safe(text: str) -> str:
    return escape(printable(text))
