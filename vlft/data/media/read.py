"""Pictures and videos -> patches, and the number of them from headers alone. Knows no tokens and no rows.

The stock path is the oracle: stills as `Qwen2VLImageProcessor` (torchvision backend), videos as qwen-vl-utils 0.0.14
followed by `Qwen2VLVideoProcessor(do_resize=False)`. Opening the files is `vlft.data.media.pictures` and
`vlft.data.media.clips`.

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
from vlft.data.media.patches import grid_for, still_patches, video_patches
from vlft.data.media.pictures import Unreadable, depth_remark, open_picture, picture_header, read_pixels
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

    def __reduce__(self):  # see DataError: it crosses from loader workers
        return type(self), (self.field, self.reason)


def measure(media: Media, recipe: Recipe) -> Grid:
    """The grid that `decode` would give, from file headers (of a video file: its index and first frame).

    Raises:
        MediaError: it would not decode, as far as headers tell.
    """
    return grid_of(media, read_headers(media), recipe)


@dataclass(frozen=True, kw_only=True)
class Headers:
    """What the headers of a medium tell; enough for `grid_of` under any recipe.

    Attributes:
        sizes: (H, W) of a still, or of each picture of a list of frames.
        deep: of each, whether it has more than 8 bits a channel.
        clip: a video file.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    deep: tuple[bool, ...] = ()
    clip: Clip | None = None


def read_headers(media: Media) -> Headers:
    """Read the headers of a medium.

    Raises:
        MediaError: as `measure`.
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
        raise _refused(media, error) from error


def depth_remarks(media: Media, seen: Headers | None = None) -> list[tuple[str, str]]:
    """(field, remark) of the pictures of more than 8 bits a channel that are almost black as they are trained.

    Args:
        seen: what `read_headers` gave. Pictures that have no more bits are not decoded.

    Raises:
        MediaError: as `decode`.
    """
    if isinstance(media, Video) and media.path is not None:
        return []
    deep_ones = (seen or read_headers(media)).deep
    remarks = []
    for (field, path), deep in zip(media.files, deep_ones, strict=True):
        try:
            remark = depth_remark(path) if deep else None
        except Unreadable as error:
            raise MediaError(field, str(error)) from error
        if remark:
            remarks.append((field, remark))
    return remarks


def grid_of(media: Media, seen: Headers, recipe: Recipe) -> Grid:
    """The grid of a medium that was looked at; opens nothing.

    Raises:
        MediaError: as `measure`.
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
        raise _refused(media, error) from error


def recipe_for(media: Media, recipe: Recipe) -> Recipe:
    """The budgets of this medium: the run's, but for what its row says itself.

    Raises:
        MediaError: the two cannot be carried out together.
    """
    try:
        return overridden(recipe, media.overrides, video=isinstance(media, Video))
    except ConfigError as error:
        raise MediaError(media.field, str(error)) from error


def decode(media: Media, recipe: Recipe) -> EncodedMedia:
    """Pixels as the stock path has them before it normalises, in the ViT's patch order.

    Returns:
        `patches` uint8 [P, 3, 14, 14] of a still, whose one frame the model repeats, in channels-last memory;
        [P, 3, 2, 14, 14] of a video.

    Raises:
        MediaError: the file is missing, damaged, cut short, or of a kind that is refused.
    """
    recipe = recipe_for(media, recipe)
    try:
        if isinstance(media, Image):
            return still_patches(_decode_still(media, recipe), recipe)
        if media.path is None:
            return video_patches(_decode_frames(media, recipe), recipe)
        return video_patches(_decode_clip(media, recipe), recipe)
    except Unreadable as error:
        raise _refused(media, error) from error


def _refused(media: Media, error: Unreadable) -> MediaError:
    path, reason = media.path, str(error)
    return MediaError(media.field, reason if path is None or path in reason else f"{path}: {reason}")


def _decode_still(image: Image, recipe: Recipe) -> torch.Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    pixels_3HW = read_pixels(image.path)
    _, height, width = pixels_3HW.shape
    size = _still_size(height, width, recipe)
    return resize(pixels_3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _still_size(height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """(H, W) to which the stock image processor resizes a still."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    _check_ratio(height, width)
    low, high = recipe.image_min_pixels, recipe.image_max_pixels
    return smart_resize(height, width, factor=recipe.factor, min_pixels=low, max_pixels=high)


def _decode_frames(video: Video, recipe: Recipe) -> torch.Tensor:
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    height, width = _snapped_size(video, read_headers(video).sizes, recipe)
    # As `fetch_video` does first, but one by one: a hundred pictures of a camera are 3.6 GB. Where it would not leave
    # this size as it is, it has to see them in their own.
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
    return frames_F3HW.to(torch.uint8)  # it resizes in uint8 and gives whole numbers as floats


def _snapped_size(video: Video, sizes: Sequence[tuple[int, int]], recipe: Recipe) -> tuple[int, int]:
    """The (H, W) that qwen-vl-utils first resizes all pictures of a list to: multiples of twice our factor, because its
    `fetch_video` hands `fetch_image` the side of a merged patch as if it were that of a patch."""
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    snapped = [_resized(height, width, 2 * recipe.factor, low, high) for height, width in sizes]
    for i, (height, width) in enumerate(snapped):
        if (height, width) != snapped[0]:
            raise MediaError(
                f"{video.field}[{i}]",
                f"{video.frames[i]} is {sizes[i][1]}x{sizes[i][0]}, the first frame {sizes[0][1]}x{sizes[0][0]}; "
                f"resized, {width}x{height} and {snapped[0][1]}x{snapped[0][0]}. Bring all frames to one size",
            )
    return snapped[0]


def _of_frame(video: Video, i: int, read: Any) -> Any:
    try:
        return read(video.frames[i])
    except Unreadable as error:
        raise MediaError(f"{video.field}[{i}]", str(error)) from error


def _decode_clip(video: Video, recipe: Recipe) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize  # not v2: qwen-vl-utils' own, which resizes in float

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
    """The frames taken of a video file, evenly from the first to the last of those that the row asks for.

    Args:
        recipe: of this video, as `recipe_for` gives them.

    Raises:
        Unreadable: it has too few.
    """
    first, last, there = _span(clip, video)
    if there < 2:
        raise Unreadable(f"{clip.path}: a video of {there} frame, 2 are needed. Give it as an image")
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
    """First and last frame of the part that the row asks for, and how many frames it has."""
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
    """(H, W) to which qwen-vl-utils resizes the frames of a video that has this many."""
    low = recipe.video_min_pixels
    high = max(min(FRAME_TOKENS * recipe.factor**2, _total_pixels(recipe) / frames * 2), int(low * 1.05))
    return _resized(height, width, recipe.factor, low, min(recipe.video_max_pixels, high))


def _total_pixels(recipe: Recipe) -> float:
    # Always passed: qwen-vl-utils' own default hangs on the environment (MODEL_SEQ_LEN).
    return VIDEO_TOKENS * recipe.factor * recipe.factor * 0.9


def _resized(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    _check_ratio(height, width)
    high, wide = _qwen_vl_utils().smart_resize(height, width, factor, min_pixels=min_pixels, max_pixels=max_pixels)
    if not high or not wide:
        raise Unreadable(
            f"a frame of {width}x{height} is so narrow that {int(max_pixels)} pixels leave it {wide}x{high}. "
            "Raise --video_max_pixels or crop the frames"
        )
    return high, wide


def _check_ratio(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise Unreadable(
            f"{width}x{height}: the longer side is {max(height, width) / min(height, width):.1f} times the shorter, "
            f"and Qwen2-VL takes {MAX_RATIO} at most. Crop it"
        )


def _qwen_vl_utils() -> Any:
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise ConfigError("videos need qwen-vl-utils. Install it: pip install 'qwen-vl-utils>=0.0.14'") from error
    # It warns, for every video, of a maximum above its own; ours is settled in `Recipe.of`.
    logging.getLogger(vision_process.__name__).setLevel(logging.ERROR)
    return vision_process
