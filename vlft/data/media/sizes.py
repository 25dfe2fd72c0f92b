"""Sizes of resized pictures, and the number of frames taken of a video: the arithmetic of the stock paths.

A still is resized as by `smart_resize` of transformers' Qwen2-VL. By the rule of qwen-vl-utils, a frame is resized as
by its `smart_resize`, and frames are counted as by its `smart_nframes` and `calculate_video_frame_range`. By the rule
of the processor, a clip is resized and its frames are counted as by transformers' `Qwen3VLVideoProcessor`. Importing
those functions imports torch, which takes seconds. Tests compare the results with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vlft.config.recipe import LEAST_FRAMES


def still_size(height: int, width: int, *, factor: int, low: float, high: float) -> tuple[int, int]:
    """Return (H, W) to which the image processor resizes a still: multiples of `factor`, with `low` to `high` pixels.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        factor: side of a merged patch, in pixels.
        low: fewest pixels of the result.
        high: most pixels of the result.
    """
    nearest = _multiple(round, height, factor), _multiple(round, width, factor)
    high_wide = _bounded(nearest, height, width, factor, low, high)
    return (max(factor, high_wide[0]), max(factor, high_wide[1])) if _pixels(nearest) > high else high_wide


def frame_size(height: int, width: int, *, factor: int, low: float, high: float) -> tuple[int, int]:
    """Return (H, W) to which qwen-vl-utils resizes a frame. A side is 0 if `high` leaves no room for it.

    The arguments are those of `still_size`.
    """
    nearest = max(factor, _multiple(round, height, factor)), max(factor, _multiple(round, width, factor))
    return _bounded(nearest, height, width, factor, low, high)


def clip_size(
    frames: int, height: int, width: int, *, factor: int, low: int, high: int, frame_tokens: int | None
) -> tuple[int, int]:
    """Return (H, W) to which the processor of Qwen3-VL resizes the frames of a clip.

    Args:
        frames: of the clip, at least 2.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        factor: side of a merged patch, in pixels.
        low: fewest pixels of all frames together.
        high: most pixels of all frames together.
        frame_tokens: most tokens of a frame, with which `high` is shared equally among frames; None: no such limit.
    """
    if frame_tokens is not None:
        high = max(min(frame_tokens * factor**2, high // frames), int(low * 1.05)) * frames
    if height < factor or width < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
    nearest = _multiple(round, height, factor), _multiple(round, width, factor)
    counted = round(frames / 2) * 2  # half a step is rounded to the even number of steps
    if counted * _pixels(nearest) > high:
        shrink = math.sqrt((frames * height * width) / high)
        small = (max(factor, _multiple(math.floor, side / shrink, factor)) for side in (height, width))
        return next(small), next(small)
    if counted * _pixels(nearest) < low:
        grow = math.sqrt(low / (frames * height * width))
        return _multiple(math.ceil, height * grow, factor), _multiple(math.ceil, width * grow, factor)
    return nearest


def _bounded(
    nearest: tuple[int, int], height: int, width: int, factor: int, low: float, high: float
) -> tuple[int, int]:
    """Return the nearest size, or the one with `low` or `high` pixels if it is too small or too large."""
    if _pixels(nearest) > high:
        shrink = math.sqrt((height * width) / high)
        return _multiple(math.floor, height / shrink, factor), _multiple(math.floor, width / shrink, factor)
    if _pixels(nearest) < low:
        grow = math.sqrt(low / (height * width))
        return _multiple(math.ceil, height * grow, factor), _multiple(math.ceil, width * grow, factor)
    return nearest


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _multiple(rounded: Callable[[float], int], side: float, factor: int) -> int:
    return rounded(side / factor) * factor


def frame_count(frames: int, rate: float, *, fps: float, most: int) -> int:
    """Return the number of frames to take, an even number of at least 2.

    Args:
        frames: of the video, at least 2.
        rate: frames per second of the video.
        fps: frames per second to take.
        most: most frames to take.
    """
    wanted = min(max(frames / rate * fps, LEAST_FRAMES), most - most % 2, frames)
    return _multiple(math.floor, wanted, 2)


def clip_count(frames: int, rate: float, *, fps: float, least: int, most: int) -> int:
    """Return the number of frames that the processor of Qwen3-VL takes. It may be odd.

    Args:
        frames: of the video.
        rate: frames per second of the video.
        fps: frames per second to take.
        least: fewest frames to take, if the video has as many.
        most: most frames to take.
    """
    return min(max(int(frames / rate * fps), least), most, frames)


def frame_range(start: float | None, end: float | None, *, frames: int, rate: float) -> tuple[int, int] | None:
    """Return the first and the last frame between two times; None if there are less than two.

    Args:
        start: in seconds; None: the start of the video.
        end: in seconds; None: its end.
        frames: of the video.
        rate: frames per second of the video.
    """
    length = frames / rate
    first = 0 if start is None else math.ceil(max(0.0, min(start, length)) * rate)
    last = frames - 1 if end is None else min(math.floor(max(0.0, min(end, length)) * rate), frames - 1)
    return None if first >= last else (first, last)
