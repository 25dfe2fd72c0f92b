"""The number of patches of pictures and videos, from their headers. Independent of tokens and rows. Needs no torch.

The stock path is the reference: `Qwen2VLImageProcessor` (torchvision backend) for stills. For videos it is
qwen-vl-utils 0.0.14 followed by `Qwen2VLVideoProcessor(do_resize=False)`, or `Qwen3VLVideoProcessor`, which samples and
resizes itself (`Recipe.video_rule`). `vlft.data.media.decode` decodes them, `vlft.data.media.pictures` and
`vlft.data.media.clips` open the files.

Letters in shapes: P patches; H, W pixels after resizing; F frames.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlft.config.recipe import FRAME_TOKENS, LIST_FPS, Recipe
from vlft.data.media.clips import Clip, open_clip
from vlft.data.media.limits import VIDEO_TOKENS, overridden
from vlft.data.media.missing import missing
from vlft.data.media.pictures import MissingFile, Unreadable, depth_remark, picture_header
from vlft.data.media.sizes import clip_count, clip_size, frame_count, frame_range, frame_size, still_size
from vlft.data.sample import Grid, Image, Media, Video
from vlft.errors import ConfigError, VlftError

MAX_RATIO = 200


class MediaError(VlftError):
    """A picture or video (`.field` of its row) that cannot be trained on, and why (`.reason`)."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self):  # it crosses from loader workers by pickle, as `DataError` does
        return type(self), (self.field, self.reason)


def measure(media: Media, recipe: Recipe) -> Grid:
    """Return the grid of `decode`'s result, from file headers (of a video file: its index and first frame).

    Raises:
        MediaError: the headers show that the medium cannot be decoded.
    """
    return grid_of(media, read_headers(media), recipe)


@dataclass(frozen=True, kw_only=True)
class Headers:
    """Headers of a medium; enough for `grid_of` under any recipe.

    Attributes:
        sizes: (H, W) of a still, or of each picture of a list of frames.
        deep: whether each of these pictures has more than 8 bits per channel.
        clip: the opened video file, or None.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    deep: tuple[bool, ...] = ()
    clip: Clip | None = None


def read_headers(media: Media) -> Headers:
    """Read the headers of a medium.

    Raises:
        MediaError: the errors of `measure`.
    """
    try:
        if isinstance(media, Image):
            headers = [picture_header(media.path)]
        elif media.path is None:
            headers = [of_frame(media, i, picture_header) for i in range(len(media.frames))]
        else:
            return Headers(clip=open_clip(media.path))
        return Headers(sizes=tuple(one.size for one in headers), deep=tuple(one.deep for one in headers))
    except Unreadable as error:
        raise refused(media, error) from error


def depth_remarks(media: Media, seen: Headers | None = None) -> list[tuple[str, str]]:
    """Find pictures of more than 8 bits per channel that are trained almost black, as (field, remark) pairs.

    Args:
        seen: result of `read_headers`. Pictures of 8 bits are not decoded.

    Raises:
        MediaError: the errors of `decode`.
    """
    if isinstance(media, Video) and media.path is not None:
        return []
    deep_ones = (seen or read_headers(media)).deep
    remarks = []
    for (field, path), deep in zip(media.files, deep_ones, strict=True):
        try:
            remark = depth_remark(path) if deep else None
        except Unreadable as error:
            raise refused(media, error, field=field) from error
        if remark:
            remarks.append((field, remark))
    return remarks


def grid_of(media: Media, seen: Headers, recipe: Recipe) -> Grid:
    """Return the grid of a medium whose headers were read. Opens no file.

    Raises:
        MediaError: the errors of `measure`.
    """
    recipe = recipe_for(media, recipe)
    try:
        if isinstance(media, Image):
            return grid_for(1, *still_size_of(*seen.sizes[0], recipe), recipe)
        if seen.clip is None:
            height, width = listed_size(media, seen.sizes, recipe)
            frames = len(seen.sizes) + (len(seen.sizes) % 2 if recipe.video_rule == "qwen-vl-utils" else 0)
        else:
            _, _, frames = taken(seen.clip, media, recipe)
            height, width = seen.clip.height, seen.clip.width
        grid = grid_for(-(-frames // 2), *video_size_of(frames, height, width, recipe), recipe)
        return _timed(grid, media, seen, frames, recipe)
    except Unreadable as error:
        raise refused(media, error) from error


def grid_for(t: int, height: int, width: int, recipe: Recipe) -> Grid:
    """Return the grid of `t` time steps of this size, in pixels."""
    return Grid(t=t, h=height // recipe.patch_size, w=width // recipe.patch_size)


def _timed(grid: Grid, video: Video, seen: Headers, frames: int, recipe: Recipe) -> Grid:
    """Return the grid of a video with the times that the model uses.

    The arithmetic, with its order of operations, is that of `VideoMetadata.sampled_fps` and of `_calculate_timestamps`
    in transformers 5.17 to 5.23.
    """
    if recipe.video_time == "index":
        return grid
    if seen.clip is None:
        rate = video.overrides.fps or recipe.frames_fps or LIST_FPS
        there: float = frames / rate * rate
        indices = list(range(frames))
    else:
        rate, there = seen.clip.fps, _span(seen.clip, video)[2]
        indices = chosen(seen.clip, video, recipe) if recipe.video_time == "text" else []
    if recipe.video_time == "seconds":
        return replace(grid, pace=recipe.temporal_patch_size / (frames / there * rate))
    seconds = [index / rate for index in [*indices, *indices[len(indices) - len(indices) % 2 :]]]
    return replace(grid, times=tuple((a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True)))


def recipe_for(media: Media, recipe: Recipe) -> Recipe:
    """Return the budgets of this medium: those of the run, with the overrides of its row.

    Raises:
        MediaError: the row's values contradict each other or those of the run.
    """
    try:
        return overridden(recipe, media.overrides, video=isinstance(media, Video))
    except ConfigError as error:
        raise MediaError(media.field, str(error)) from error


def refused(media: Media, error: Unreadable, *, field: str | None = None) -> MediaError:
    """Return the error for a medium that cannot be read; `field` names a part of it, such as a frame."""
    path, reason = media.path, str(error)
    if isinstance(error, MissingFile):
        reason = missing(error.path, media.folder)
    elif path is not None and path not in reason:
        reason = f"{path}: {reason}"
    return MediaError(field or media.field, reason)


def still_size_of(height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) to which the stock image processor resizes a still."""
    _check_ratio(height, width)
    return still_size(height, width, factor=recipe.factor, low=recipe.image_min_pixels, high=recipe.image_max_pixels)


def listed_size(video: Video, sizes: Sequence[tuple[int, int]], recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) of the pictures of a list before they are resized as a video.

    Raises:
        MediaError: the pictures have different sizes.
        Unreadable: there are too few.
    """
    if recipe.video_rule == "qwen-vl-utils":
        return snapped_size(video, sizes, recipe)
    if len(sizes) < 2:
        raise Unreadable("a video of 1 frame, 2 are needed. Use it as an image")
    for i, (height, width) in enumerate(sizes):
        if (height, width) != sizes[0]:
            raise MediaError(
                f"{video.field}[{i}]",
                f"{video.frames[i]} is {width}x{height}, the first frame {sizes[0][1]}x{sizes[0][0]}. Resize all "
                "frames to one size",
            )
    return sizes[0]


def snapped_size(video: Video, sizes: Sequence[tuple[int, int]], recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) to which qwen-vl-utils first resizes all pictures of a list.

    Both are multiples of twice our factor: its `fetch_video` passes the side of a merged patch to `fetch_image`, which
    expects the side of a patch.
    """
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    snapped = [resized(height, width, 2 * recipe.factor, low, high) for height, width in sizes]
    for i, (height, width) in enumerate(snapped):
        if (height, width) != snapped[0]:
            raise MediaError(
                f"{video.field}[{i}]",
                f"{video.frames[i]} is {sizes[i][1]}x{sizes[i][0]}, the first frame {sizes[0][1]}x{sizes[0][0]}; "
                f"resized, {width}x{height} and {snapped[0][1]}x{snapped[0][0]}. Resize all frames to one size",
            )
    return snapped[0]


def of_frame(video: Video, i: int, read: Any) -> Any:
    try:
        return read(video.frames[i])
    except Unreadable as error:
        raise refused(video, error, field=f"{video.field}[{i}]") from error


def frames_taken(clip: Clip, video: Video, recipe: Recipe) -> list[int]:
    """Choose the frames to take from a video file, evenly spaced over the part that the row asks for.

    Args:
        recipe: recipe of this video, as returned by `recipe_for`.

    Raises:
        Unreadable: the video has too few frames.
    """
    if recipe.video_rule == "processor":
        return chosen(clip, video, recipe)
    import torch  # qwen-vl-utils rounds the results of `torch.linspace`, which differ between CPUs where they tie

    return torch.linspace(*taken(clip, video, recipe)).round().long().tolist()


def chosen(clip: Clip, video: Video, recipe: Recipe) -> list[int]:
    """Choose frames as `Qwen3VLVideoProcessor` does, or nearly as qwen-vl-utils does. Needs no torch.

    Indices count from the start of the file, also if the row asks for a part of it.
    """
    return np.linspace(*taken(clip, video, recipe)).round().astype(int).tolist()


def taken(clip: Clip, video: Video, recipe: Recipe) -> tuple[int, int, int]:
    """Return the first and the last frame to take from a video file, and their number. Raises as `frames_taken`."""
    first, last, there = _span(clip, video)
    if there < 2:
        raise Unreadable(f"{clip.path}: a video of {there} frame, 2 are needed. Use it as an image")
    if recipe.nframes is None and recipe.video_rule == "processor":
        limits = {"least": recipe.min_frames, "most": recipe.video_max_frames}
        frames = clip_count(there, clip.fps, fps=recipe.fps, **limits)
    elif recipe.nframes is None:
        frames = frame_count(there, clip.fps, fps=recipe.fps, most=recipe.video_max_frames)
    elif recipe.nframes > there:
        flag = "--nframes" if video.overrides.nframes is None else "nframes"
        raise Unreadable(
            f"{clip.path}: {flag} {recipe.nframes}, and it has {there} frames"
            f"{'' if there == clip.frames else ' there'}. Lower {flag} to {there - there % 2}, or use {flag[:-7]}fps"
        )
    else:
        frames = recipe.nframes
    return first, last, frames


def _span(clip: Clip, video: Video) -> tuple[int, int, int]:
    """Return first and last frame of the part that the row asks for, and its number of frames."""
    start, end = video.overrides.video_start, video.overrides.video_end
    if (start is None and end is None) or clip.frames < 2:
        return 0, clip.frames - 1, clip.frames
    found = frame_range(start, end, frames=clip.frames, rate=clip.fps)
    if found is None:
        raise Unreadable(
            f"{clip.path}: video_start {start or 0:g} to video_end {'its end' if end is None else f'{end:g}'} leaves "
            f"less than 2 frames of its {clip.frames / clip.fps:.2f} s. Change them"
        )
    return *found, found[1] - found[0] + 1


def video_size_of(frames: int, height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) to which the frames of a video with this many frames are resized."""
    if recipe.video_rule == "qwen-vl-utils":
        return frame_size_of(frames, height, width, recipe)
    _check_ratio(height, width)
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    limits = {"factor": recipe.factor, "low": low, "high": high}
    return clip_size(frames, height, width, **limits, frame_tokens=recipe.frame_tokens)


def frame_size_of(frames: int, height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) to which qwen-vl-utils resizes the frames of a video with this many frames."""
    low = recipe.video_min_pixels
    high = max(min(FRAME_TOKENS * recipe.factor**2, total_pixels(recipe) / frames * 2), int(low * 1.05))
    return resized(height, width, recipe.factor, low, min(recipe.video_max_pixels, high))


def total_pixels(recipe: Recipe) -> float:
    # Always passed: qwen-vl-utils' own default depends on an environment variable (MODEL_SEQ_LEN).
    return VIDEO_TOKENS * recipe.factor * recipe.factor * 0.9


def resized(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    _check_ratio(height, width)
    high, wide = frame_size(height, width, factor=factor, low=min_pixels, high=max_pixels)
    if not high or not wide:
        raise Unreadable(
            f"a frame of {width}x{height} is so narrow that {int(max_pixels)} pixels reduce it to {wide}x{high}. "
            "Raise --video_max_pixels or crop the frames"
        )
    return high, wide


def _check_ratio(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise Unreadable(
            f"{width}x{height}: the longer side is {max(height, width) / min(height, width):.1f} times the shorter, "
            f"and at most {MAX_RATIO} times is supported. Crop it"
        )


def qwen_vl_utils() -> Any:
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise ConfigError("videos need qwen-vl-utils. Install it: pip install 'qwen-vl-utils>=0.0.14'") from error
    # It warns about a maximum above its own for every video; `Recipe.of` has already checked ours.
    logging.getLogger(vision_process.__name__).setLevel(logging.ERROR)
    return vision_process
