"""Videos as text: the pad of a video in a rendered conversation becomes one run of pads per time step, with its time.

As `replace_video_token` of `Qwen3VLProcessor` does in transformers 5.10 and later. The tokens around the pad stay, so
the whole video is inside one more pair of `vision_start` and `vision_end`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from vlft.data.render import Rendered
from vlft.data.sample import Grid
from vlft.families import Family


def with_times(rendered: Sequence[Rendered], grids: Sequence[Grid], family: Family) -> list[Rendered]:
    """Write the times of videos into a rendered conversation.

    Args:
        rendered: pieces of the conversation, with one pad per medium.
        grids: of the media, in order. Those without `times` keep their pad.
        family: names of the tokens.
    """
    if not any(grid.times for grid in grids):
        return list(rendered)
    following = iter(grids)
    pads = re.compile(f"{re.escape(family.image_pad)}|{re.escape(family.video_pad)}")

    def written(found: re.Match[str]) -> str:
        grid = next(following, None)  # a template that writes too many pads is refused where media are counted
        return found[0] if grid is None or not grid.times else _timed(grid, family)

    return [replace(piece, text=pads.sub(written, piece.text)) for piece in rendered]


def _timed(grid: Grid, family: Family) -> str:
    """Return the text of a video, with one pad per step. `.1f` rounds a half to the even digit."""
    run = f"{family.vision_start}{family.video_pad}{family.vision_end}"
    return "".join(f"<{seconds:.1f} seconds>{run}" for seconds in grid.times)
