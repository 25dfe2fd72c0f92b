"""Pictures and videos -> patches, and their number from headers alone. Independent of tokens and rows.

The stock path is the reference: `Qwen2VLImageProcessor` (torchvision backend) for stills, and qwen-vl-utils 0.0.14
followed by `Qwen2VLVideoProcessor(do_resize=False)` for videos. `vlft.data.media.pictures` and `vlft.data.media.clips`
open the files.

Letters in shapes: P patches; H, W pixels after resizing; F frames.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlft.config.recipe import FRAME_TOKENS, Recipe
from vlft.data.media.clips import Clip, open_clip, read_frames
from vlft.data.media.limits import VIDEO_TOKENS, overridden
from vlft.data.media.missing import missing
from vlft.data.media.patches import grid_for, still_patches, video_patches
from vlft.data.media.pictures import MissingFile, Unreadable, depth_remark, open_picture, picture_header, read_pixels
from vlft.data.sample import EncodedMedia, Grid, Image, Media, Video
from vlft.errors import ConfigError, VlftError

__all__ = [
    "MediaError",
    "decode",
    "depth_remarks",
    "grid_of",
    "measure",
    "read_headers",
    "recipe_for",
]

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
            headers = [_of_frame(media, i, picture_header) for i in range(len(media.frames))]
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
            return grid_for(1, *_still_size(*seen.sizes[0], recipe), recipe)
        if seen.clip is None:
            height, width = _snapped_size(media, seen.sizes, recipe)
            frames = len(seen.sizes) + len(seen.sizes) % 2
        else:
            frames, height, width = len(frames_taken(seen.clip, media, recipe)), seen.clip.height, seen.clip.width
        return grid_for(frames // 2, *_frame_size(frames, height, width, recipe), recipe)
    except Unreadable as error:
        raise refused(media, error) from error


def recipe_for(media: Media, recipe: Recipe) -> Recipe:
    """Return the budgets of this medium: those of the run, with the overrides of its row.

    Raises:
        MediaError: the row's values contradict each other or those of the run.
    """
    try:
        return overridden(recipe, media.overrides, video=isinstance(media, Video))
    except ConfigError as error:
        raise MediaError(media.field, str(error)) from error


def decode(media: Media, recipe: Recipe) -> EncodedMedia:
    """Decode a medium: the pixels of the stock path before it normalises them, in the ViT's patch order.

    Returns:
        `patches` uint8 [P, 3, 14, 14] for a still, in channels-last memory; the model repeats its single frame.
        [P, 3, 2, 14, 14] for a video.

    Raises:
        MediaError: the file is missing, damaged, truncated, or of a kind that is refused.
    """
    recipe = recipe_for(media, recipe)
    try:
        if isinstance(media, Image):
            return still_patches(_decode_still(media, recipe), recipe)
        if media.path is None:
            return video_patches(_decode_frames(media, recipe), recipe)
        return video_patches(_decode_clip(media, recipe), recipe)
    except Unreadable as error:
        raise refused(media, error) from error


def refused(media: Media, error: Unreadable, *, field: str | None = None) -> MediaError:
    """Return the error for a medium that cannot be read; `field` names a part of it, such as a frame."""
    path, reason = media.path, str(error)
    if isinstance(error, MissingFile):
        reason = missing(error.path, media.folder)
    elif path is not None and path not in reason:
        reason = f"{path}: {reason}"
    return MediaError(field or media.field, reason)


def _decode_still(image: Image, recipe: Recipe) -> torch.Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    pixels_3HW = read_pixels(image.path)
    _, height, width = pixels_3HW.shape
    size = _still_size(height, width, recipe)
    return resize(pixels_3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _still_size(height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) to which the stock image processor resizes a still."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    _check_ratio(height, width)
    low, high = recipe.image_min_pixels, recipe.image_max_pixels
    return smart_resize(height, width, factor=recipe.factor, min_pixels=low, max_pixels=high)


def _decode_frames(video: Video, recipe: Recipe) -> torch.Tensor:
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    height, width = _snapped_size(video, read_headers(video).sizes, recipe)
    # `fetch_video` first resizes all pictures together, and a hundred photographs take 3.6 GB. So they are resized here
    # one by one, unless `fetch_video` would resize the result again: then it needs the pictures in their own size.
    early = _resized(height, width, 2 * recipe.factor, low, high) == (height, width)

    def small(path: str) -> Any:
        picture = open_picture(path)
        return picture.resize((width, height)) if early else picture

    pictures = [_of_frame(video, i, small) for i in range(len(video.frames))]
    frames_F3HW = _qwen_vl_utils().fetch_video(
        {
            "video": pictures,
            "min_pixels": recipe.video_min_pixels,
            "max_pixels": recipe.video_max_pixels,
            "total_pixels": _total_pixels(recipe),
        },
        image_patch_size=recipe.patch_size,
    )
    return frames_F3HW.to(torch.uint8)  # it resizes in uint8 and returns integer values as floats


def _snapped_size(video: Video, sizes: Sequence[tuple[int, int]], recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) to which qwen-vl-utils first resizes all pictures of a list.

    Both are multiples of twice our factor: its `fetch_video` passes the side of a merged patch to `fetch_image`, which
    expects the side of a patch.
    """
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    snapped = [_resized(height, width, 2 * recipe.factor, low, high) for height, width in sizes]
    for i, (height, width) in enumerate(snapped):
        if (height, width) != snapped[0]:
            raise MediaError(
                f"{video.field}[{i}]",
                f"{video.frames[i]} is {sizes[i][1]}x{sizes[i][0]}, the first frame {sizes[0][1]}x{sizes[0][0]}; "
                f"resized, {width}x{height} and {snapped[0][1]}x{snapped[0][0]}. Resize all frames to one size",
            )
    return snapped[0]


def _of_frame(video: Video, i: int, read: Any) -> Any:
    try:
        return read(video.frames[i])
    except Unreadable as error:
        raise refused(video, error, field=f"{video.field}[{i}]") from error


def _decode_clip(video: Video, recipe: Recipe) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize  # not v2: qwen-vl-utils uses this one, which resizes in float

    clip = open_clip(str(video.path))
    indices = frames_taken(clip, video, recipe)
    frames = len(indices)
    size = _frame_size(frames, clip.height, clip.width, recipe)
    frames_F3HW = torch.empty((frames, 3, *size), dtype=torch.uint8)
    done = 0
    for some in read_frames(clip, indices):
        some_K3HW = torch.from_numpy(some).permute(0, 3, 1, 2)
        frames_F3HW[done : done + len(some)] = resize(
            some_K3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        done += len(some)
    return frames_F3HW


def frames_taken(clip: Clip, video: Video, recipe: Recipe) -> list[int]:
    """Choose the frames to take from a video file, evenly spaced over the part that the row asks for.

    Args:
        recipe: recipe of this video, as returned by `recipe_for`.

    Raises:
        Unreadable: the video has too few frames.
    """
    first, last, there = _span(clip, video)
    if there < 2:
        raise Unreadable(f"{clip.path}: a video of {there} frame, 2 are needed. Use it as an image")
    if recipe.nframes is None:
        asked = {"fps": recipe.fps, "max_frames": recipe.video_max_frames}
        frames = _qwen_vl_utils().smart_nframes(asked, total_frames=there, video_fps=clip.fps)
    elif recipe.nframes > there:
        flag = "--nframes" if video.overrides.nframes is None else "nframes"
        raise Unreadable(
            f"{clip.path}: {flag} {recipe.nframes}, and it has {there} frames"
            f"{'' if there == clip.frames else ' there'}. Lower {flag} to {there - there % 2}, or use {flag[:-7]}fps"
        )
    else:
        frames = recipe.nframes
    return torch.linspace(first, last, frames).round().long().tolist()


def _span(clip: Clip, video: Video) -> tuple[int, int, int]:
    """Return first and last frame of the part that the row asks for, and its number of frames."""
    start, end = video.overrides.video_start, video.overrides.video_end
    if (start is None and end is None) or clip.frames < 2:
        return 0, clip.frames - 1, clip.frames
    asked = {"video_start": start, "video_end": end}
    try:
        return _qwen_vl_utils().calculate_video_frame_range(asked, clip.frames, clip.fps)
    except ValueError as error:
        raise Unreadable(
            f"{clip.path}: video_start {start or 0:g} to video_end {'its end' if end is None else f'{end:g}'} leaves "
            f"less than 2 frames of its {clip.frames / clip.fps:.2f} s. Change them"
        ) from error


def _frame_size(frames: int, height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """Return (H, W) to which qwen-vl-utils resizes the frames of a video with this many frames."""
    low = recipe.video_min_pixels
    high = max(min(FRAME_TOKENS * recipe.factor**2, _total_pixels(recipe) / frames * 2), int(low * 1.05))
    return _resized(height, width, recipe.factor, low, min(recipe.video_max_pixels, high))


def _total_pixels(recipe: Recipe) -> float:
    # Always passed: qwen-vl-utils' own default depends on an environment variable (MODEL_SEQ_LEN).
    return VIDEO_TOKENS * recipe.factor * recipe.factor * 0.9


def _resized(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    _check_ratio(height, width)
    high, wide = _qwen_vl_utils().smart_resize(height, width, factor, min_pixels=min_pixels, max_pixels=max_pixels)
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
            f"and Qwen2-VL accepts at most {MAX_RATIO}. Crop it"
        )


def _qwen_vl_utils() -> Any:
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise ConfigError("videos need qwen-vl-utils. Install it: pip install 'qwen-vl-utils>=0.0.14'") from error
    # It warns about a maximum above its own for every video; `Recipe.of` has already checked ours.
    logging.getLogger(vision_process.__name__).setLevel(logging.ERROR)
    return vision_process
