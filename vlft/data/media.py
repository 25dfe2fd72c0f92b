"""Pictures and videos -> patches, and the number of them from headers alone. Knows no tokens and no rows.

The stock path is the oracle: stills as `Qwen2VLImageProcessor` (torchvision backend), videos as qwen-vl-utils 0.0.14
followed by `Qwen2VLVideoProcessor(do_resize=False)`. Opening the files is `vlft.data.pictures` and `vlft.data.clips`.

Letters in shapes: P patches; H, W pixels after resizing; F frames.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from vlft.data.budgets import FRAME_TOKENS, VIDEO_TOKENS, MediaSettings, media_settings
from vlft.data.clips import Clip, open_clip, read_frames
from vlft.data.pictures import Unreadable, open_picture, picture_size, read_pixels
from vlft.data.sample import EncodedMedia, Grid, Image, Media, Video
from vlft.errors import ConfigError, VlftError

__all__ = ["MediaError", "MediaSettings", "decode", "measure", "media_settings"]

MAX_RATIO = 200


class MediaError(VlftError):
    """A picture or video (`.field` of its row) that cannot be trained on, and why (`.reason`)."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self):  # see DataError: it crosses from loader workers
        return type(self), (self.field, self.reason)


def measure(media: Media, settings: MediaSettings) -> Grid:
    """The grid that `decode` would give, from file headers (of a video file: its index and first frame).

    Raises:
        MediaError: it would not decode, as far as headers tell.
    """
    try:
        if isinstance(media, Image):
            height, width = _still_size(*picture_size(media.path), settings)
            return _grid(1, height, width, settings)
        if media.path is None:
            sizes = [_of_frame(media, i, picture_size) for i in range(len(media.frames))]
            height, width = _snapped_size(media, sizes, settings)
            frames = len(media.frames) + len(media.frames) % 2
        else:
            clip = open_clip(media.path)
            frames, height, width = _frame_count(clip, settings), clip.height, clip.width
        height, width = _frame_size(frames, height, width, settings)
    except Unreadable as error:
        raise _refused(media, error) from error
    return _grid(frames // 2, height, width, settings)


def decode(media: Media, settings: MediaSettings) -> EncodedMedia:
    """Pixels as the stock path has them before it normalises, in the ViT's patch order.

    Returns:
        `patches` uint8 [P, 3, 14, 14] of a still, whose one frame the model repeats, in channels-last memory;
        [P, 3, 2, 14, 14] of a video.

    Raises:
        MediaError: the file is missing, damaged, cut short, or of a kind that is refused.
    """
    try:
        if isinstance(media, Image):
            return _still_patches(_decode_still(media, settings), settings)
        if media.path is None:
            return _video_patches(_decode_frames(media, settings), settings)
        return _video_patches(_decode_clip(media.path, settings), settings)
    except Unreadable as error:
        raise _refused(media, error) from error


def _refused(media: Media, error: Unreadable) -> MediaError:
    path, reason = media.path, str(error)
    return MediaError(media.field, reason if path is None or path in reason else f"{path}: {reason}")


def _decode_still(image: Image, settings: MediaSettings) -> torch.Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    pixels_3HW = read_pixels(image.path)
    _, height, width = pixels_3HW.shape
    size = _still_size(height, width, settings)
    return resize(pixels_3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _still_size(height: int, width: int, settings: MediaSettings) -> tuple[int, int]:
    """(H, W) to which the stock image processor resizes a still."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    _check_ratio(height, width)
    low, high = settings.image_min_pixels, settings.image_max_pixels
    return smart_resize(height, width, factor=settings.factor, min_pixels=low, max_pixels=high)


def _decode_frames(video: Video, settings: MediaSettings) -> torch.Tensor:
    low, high = settings.video_min_pixels, settings.video_max_pixels
    height, width = _snapped_size(
        video, [_of_frame(video, i, picture_size) for i in range(len(video.frames))], settings
    )
    # As `fetch_video` does first, but one by one: a hundred pictures of a camera are 3.6 GB. Where it would not leave
    # this size as it is, it has to see them in their own.
    early = _resized(height, width, 2 * settings.factor, low, high) == (height, width)

    def small(path: str) -> Any:
        picture = open_picture(path)
        return picture.resize((width, height)) if early else picture

    pictures = [_of_frame(video, i, small) for i in range(len(video.frames))]
    frames_F3HW = _qwen_vl_utils().fetch_video(
        {
            "video": pictures,
            "min_pixels": settings.video_min_pixels,
            "max_pixels": settings.video_max_pixels,
            "total_pixels": _total_pixels(settings),
        },
        image_patch_size=settings.patch_size,
    )
    return frames_F3HW.to(torch.uint8)  # it resizes in uint8 and gives whole numbers as floats


def _snapped_size(video: Video, sizes: list[tuple[int, int]], settings: MediaSettings) -> tuple[int, int]:
    """The (H, W) that qwen-vl-utils first resizes all pictures of a list to: multiples of twice our factor, because its
    `fetch_video` hands `fetch_image` the side of a merged patch as if it were that of a patch."""
    low, high = settings.video_min_pixels, settings.video_max_pixels
    snapped = [_resized(height, width, 2 * settings.factor, low, high) for height, width in sizes]
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


def _decode_clip(path: str, settings: MediaSettings) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize  # not v2: qwen-vl-utils' own, which resizes in float

    clip = open_clip(path)
    frames = _frame_count(clip, settings)
    size = _frame_size(frames, clip.height, clip.width, settings)
    indices = torch.linspace(0, clip.frames - 1, frames).round().long().tolist()
    frames_F3HW = torch.empty((frames, 3, *size), dtype=torch.uint8)
    done = 0
    for some in read_frames(clip, indices):
        some_K3HW = torch.from_numpy(some).permute(0, 3, 1, 2)
        frames_F3HW[done : done + len(some)] = resize(
            some_K3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        done += len(some)
    return frames_F3HW


def _frame_count(clip: Clip, settings: MediaSettings) -> int:
    if clip.frames < 2:
        raise Unreadable(f"{clip.path}: a video of {clip.frames} frame, 2 are needed. Give it as an image")
    if settings.nframes is not None:
        if settings.nframes > clip.frames:
            raise Unreadable(
                f"{clip.path}: --nframes {settings.nframes}, and it has {clip.frames} frames. "
                f"Lower --nframes to {clip.frames - clip.frames % 2}, or use --fps"
            )
        return settings.nframes
    asked = {"fps": settings.fps, "max_frames": settings.video_max_frames}
    return _qwen_vl_utils().smart_nframes(asked, total_frames=clip.frames, video_fps=clip.fps)


def _frame_size(frames: int, height: int, width: int, settings: MediaSettings) -> tuple[int, int]:
    """(H, W) to which qwen-vl-utils resizes the frames of a video that has this many."""
    low = settings.video_min_pixels
    high = max(min(FRAME_TOKENS * settings.factor**2, _total_pixels(settings) / frames * 2), int(low * 1.05))
    return _resized(height, width, settings.factor, low, min(settings.video_max_pixels, high))


def _total_pixels(settings: MediaSettings) -> float:
    # Always passed: qwen-vl-utils' own default hangs on the environment (MODEL_SEQ_LEN).
    return VIDEO_TOKENS * settings.factor * settings.factor * 0.9


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


def _grid(t: int, height: int, width: int, settings: MediaSettings) -> Grid:
    return Grid(t=t, h=height // settings.patch_size, w=width // settings.patch_size)


def _still_patches(pixels_3HW: torch.Tensor, settings: MediaSettings) -> EncodedMedia:
    """Cut into patches: by row and column of merged patches, then row and column within one.

    The three colours of a pixel stay side by side, as decoders and the resizer have them, so that runs of 3 * 14 bytes
    are moved whole: a fifth of the time of permuting single bytes. The model takes them apart on its device.
    """
    _, height, width = pixels_3HW.shape
    p, m = settings.patch_size, settings.merge_size
    grid = _grid(1, height, width, settings)
    pixels = pixels_3HW.permute(1, 2, 0).contiguous().numpy()
    runs = pixels.reshape(-1).view(np.dtype((np.void, 3 * p))).reshape(grid.h // m, m, p, grid.w // m, m)
    patches = np.ascontiguousarray(runs.transpose(0, 3, 1, 4, 2)).reshape(-1).view(np.uint8)
    patches_PppC = torch.from_numpy(patches).reshape(grid.patches, p, p, 3)
    return EncodedMedia(grid=grid, patches=patches_PppC.permute(0, 3, 1, 2), is_video=False)


def _video_patches(frames_F3HW: torch.Tensor, settings: MediaSettings) -> EncodedMedia:
    """As `_still_patches`, by time first, two frames a patch."""
    frames, _, height, width = frames_F3HW.shape
    p, m = settings.patch_size, settings.merge_size
    grid = _grid(frames // 2, height, width, settings)
    split = frames_F3HW.reshape(grid.t, 2, 3, grid.h // m, m, p, grid.w // m, m, p)
    patches = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.patches, 3, 2, p, p)
    return EncodedMedia(grid=grid, patches=patches, is_video=True)


def _qwen_vl_utils() -> Any:
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise ConfigError("videos need qwen-vl-utils. Install it: pip install 'qwen-vl-utils>=0.0.14'") from error
    # It warns, for every video, of a maximum above its own; ours is settled in `media_settings`.
    logging.getLogger(vision_process.__name__).setLevel(logging.ERROR)
    return vision_process
