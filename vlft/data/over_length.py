"""Makes rows that are over the limit fit, as `--over_length` says: with fewer pixels, or fewer pictures and videos.

A pure function of the row and of the headers of its files, so that measuring and encoding change a row in the same way.
Needs no tokenizer: `vlft.data.encode` passes a function that counts the tokens of a conversation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from vlft.config.fit import Fit
from vlft.config.recipe import Recipe
from vlft.data.media.read import Headers, MediaError, grid_of, read_headers, recipe_for
from vlft.data.sample import Grid, Image, Media, Part, Sample, Text, Video

HALVINGS = 20  # steps of the bisection for the share of pixels; a millionth of a picture is less than one token


class TooLong(Exception):
    """A row cannot be made to fit. The message says by how much, and does not name the row."""


def fitted(
    sample: Sample, fit: Fit, recipe: Recipe, text_tokens: Callable[[Sample], int], *, copies: int = 1
) -> Sample:
    """Make a row that is over the limit fit. `.changed` of the result says what was done.

    Args:
        sample: the row; the headers of its media are read.
        recipe: the run's budgets.
        text_tokens: counts the tokens of a conversation without those of its media.
        copies: how often the tokens of a medium are in the row. A preference row may repeat its prompt.

    Raises:
        MediaError: a medium cannot be opened.
        TooLong: the row cannot be made to fit.
    """
    tokens = functools.partial(_tokens, recipe=recipe, copies=copies)
    seen = [read_headers(medium) for medium in sample.media]
    grids = [grid_of(*pair, recipe) for pair in zip(sample.media, seen, strict=True)]
    said = text_tokens(sample)
    before = said + tokens(grids)
    if fit.how == "shrink":
        made, now = _shrunk(sample, seen, grids, said, fit, recipe, tokens)
    else:
        made, now = _dropped(sample, grids, fit, text_tokens, tokens)
    return replace(made, changed=f"{made.changed}: {now:,} tokens instead of {before:,}")


def _tokens(grids: Sequence[Grid], *, recipe: Recipe, copies: int) -> int:
    return copies * sum(grid.tokens(recipe.merge_size) for grid in grids)


def _patches(grids: Sequence[Grid]) -> int:
    return sum(grid.patches for grid in grids)


def _shrunk(
    sample: Sample,
    seen: Sequence[Headers],
    grids: Sequence[Grid],
    said: int,
    fit: Fit,
    recipe: Recipe,
    tokens: Callable[[Sequence[Grid]], int],
) -> tuple[Sample, int]:
    """Lower the maximum pixels of stills and of videos by one factor, starting at the largest still and video."""
    media = sample.media
    largest = {kind: _largest(kind, media, grids, recipe) for kind in (Image, Video)}

    def at(share: float) -> list[Media]:
        return [_capped(medium, int(largest[type(medium)] * share), recipe) for medium in media]

    def measured(share: float) -> list[Grid] | None:
        try:
            return [grid_of(*pair, recipe) for pair in zip(at(share), seen, strict=True)]
        except MediaError:  # a narrow picture has no size with so few pixels
            return None

    def fits(found: Sequence[Grid]) -> bool:
        return not fit.over(said + tokens(found), _patches(found))

    least = measured(0)
    if least is None or not fits(least):
        at_least = "" if least is None else f"{said + tokens(least):,} tokens and {_patches(least):,} patches"
        raise TooLong(
            f"the row has {said + tokens(grids):,} tokens and {_patches(grids):,} patches, and with every "
            f"picture at its minimum pixels {at_least or 'nothing is left of one'}; {fit.limit}. Split the row, lower "
            "--image_min_pixels or --video_min_pixels, or use --over_length drop_media"
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = measured(middle)
        if found is not None and fits(found):
            low = middle
        else:
            high = middle
    made = at(low)
    caps = [
        f"{name} to at most {max(m.overrides.max_pixels or 0 for m in made if isinstance(m, kind)):,} pixels"
        for name, kind in (("pictures", Image), ("videos" if _per_clip(recipe) else "video frames", Video))
        if any(isinstance(m, kind) for m in made)
    ]
    now = said + tokens(measured(low) or ())
    return replace(_with(sample, made), changed=f"shrunk {' and '.join(caps)}"), now


def _largest(kind: type, media: Sequence[Media], grids: Sequence[Grid], recipe: Recipe) -> int:
    """Return the pixels of the largest still, or of the largest frame or clip, as it would be trained."""
    side = recipe.patch_size**2
    frames = recipe.temporal_patch_size if kind is Video and _per_clip(recipe) else 0
    sizes = (g.h * g.w * side * (g.t * frames or 1) for m, g in zip(media, grids, strict=True) if isinstance(m, kind))
    return max(sizes, default=0)


def _per_clip(recipe: Recipe) -> bool:
    """Whether the pixel limits of a video are those of all its frames together."""
    return recipe.video_rule == "processor"


def _capped(medium: Media, most: int, recipe: Recipe) -> Media:
    """Return the medium with at most `most` pixels, but not below the minimum of its budget or the size of a token."""
    own = recipe_for(medium, recipe)
    low, high = (
        (own.image_min_pixels, own.image_max_pixels)
        if isinstance(medium, Image)
        else (own.video_min_pixels, own.video_max_pixels)
    )
    cap = min(high, max(most, low, recipe.factor**2))
    return replace(medium, overrides=replace(medium.overrides, max_pixels=cap))


def _dropped(
    sample: Sample,
    grids: Sequence[Grid],
    fit: Fit,
    text_tokens: Callable[[Sample], int],
    tokens: Callable[[Sequence[Grid]], int],
) -> tuple[Sample, int]:
    """Drop as few of the last media as necessary: the end of a story is understood from its beginning."""
    media = sample.media

    def cut(kept: int) -> tuple[Sample, int]:
        shorter = _with(sample, [*media[:kept], *([None] * (len(media) - kept))])
        return shorter, text_tokens(shorter) + tokens(grids[:kept])

    def fits(kept: int) -> bool:
        return not fit.over(cut(kept)[1], _patches(grids[:kept]))

    if not fits(0):
        raise TooLong(f"the text of the row alone has {cut(0)[1]:,} tokens; {fit.limit}. Split the row")
    low, high = 0, len(media)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    made, now = cut(low)
    names = ", ".join(medium.field for medium in media[low:])
    names = names if len(names) <= 200 else f"{media[low].field} to {media[-1].field}"
    return replace(made, changed=f"dropped the last {len(media) - low} of {len(media)} media ({names})"), now


def _with(sample: Sample, media: Sequence[Media | None]) -> Sample:
    """Return the row with its media replaced; None removes a medium and its tag."""
    following = iter(media)
    turns = []
    for turn in sample.turns:
        parts: list[Part] = []
        dropped = False
        for part in turn.parts:
            stays = part if isinstance(part, Text) else next(following)
            # The newlines beside a tag were removed with it; without the picture, two texts would run together.
            if dropped and isinstance(stays, Text) and parts and isinstance(parts[-1], Text):
                parts.append(Text(text="\n"))
            dropped = stays is None
            parts += [] if stays is None else [stays]
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(sample, turns=tuple(turns))
