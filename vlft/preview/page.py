"""`Preview`s as one web page that needs no network: pixels as data URIs, light and dark, readable on a phone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from PIL import Image

from vlft.errors import ConfigError
from vlft.pages.web import document, picture_uri, safe, write_page
from vlft.preview import Medium, Piece, Preview, Refused, frames_of
from vlft.text import printable

PAGE_PIXELS = 8_000_000  # of all pictures: about 20 MB of PNG in a page
MOST_FRAMES = 32  # of a video: a page of several hundred would be too large to open

_STYLE = """
h1{font-size:1.15rem;margin:.4rem 0}h2{font-size:1.05rem;margin:2rem 0 .3rem}
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
.frame small{display:block;font:.75rem/1.3 system-ui,sans-serif;color:var(--soft);text-align:center}
.frame:focus{cursor:zoom-out;outline:2px solid var(--line)}.frame:focus img{max-height:none}
.grid{position:relative;display:inline-block;max-width:100%}
.frame:focus .grid::after{content:"";position:absolute;inset:0;opacity:.55;background-image:
linear-gradient(to right,#fff 1px,transparent 1px),linear-gradient(to bottom,#fff 1px,transparent 1px);
background-size:calc(100%/var(--columns)) calc(100%/var(--rows))}
"""

Shown = Preview | Refused


def as_html(rows: Sequence[Shown]) -> str:
    """The page. Everything that comes from the rows is escaped, and nothing in the page can load or run anything.

    Pictures are as large as the model sees them, unless all of them together have more than `PAGE_PIXELS`.
    """
    shown = [row for row in rows if isinstance(row, Preview)]
    pixels = sum(_pixels(medium) for row in shown for medium in row.media)
    scale = min(1.0, math.sqrt(PAGE_PIXELS / max(1, pixels)))
    first = rows[0]
    title = first.title if isinstance(first, Preview) else f"{first.row.file}[{first.row.index}]"
    if len(rows) > 1:
        title = f"{len(rows)} rows of {_file(first)}"
    small = ""
    if scale < 1:
        small = (
            f'<p class="warn">Pictures are shown at {scale:.0%} of the width and height that the model sees, so that '
            "the page can be opened. Fewer rows show more.</p>"
        )
    contents = ""
    if len(rows) > 1:
        links = " &middot; ".join(f'<a href="#row{i}">{_index(row)}</a>' for i, row in enumerate(rows))
        contents = f'<p class="soft">{links}</p>'
    body = (
        f"<h1>{safe(title)}</h1>{contents}{small}"
        '<p class="soft"><mark>Marked</mark> tokens are trained. Pictures are as the model sees them; tap one for its '
        "full size and the grid of its tokens.</p>"
    )
    body += "".join(_row(row, i, scale, alone=len(rows) == 1) for i, row in enumerate(rows))
    return document(title=title, style=_STYLE, body=body)


def write_html(rows: Sequence[Shown], path: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        write_page(path, as_html(rows))
    except OSError as error:
        raise ConfigError(
            f"--html {path}: cannot be written ({error.strerror}). Name a file in a folder that can be."
        ) from error


def _file(row: Shown) -> str:
    return row.sample.file if isinstance(row, Preview) else row.row.file


def _index(row: Shown) -> int:
    return row.sample.index if isinstance(row, Preview) else row.row.index


def _row(row: Shown, place: int, scale: float, *, alone: bool) -> str:
    if isinstance(row, Refused):
        name = f" (id {row.row.id})" if row.row.id is not None else ""
        return (
            f'<h2 id="row{place}">{safe(f"{row.row.file}[{row.row.index}]{name}")}</h2>'
            f'<p class="bad">refused: {safe(row.row.field)}: {safe(row.row.reason)}</p>'
        )
    known = "|".join(re.escape(token) for token in sorted(row.control_tokens))
    control = re.compile(f"({known})")
    media = "".join(
        f"<li>{safe(m.name)}: {safe(m.source)} &rarr; {safe(m.shown)} "
        f'<span class="soft">{safe(m.field)}: {safe(m.path)}</span></li>'
        for m in row.media
    )
    warnings = "".join(
        f'<p class="warn">warning: {safe(field)}: {safe(remark)}</p>' for field, remark in row.sample.warnings
    )
    pieces = "".join(_piece(piece, control, scale) for piece in row.pieces)
    heading = "" if alone else f'<h2 id="row{place}">{safe(row.title)}</h2>'
    return f'{heading}<p>{safe(row.counts)}</p>{warnings}<ul>{media}</ul><div class="row">{pieces}</div>'


def _piece(piece: Piece, control: re.Pattern[str], scale: float) -> str:
    if piece.medium is not None:
        return _figure(piece.text, piece.medium, scale)
    parts = control.split(printable(piece.text))  # every second part is a control token
    html = "".join(f'<span class="token">{safe(p)}</span>' if i % 2 else safe(p) for i, p in enumerate(parts))
    return f"<mark>{html}</mark>" if piece.trained else html


def _picked(count: int) -> list[int]:
    """Places of the frames that are shown, evenly over a video."""
    shown = min(count, MOST_FRAMES)
    return [i * (count - 1) // max(1, shown - 1) for i in range(shown)]


def _pixels(medium: Medium) -> int:
    """Of what is shown of it, at full size."""
    grid = medium.encoded.grid
    frames = grid.t * medium.encoded.patches.shape[2] if medium.encoded.is_video else 1
    return len(_picked(frames)) * grid.h * grid.w * medium.patch**2


def _figure(pad: str, medium: Medium, scale: float) -> str:
    frames_FHW3 = frames_of(medium.encoded, merge=medium.merge)
    count = len(frames_FHW3)
    picked = _picked(count)
    grid, least = medium.encoded.grid, medium.patch * medium.merge
    style = f"--columns:{grid.w // medium.merge};--rows:{grid.h // medium.merge}"
    images = "".join(
        f'<span class="frame" tabindex="0" style="{style}"><span class="grid">'
        f'<img alt="{safe(medium.name)}" src="{_uri(frames_FHW3[i], scale, least)}"></span>{_stamp(medium, i)}</span>'
        for i in picked
    )
    some = f", {len(picked)} of its {count} frames shown" if len(picked) < count else ""
    caption = f'<span class="token">{safe(pad)}</span> x{medium.tokens:,} &middot; {safe(medium.name)}{some}'
    return f'<figure><div class="strip">{images}</div><figcaption>{caption}</figcaption></figure>'


def _stamp(medium: Medium, frame: int) -> str:
    """When a frame of a video was taken; of a list of frames nobody knows."""
    if not medium.encoded.is_video:
        return ""
    at = f"{medium.times[frame]:.2f} s" if medium.times else f"frame {frame + 1}"
    return f"<small>{at}</small>"


def _uri(frame_HW3: torch.Tensor, scale: float, smallest: int) -> str:
    """A picture; no side of it is scaled below `smallest` pixels."""
    picture = Image.fromarray(frame_HW3.numpy())
    if scale < 1:
        size = (max(smallest, round(side * scale)) for side in picture.size)
        picture = picture.resize(tuple(size), Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    return picture_uri(picture)
