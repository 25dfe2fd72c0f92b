"""Show rows as the model sees them: the tokens, which of them are trained, and the resized pictures.

`preview_row` reads and encodes a row. `vlft.preview.text` shows it on a terminal, `vlft.preview.page` as a web page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import Recipe
from vlft.data.encode import KIND_TEXT, UNTRAINED
from vlft.data.media.clips import Clip, open_clip
from vlft.data.media.pictures import picture_size
from vlft.data.media.read import depth_remarks, frames_taken, recipe_for
from vlft.data.sample import EncodedMedia, EncodedSample, Image, Sample, Video
from vlft.errors import BadRow, ConfigError, DataError
from vlft.families import Family
from vlft.setup import Base, open_base, open_some


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A still or video of the row.

    Attributes:
        name: `picture 1`, `video 2`: counted from 1 in the order of the tags.
        field: the field of the row that names it.
        path: path of the file; of a list of frames, the path of the first frame.
        source: what the file holds, as text: `640x480`, `72 frames of 160x112 at 8 fps`.
        tokens: number of tokens it takes in the language model.
        encoded: its pixels and grid.
        patch: side of a patch, in pixels.
        merge: side of a merged patch, in patches.
        times: time of each frame of a video file, in seconds; empty if the times are unknown.
    """

    name: str
    field: str
    path: str
    source: str
    tokens: int
    encoded: EncodedMedia
    patch: int
    merge: int
    times: tuple[float, ...] = ()

    @property
    def shown(self) -> str:
        """What the model gets, as text: size, patches, tokens."""
        grid = self.encoded.grid
        frames = f"{grid.t * self.encoded.patches.shape[2]} frames of " if self.encoded.is_video else ""
        steps = f"{grid.t} x " if self.encoded.is_video else ""
        size = f"{grid.w * self.patch}x{grid.h * self.patch}"
        return f"{frames}{size}, {steps}{grid.w}x{grid.h} patches, {self.tokens:,} tokens"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive tokens that are all trained or all untrained: text, or the pads of one medium.

    Attributes:
        text: the tokens as text; for a medium, its pad once.
        trained: whether the tokens are trained.
        medium: the medium that the pads stand for; None for text.
    """

    text: str
    trained: bool
    medium: Medium | None = None


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A row as the model sees it: the result of `preview_row`.

    Attributes:
        sample: the parsed row.
        encoded: the row as tokens and pixels.
        media: its pictures and videos, in the order of their tags.
        pieces: the whole row, in order.
        control_tokens: texts that the model reads as control tokens; the page shades them.
    """

    sample: Sample
    encoded: EncodedSample
    media: tuple[Medium, ...]
    pieces: tuple[Piece, ...]
    control_tokens: tuple[str, ...]

    @property
    def title(self) -> str:
        name = f" (id {self.sample.id})" if self.sample.id is not None else ""
        return f"{self.sample.file}[{self.sample.index}]{name}"

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return int((self.encoded.labels_T != UNTRAINED).sum())

    @property
    def counts(self) -> str:
        """The numbers of tokens, as text."""
        vision = sum(medium.tokens for medium in self.media)
        of_media = f", {vision:,} of pictures and videos" if self.media else ""
        return f"{len(self.encoded.input_ids_T):,} tokens: {self.trained:,} trained{of_media}"

    def as_json(self) -> dict[str, Any]:
        """Return the document of `vlft preview --json`. Labels are aligned with input_ids, -100 where untrained."""
        row = self.encoded

        def grids(*, videos: bool) -> list[list[int]]:
            return [[m.grid.t, m.grid.h, m.grid.w] for m in row.media if m.is_video == videos]

        return {
            "file": row.file,
            "index": row.index,
            "id": row.id,
            "tokens": len(row.input_ids_T),
            "supervised": self.trained,
            "warnings": [{"field": field, "reason": remark} for field, remark in self.sample.warnings],
            "media": [
                {"field": m.field, "path": m.path, "source": m.source, "shown": m.shown, "tokens": m.tokens}
                for m in self.media
            ],
            "input_ids": row.input_ids_T.tolist(),
            "labels": row.labels_T.tolist(),
            "position_ids": row.positions_3T.tolist(),
            "image_grid_thw": grids(videos=False),
            "video_grid_thw": grids(videos=True),
            "text": row.text,
        }


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A refused row and the reason."""

    row: BadRow

    def as_json(self) -> dict[str, Any]:
        """Return the entry of this row in `vlft preview --json`."""
        row = self.row
        return {"file": row.file, "index": row.index, "id": row.id, "field": row.field, "refused": row.reason}


def preview_row(file: str, index: int, data: DataFlags, model: ModelFlags, *, given: frozenset[str]) -> Preview:
    """Read one row and encode it as for training.

    Args:
        file: data file.
        index: index of the row in the file, from 0.
        data: flags of the data, as for training.
        model: flags of the model, as for training. A base is needed for its tokenizer and chat template.
        given: names of the flags that the user set.

    Raises:
        ConfigError: the row is refused (with its reason) or does not exist, or a flag cannot be applied.
        CheckpointError: the base is missing, incomplete, or not a Qwen-VL.
    """
    (shown,) = preview_rows(file, (index,), data, model, given=given)
    if isinstance(shown, Refused):
        raise ConfigError(str(shown.row))
    return shown


def preview_rows(
    file: str, indices: Sequence[int], data: DataFlags, model: ModelFlags, *, given: frozenset[str]
) -> Iterator[Preview | Refused]:
    """Read several rows and encode them as for training. The base is opened once.

    Args:
        file: data file.
        indices: indices of the rows in the file, from 0, in the order of the result.
        data: flags of the data, as for training.
        model: flags of the model, as for training.
        given: names of the flags that the user set.

    Yields:
        for each index, the row, or why it is refused.

    Raises:
        ConfigError: a row does not exist, or a flag cannot be applied.
        CheckpointError: the base is missing, incomplete, or not a Qwen-VL.
    """
    base = open_base(data, model, given=given)
    rows = open_some(file, indices, data, base.family)
    for place in range(len(rows)):
        try:
            yield preview_sample(rows[place], base)
        except DataError as error:
            yield Refused(row=error.row)


def preview_sample(row: Sample, base: Base) -> Preview:
    """Encode a parsed row as tokens and pixels for `base`.

    Raises:
        DataError: its media cannot be decoded, or it is too long.
    """
    sample = base.encoder.as_trained(row)
    encoded = base.encoder.encode(sample)
    media = _media(sample, encoded, base.recipe)
    remarks = [remark for part in sample.media for remark in depth_remarks(part)]
    return Preview(
        sample=replace(sample, warnings=(*sample.warnings, *remarks)),
        encoded=encoded,
        media=media,
        pieces=tuple(_pieces(encoded, media, base.processor.tokenizer, base.family)),
        control_tokens=base.family.control_tokens,
    )


def _media(sample: Sample, encoded: EncodedSample, recipe: Recipe) -> tuple[Medium, ...]:
    seen = {Image: 0, Video: 0}
    media = []
    for part, pixels in zip(sample.media, encoded.media, strict=True):
        seen[type(part)] += 1
        word = "picture" if isinstance(part, Image) else "video"
        clip = open_clip(part.path) if isinstance(part, Video) and part.path is not None else None
        media.append(
            Medium(
                name=f"{word} {seen[type(part)]}",
                field=part.field,
                path=_first_file(part),
                source=_source(part, clip),
                tokens=pixels.grid.tokens(recipe.merge_size),
                encoded=pixels,
                patch=recipe.patch_size,
                merge=recipe.merge_size,
                times=() if clip is None or isinstance(part, Image) else _times(part, clip, recipe),
            )
        )
    return tuple(media)


def _times(video: Video, clip: Clip, recipe: Recipe) -> tuple[float, ...]:
    """Return the times of the frames taken from a video file, in seconds from its first frame."""
    indices = frames_taken(clip, video, recipe_for(video, recipe))
    return tuple(float(clip.times[i]) if len(clip.times) else i / clip.fps for i in indices)


def _first_file(part: Image | Video) -> str:
    return part.path if isinstance(part, Image) else part.path or part.frames[0]


def _source(part: Image | Video, clip: Clip | None) -> str:
    if clip is not None:
        return f"{clip.frames} frames of {clip.width}x{clip.height} at {clip.fps:.4g} fps"
    height, width = picture_size(_first_file(part))
    return f"{width}x{height}" if isinstance(part, Image) else f"{len(part.frames)} frames of {width}x{height}"


def _pieces(encoded: EncodedSample, media: tuple[Medium, ...], tokenizer: Any, family: Family) -> Iterator[Piece]:
    """Split the row at its media and wherever training starts or stops."""
    ids, kinds = encoded.input_ids_T.tolist(), encoded.kinds_T.tolist()
    trained = (encoded.labels_T != UNTRAINED).tolist()
    following = iter(media)
    start = 0
    while start < len(ids):
        if kinds[start] != KIND_TEXT:
            medium = next(following)
            pad = family.video_pad if medium.encoded.is_video else family.image_pad
            yield Piece(text=pad, trained=False, medium=medium)
            start += medium.tokens
            continue
        end = start
        while end < len(ids) and kinds[end] == KIND_TEXT and trained[end] == trained[start]:
            end += 1
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Piece(text=text, trained=trained[start])
        start = end


def frames_of(media: EncodedMedia, *, merge: int) -> torch.Tensor:
    """Reassemble the pixels that the model sees from the patches that `vlft.data.media.patches` cut.

    Args:
        media: an encoded still or video.
        merge: side of a merged patch, in patches.

    Returns:
        uint8 [F, H, W, 3]: the single frame of a still, or all frames of a video.
    """
    grid, patches = media.grid, media.patches if media.is_video else media.patches[:, :, None]
    pair, side = patches.shape[2], patches.shape[-1]
    # time, block row, block column, row in block, column in block, channel, frame of pair, pixel row, pixel column
    cut = patches.reshape(grid.t, grid.h // merge, grid.w // merge, merge, merge, 3, pair, side, side)
    whole = cut.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return whole.reshape(grid.t * pair, grid.h * side, grid.w * side, 3)
