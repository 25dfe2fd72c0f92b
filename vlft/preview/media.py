"""The pictures and videos of a previewed row: what their files hold, and what the model gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vlft.config.recipe import Recipe
from vlft.data.media import decode as decoder
from vlft.data.media.clips import open_clip
from vlft.data.media.pictures import picture_size
from vlft.data.media.read import MediaError, frames_taken, recipe_for
from vlft.data.render import refused
from vlft.data.sample import EncodedMedia, Grid, Image, Media, Sample, Video


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A still or video of the row.

    Attributes:
        name: `picture 1`, `video 2`: counted from 1 in the order of the tags.
        part: the still or video in the row.
        source: what the file holds, as text: `640x480`, `72 frames of 160x112 at 8 fps`.
        grid: its patch counts.
        recipe: pixel and frame settings.
    """

    name: str
    part: Media
    source: str
    grid: Grid
    recipe: Recipe

    @property
    def field(self) -> str:
        """The field of the row that names it."""
        return self.part.field

    @property
    def path(self) -> str:
        """Path of the file; of a list of frames, the path of the first frame."""
        return self.part.files[0][1]

    @property
    def is_video(self) -> bool:
        return isinstance(self.part, Video)

    @property
    def tokens(self) -> int:
        """Number of tokens it takes in the language model."""
        return self.grid.tokens(self.recipe.merge_size)

    @property
    def frames(self) -> int:
        """Number of frames that the model gets; 1 for a still."""
        return self.grid.t * self.recipe.temporal_patch_size if self.is_video else 1

    @property
    def shown(self) -> str:
        """What the model gets, as text: size, patches, tokens."""
        grid, patch = self.grid, self.recipe.patch_size
        frames = f"{self.frames} frames of " if self.is_video else ""
        steps = f"{grid.t} x " if self.is_video else ""
        return f"{frames}{grid.w * patch}x{grid.h * patch}, {steps}{grid.w}x{grid.h} patches, {self.tokens:,} tokens"

    @cached_property
    def encoded(self) -> EncodedMedia:
        """Its pixels, decoded when they are first asked for. Raises MediaError if its file has changed."""
        return decoder.decode(self.part, self.recipe)

    @cached_property
    def times(self) -> tuple[float, ...]:
        """Time of each frame of a video file, in seconds from its first frame; empty for all other media.

        If the number of frames is odd, the model gets the last one twice.
        """
        if not isinstance(self.part, Video) or self.part.path is None:
            return ()
        clip = open_clip(self.part.path)
        indices = frames_taken(clip, self.part, recipe_for(self.part, self.recipe))
        indices += indices[-1:] * (self.frames - len(indices))
        return tuple(float(clip.times[i]) if len(clip.times) else i / clip.fps for i in indices)


def media_of(sample: Sample, grids: Sequence[Grid], recipe: Recipe) -> tuple[Medium, ...]:
    """Return the pictures and videos of a row, in the order of their tags, after a check that they can be decoded.

    Args:
        grids: of each.

    Raises:
        DataError: one cannot be decoded.
    """
    seen = {Image: 0, Video: 0}
    media = []
    for part, grid in zip(sample.media, grids, strict=True):
        seen[type(part)] += 1
        word = "picture" if isinstance(part, Image) else "video"
        try:
            decoder.check(part, recipe)
            media.append(
                Medium(name=f"{word} {seen[type(part)]}", part=part, source=_source(part), grid=grid, recipe=recipe)
            )
        except MediaError as error:
            raise refused(sample, error.field, error.reason) from error
    return tuple(media)


def _source(part: Media) -> str:
    if isinstance(part, Video) and part.path is not None:
        clip = open_clip(part.path)
        return f"{clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:.4g} fps"
    height, width = picture_size(part.files[0][1])
    return f"{width}x{height}" if isinstance(part, Image) else f"{len(part.frames)} frames of {width}x{height}"
