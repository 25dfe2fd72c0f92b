"""Show previews as one web page that needs no network: pixels are data URIs; it has a light and a dark style."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlft.errors import ConfigError
from vlft.pages.web import picture_uri, render, write_page
from vlft.preview import Medium, Piece, Preview, Refused, Split
from vlft.preview.text import raw_text
from vlft.text import printable

if TYPE_CHECKING:
    import torch

PAGE_PIXELS = 8_000_000  # pixels of all pictures of a page: about 20 MB of PNG
MOST_FRAMES = 32  # frames of a video: a page of several hundred would be too large to open

Shown = Preview | Split | Refused


def as_html(rows: Sequence[Shown]) -> str:
    """Return the page. Texts from the rows are escaped, and nothing in the page can load or run anything."""
    return render("preview.html.j2", **context(rows))


def context(rows: Sequence[Shown]) -> dict[str, Any]:
    """Return the variables of the template `preview.html.j2`.

    Pictures have the size that the model sees, unless all of them together have more than `PAGE_PIXELS` pixels.
    """
    parts = [part for row in rows for part in (row.samples if isinstance(row, Split) else [row])]
    pixels = sum(_pixels(medium) for part in parts if isinstance(part, Preview) for medium in part.media)
    scale = min(1.0, math.sqrt(PAGE_PIXELS / max(1, pixels)))
    first = rows[0]
    title = first.title
    if len(rows) > 1:
        title = f"{len(rows)} rows of {first.row.file if isinstance(first, Refused) else first.sample.file}"
    prompts = any(isinstance(part, Preview) and part.is_prompt for part in parts)
    return {"title": title, "scale": scale, "prompts": prompts, "rows": [_row(part, scale) for part in parts]}


def write_html(rows: Sequence[Shown], path: str) -> None:
    """Write the page atomically.

    Raises:
        ConfigError: the page cannot be written to `path`.
    """
    try:
        write_page(path, as_html(rows))
    except OSError as error:
        raise ConfigError(
            f"--html {path}: cannot be written ({error.strerror}). Use a file in a writable folder."
        ) from error


def _row(row: Preview | Refused, scale: float) -> dict[str, Any]:
    if isinstance(row, Refused):
        bad = row.row
        return {
            "index": bad.index,
            "title": row.title,
            "refused": f"{bad.field}: {bad.reason}",
            "raw": raw_text(row.raw),
        }
    known = "|".join(re.escape(token) for token in sorted(row.control_tokens))
    control = re.compile(f"({known})")
    return {
        "index": row.sample.index,
        "title": row.title,
        "refused": "",
        "counts": row.counts,
        "warnings": row.sample.warnings,
        "media": row.media,
        "pieces": [
            _piece(piece, control, scale) | {"answer": piece.answer, "first": piece.answer != before}
            for before, piece in zip(("", *(piece.answer for piece in row.pieces)), row.pieces, strict=False)
        ],
    }


def _piece(piece: Piece, control: re.Pattern[str], scale: float) -> dict[str, Any]:
    """Return a piece for the template. Every second entry of `parts` is a control token."""
    if piece.medium is not None:
        return {"text": piece.text, "medium": _medium(piece.medium, piece.step, scale) | {"tokens": piece.pads}}
    return {"medium": None, "trained": piece.trained, "parts": control.split(printable(piece.text))}


def _picked(count: int) -> list[int]:
    """Return the indices of the frames that are shown, spread evenly over a video."""
    shown = min(count, MOST_FRAMES)
    return [i * (count - 1) // max(1, shown - 1) for i in range(shown)]


def _pixels(medium: Medium) -> int:
    """Return the number of pixels that the page shows of a medium, at full size."""
    return len(_picked(medium.frames)) * medium.grid.h * medium.grid.w * medium.recipe.patch_size**2


def _medium(medium: Medium, step: int | None, scale: float) -> dict[str, Any]:
    """Return a picture, or frames of a video or of one of its time steps, with the grid of its tokens."""
    merge, pair = medium.recipe.merge_size, medium.recipe.temporal_patch_size
    grid, least, frames_FHW3 = medium.grid, medium.recipe.factor, medium.encoded.pixels
    picked = [i for i in _picked(medium.frames) if step is None or i // pair == step]
    return {
        "name": medium.name,
        "count": len(frames_FHW3) if step is None else pair,
        "columns": grid.w // merge,
        "rows": grid.h // merge,
        "frames": [{"uri": _uri(frames_FHW3[i], scale, least), "stamp": _stamp(medium, i)} for i in picked],
    }


def _stamp(medium: Medium, frame: int) -> str:
    """Return the time of a frame of a video, or its number if the time is unknown (in a list of frames)."""
    if not medium.is_video:
        return ""
    return f"{medium.times[frame]:.2f} s" if medium.times else f"frame {frame + 1}"


def _uri(frame_HW3: torch.Tensor, scale: float, smallest: int) -> str:
    """Return a frame as a data URI. No side is scaled below `smallest` pixels."""
    picture = Image.fromarray(frame_HW3.numpy())
    if scale < 1:
        size = (max(smallest, round(side * scale)) for side in picture.size)
        picture = picture.resize(tuple(size), Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    return picture_uri(picture)
