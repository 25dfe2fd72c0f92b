"""Decode pictures and videos into patches, as the stock path does. `vlft.data.media.read` reads their headers.

torch is imported where used. Letters in shapes: P patches; H, W pixels after resizing; F frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data.media.clips import open_clip, read_frames
from vlft.data.media.patches import still_patches, video_patches
from vlft.data.media.pictures import Unreadable, open_picture, read_pixels
from vlft.data.media.read import (
    frame_size_of,
    frames_taken,
    of_frame,
    qwen_vl_utils,
    read_headers,
    recipe_for,
    refused,
    resized,
    snapped_size,
    still_size_of,
    taken,
    total_pixels,
)
from vlft.data.sample import EncodedMedia, Image, Media, Video

if TYPE_CHECKING:
    import torch


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


def check(media: Media, recipe: Recipe, *, exact: bool = False) -> None:
    """Decode a medium, and discard its pixels, without resizing them.

    Args:
        media: the medium.
        recipe: pixel and frame settings.
        exact: of a video file, read exactly the frames that `decode` takes, which needs torch; if False, these or
            their neighbours.

    Raises:
        MediaError: the errors of `decode`.
    """
    recipe = recipe_for(media, recipe)
    try:
        if isinstance(media, Image):
            open_picture(media.path)
        elif media.path is None:
            for place in range(len(media.frames)):
                of_frame(media, place, open_picture)
        else:
            clip = open_clip(media.path)
            if exact:
                indices = frames_taken(clip, media, recipe)
            else:
                indices = np.linspace(*taken(clip, media, recipe)).round().astype(int).tolist()
            for _ in read_frames(clip, indices):
                pass
    except Unreadable as error:
        raise refused(media, error) from error


def _decode_still(image: Image, recipe: Recipe) -> torch.Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    pixels_3HW = read_pixels(image.path)
    _, height, width = pixels_3HW.shape
    size = still_size_of(height, width, recipe)
    return resize(pixels_3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _decode_frames(video: Video, recipe: Recipe) -> torch.Tensor:
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    height, width = snapped_size(video, read_headers(video).sizes, recipe)
    # `fetch_video` first resizes all pictures together, and a hundred photographs take 3.6 GB. So they are resized here
    # one by one, unless `fetch_video` would resize the result again: then it needs the pictures in their own size.
    early = resized(height, width, 2 * recipe.factor, low, high) == (height, width)

    def small(path: str) -> Any:
        picture = open_picture(path)
        return picture.resize((width, height)) if early else picture

    pictures = [of_frame(video, i, small) for i in range(len(video.frames))]
    frames_F3HW = qwen_vl_utils().fetch_video(
        {
            "video": pictures,
            "min_pixels": recipe.video_min_pixels,
            "max_pixels": recipe.video_max_pixels,
            "total_pixels": total_pixels(recipe),
        },
        image_patch_size=recipe.patch_size,
    )
    return frames_F3HW.byte()  # it resizes in uint8 and returns integer values as floats


def _decode_clip(video: Video, recipe: Recipe) -> torch.Tensor:
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize  # not v2: qwen-vl-utils uses this one, which resizes in float

    clip = open_clip(str(video.path))
    indices = frames_taken(clip, video, recipe)
    frames = len(indices)
    size = frame_size_of(frames, clip.height, clip.width, recipe)
    frames_F3HW = torch.empty((frames, 3, *size), dtype=torch.uint8)
    done = 0
    for some in read_frames(clip, indices):
        some_K3HW = torch.from_numpy(some).permute(0, 3, 1, 2)
        frames_F3HW[done : done + len(some)] = resize(
            some_K3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        done += len(some)
    return frames_F3HW
