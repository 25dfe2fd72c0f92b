"""Rows over the limit, made to fit as `--over_length` says: with fewer pixels, or with fewer pictures and videos.

A pure function of the row and of its files' headers, so that measuring and encoding change a row alike. Knows no
tokenizer: how many tokens a conversation has is asked of `vlft.data.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vlft.config.recipe import Fit, Recipe
from vlft.data.media.read import Headers, MediaError, grid_of, read_headers, recipe_for
from vlft.data.sample import Grid, Image, Media, Part, Sample, Text, Video

HALVINGS = 20  # of the share of pixels that is looked for; a millionth of a picture is below one token


class TooLong(Exception):
    """A row that cannot be made to fit; the message says by how much, and names no row."""


def fitted(sample: Sample, fit: Fit, recipe: Recipe, text_tokens: Callable[[Sample], int]) -> Sample:
    """A row that is over the limit, made to fit; `.changed` says what was done.

    Args:
        sample: the row; its media are looked at.
        recipe: the run's budgets.
        text_tokens: tokens of a conversation beside those of its media.

    Raises:
        MediaError: a medium cannot be opened.
        TooLong: it does not fit, whatever is done.
    """
    seen = [read_headers(medium) for medium in sample.media]
    grids = [grid_of(*pair, recipe) for pair in zip(sample.media, seen, strict=True)]
    said = text_tokens(sample)
    before = said + _tokens(grids, recipe)
    if fit.how == "shrink":
        made, now = _shrunk(sample, seen, grids, said, fit, recipe)
    else:
        made, now = _dropped(sample, grids, fit, recipe, text_tokens)
    return replace(made, changed=f"{made.changed}: {now:,} tokens instead of {before:,}")


def _tokens(grids: Sequence[Grid], recipe: Recipe) -> int:
    return sum(grid.tokens(recipe.merge_size) for grid in grids)


def _patches(grids: Sequence[Grid]) -> int:
    return sum(grid.patches for grid in grids)


def _shrunk(
    sample: Sample, seen: Sequence[Headers], grids: Sequence[Grid], said: int, fit: Fit, recipe: Recipe
) -> tuple[Sample, int]:
    """With the most pixels of stills and of frames lowered by one factor, from those that the largest of each has."""
    media = sample.media
    largest = {kind: _largest(kind, media, grids, recipe) for kind in (Image, Video)}

    def at(share: float) -> list[Media]:
        return [_capped(medium, int(largest[type(medium)] * share), recipe) for medium in media]

    def measured(share: float) -> list[Grid] | None:
        try:
            return [grid_of(*pair, recipe) for pair in zip(at(share), seen, strict=True)]
        except MediaError:  # so narrow that so few pixels leave nothing of it
            return None

    def fits(found: Sequence[Grid]) -> bool:
        return not fit.over(said + _tokens(found, recipe), _patches(found))

    least = measured(0)
    if least is None or not fits(least):
        at_least = "" if least is None else f"{said + _tokens(least, recipe):,} tokens and {_patches(least):,} patches"
        raise TooLong(
            f"the row has {said + _tokens(grids, recipe):,} tokens and {_patches(grids):,} patches, and with every "
            f"picture at its least pixels {at_least or 'nothing is left of one'}; {fit.limit}. Split the row, lower "
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
        for name, kind in (("pictures", Image), ("video frames", Video))
        if any(isinstance(m, kind) for m in made)
    ]
    now = said + _tokens(measured(low) or (), recipe)
    return replace(_with(sample, made), changed=f"shrunk {' and '.join(caps)}"), now


def _largest(kind: type, media: Sequence[Media], grids: Sequence[Grid], recipe: Recipe) -> int:
    """Pixels of the largest still, or frame, as it would be trained."""
    side = recipe.patch_size**2
    return max((g.h * g.w * side for m, g in zip(media, grids, strict=True) if isinstance(m, kind)), default=0)


def _capped(medium: Media, most: int, recipe: Recipe) -> Media:
    """The medium with at most so many pixels, but no less than its budget's least, nor than a token."""
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
    recipe: Recipe,
    text_tokens: Callable[[Sample], int],
) -> tuple[Sample, int]:
    """Without the last media, as few as need be: the beginning of a story is what its rest is understood by."""
    media = sample.media

    def cut(kept: int) -> tuple[Sample, int]:
        shorter = _with(sample, [*media[:kept], *([None] * (len(media) - kept))])
        return shorter, text_tokens(shorter) + _tokens(grids[:kept], recipe)

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
    """The row with other media in the places of its own; None leaves one out, tag and all."""
    following = iter(media)
    turns = []
    for turn in sample.turns:
        parts: list[Part] = []
        dropped = False
        for part in turn.parts:
            stays = part if isinstance(part, Text) else next(following)
            # The newlines beside a tag went with it; without a picture there, texts would run into each other.
            if dropped and isinstance(stays, Text) and parts and isinstance(parts[-1], Text):
                parts.append(Text(text="\n"))
            dropped = stays is None
            parts += [] if stays is None else [stays]
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(sample, turns=tuple(turns))
