"""Decode and resize pictures and videos, as the stock path does. `vlft.data.media.read` reads their headers.

torch is imported where used. Letters in shapes: F frames, 1 of a still; H, W pixels after resizing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data import pixel_memory
from vlft.data.media.clips import FRAMES_AT_A_TIME, Clip, open_clip, read_frames
from vlft.data.media.pictures import Unreadable, open_picture, read_pixels
from vlft.data.media.read import (
    Headers,
    chosen,
    frames_taken,
    grid_for,
    grid_of,
    listed_size,
    of_frame,
    qwen_vl_utils,
    read_headers,
    recipe_for,
    refused,
    resized,
    snapped_size,
    still_size_of,
    total_pixels,
    video_size_of,
)
from vlft.data.media.resize import resize_in_float_into, resize_into
from vlft.data.sample import EncodedMedia, Image, Media, Video

if TYPE_CHECKING:
    import torch


def decode(media: Media, recipe: Recipe) -> EncodedMedia:
    """Decode and resize a medium: the pixels of the stock path before it normalises them and splits them into patches.

    They are in memory of `vlft.data.pixel_memory`, each picture beside the one before it.

    Raises:
        MediaError: the file is missing, damaged, truncated, or of a kind that is refused.
    """
    own = recipe_for(media, recipe)
    try:
        if isinstance(media, Image):
            pixels_1HW3 = _decode_still(media, own)
            _, height, width, _ = pixels_1HW3.shape
            return EncodedMedia(grid=grid_for(1, height, width, own), pixels=pixels_1HW3, is_video=False)
        pixels_FHW3, seen = _decode_video(media, own)
        return EncodedMedia(grid=grid_of(media, seen, recipe), pixels=pixels_FHW3, is_video=True)
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
            indices = (frames_taken if exact else chosen)(clip, media, recipe)
            for _ in read_frames(clip, indices):
                pass
    except Unreadable as error:
        raise refused(media, error) from error


def _decode_still(image: Image, recipe: Recipe) -> torch.Tensor:
    pixels_3HW = read_pixels(image.path)
    _, height, width = pixels_3HW.shape
    made_1HW3 = pixel_memory.room(1, *still_size_of(height, width, recipe), 3, video=False)
    resize_into(made_1HW3, pixels_3HW[None])
    return made_1HW3


def _decode_video(video: Video, recipe: Recipe) -> tuple[torch.Tensor, Headers]:
    """Decode and resize a video: uint8 [F, H, W, 3], and what its files say of themselves."""
    if video.path is None:
        seen = read_headers(video)
        return _decode_frames(video, seen, recipe), seen
    clip = open_clip(video.path)
    return _decode_clip(video, clip, recipe), Headers(clip=clip)


def _decode_frames(video: Video, seen: Headers, recipe: Recipe) -> torch.Tensor:
    if recipe.video_rule == "processor":
        size = video_size_of(len(seen.sizes), *listed_size(video, seen.sizes, recipe), recipe)
        read = (np.asarray(of_frame(video, i, open_picture)) for i in range(len(video.frames)))
        return _resized_clip(_stacked(read), len(video.frames), size, recipe)
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    height, width = snapped_size(video, seen.sizes, recipe)
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
    frames, _, height, width = frames_F3HW.shape
    made_FHW3 = pixel_memory.room(frames, height, width, 3, video=True)
    made_FHW3.permute(0, 3, 1, 2).copy_(frames_F3HW)  # it resizes in uint8 and returns integer values as floats
    return made_FHW3


def _decode_clip(video: Video, clip: Clip, recipe: Recipe) -> torch.Tensor:
    indices = frames_taken(clip, video, recipe)
    size = video_size_of(len(indices), clip.height, clip.width, recipe)
    return _resized_clip(read_frames(clip, indices), len(indices), size, recipe)


def _stacked(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Stack pictures [H, W, 3], a few at a time."""
    while some := list(islice(pictures, FRAMES_AT_A_TIME)):
        yield np.stack(some)


def _resized_clip(stacks: Iterable[np.ndarray], frames: int, size: tuple[int, int], recipe: Recipe) -> torch.Tensor:
    """Resize frames as the stock path does, and repeat the last one if their number is odd.

    Args:
        stacks: uint8 [K, H, W, 3], in order.
        frames: number of frames in all of them.
        size: (H, W) of the result.
        recipe: says which stock path.

    Returns:
        uint8 [F, H, W, 3].
    """
    import torch

    made_FHW3 = pixel_memory.room(frames + frames % 2, *size, 3, video=True)
    resize = resize_into if recipe.video_rule == "processor" else resize_in_float_into
    done = 0
    for some in stacks:
        resize(made_FHW3[done : done + len(some)], torch.from_numpy(some).permute(0, 3, 1, 2))
        done += len(some)
    made_FHW3[done:] = made_FHW3[done - 1]
    return made_FHW3
